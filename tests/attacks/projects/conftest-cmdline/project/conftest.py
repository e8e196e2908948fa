@TRAP@


def pytest_cmdline_main(config):
    @TRAP@
