def pytest_addoption(parser):
    parser.addoption("--microvm", action="store_true")
