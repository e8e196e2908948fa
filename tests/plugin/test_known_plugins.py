"""What the run says of plug-ins that do less in machines, and how others are made to work."""

import pytest


def test_a_plugin_that_defers_what_it_exchanges(project):
    """Like syrupy and flaky, it registers for outputs when it is configured, if it finds pytest-xdist."""
    project.write(
        conftest="""
        class Exchange:
            def pytest_testnodedown(self, node, error):
                found.append(node.workeroutput["own"])

        found = []

        def pytest_configure(config):
            if config.pluginmanager.hasplugin("xdist"):
                config.pluginmanager.register(Exchange(), "exchange")
            if hasattr(config, "workerinput"):
                config.workeroutput["own"] = config.workerinput["workerid"]

        def pytest_terminal_summary(terminalreporter):
            terminalreporter.write_line(f"FOUND {sorted(found)}")
        """
    )
    project.write(test_it="def test_a(): pass\ndef test_b(): pass")
    for without in ([], ["-p", "no:xdist"]):
        done = project.microvm(*without)
        done.assert_outcomes(passed=2)
        done.stdout.fnmatch_lines("FOUND ['gw0', 'gw0']")


def test_an_outcome_of_a_plugins_own(project):
    project.write(
        conftest="""
        import pytest

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(item, call):
            report = yield
            if call.when == "call" and item.name == "test_again":
                again = pytest.TestReport.from_item_and_call(item, call)
                again.outcome = "retried"
                item.ihook.pytest_runtest_logreport(report=again)
            return report

        def pytest_report_teststatus(report):
            if report.outcome == "retried":
                return "retried", "R", ("RETRIED", {"yellow": True})
        """
    )
    project.write(test_it="def test_again(): pass")
    done = project.microvm("-v")
    done.stdout.fnmatch_lines(["*::test_again RETRIED*", "*::test_again PASSED*", "*1 passed, 1 retried*"])
    assert done.ret == 0


def test_a_failure_that_a_hook_reads_with_its_machine(project):
    """``longreprtext`` of a report asks for the worker's description, and says nothing of it."""
    project.write(
        conftest="""
            texts = []

            def pytest_runtest_logreport(report):
                if report.failed:
                    texts.append(report.longreprtext)

            def pytest_terminal_summary(terminalreporter):
                terminalreporter.write_line(f"FIRST {texts[0].splitlines()[0].strip()!r}")
        """,
        test_it="def test_fails(): assert 0",
    )
    for run in (project.native, project.microvm):
        run().stdout.fnmatch_lines("FIRST *def test_fails(): assert 0'")


def test_the_id_of_a_worker(project):
    pytest.importorskip("xdist")
    project.write(test_it="def test_it(worker_id): assert worker_id == 'master'")
    line = "microvm: fixture worker_id of pytest-xdist: each test has a machine of its own*"
    project.microvm("-n2").stdout.fnmatch_lines(line)
    project.microvm().stdout.no_fnmatch_line(line)


def test_testmon_is_refused(project):
    project.write(test_it="def test_it(): pass")
    done = project.microvm("--testmon")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines("*--testmon cannot work with --microvm: pytest-testmon records in one process*")


SNAPSHOT = """
    def pytest_addoption(parser):
        parser.addoption("--inline-snapshot")

    def pytest_sessionfinish(session):
        if session.config.option.inline_snapshot:
            session.items[0].path.write_text("rewritten")
"""


@pytest.mark.parametrize("words", [["--inline-snapshot=create,fix"], ["--inline-snapshot", "fix"]])
def test_rewriting_of_source_needs_one_process(project, words):
    project.write(test_it="def test_it(): pass", conftest=SNAPSHOT)
    done = project.microvm(*words)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(
        [
            "ERROR: --inline-snapshot=*fix rewrites *, but isolation is test",
            "next step: add --microvm-isolation=session",
        ]
    )
    done = project.microvm(*words, "--microvm-isolation=session", "-n1")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: *-n divides them among several", "next step: leave out -n"])


def test_rewritten_source_comes_back(project):
    project.write(test_it="def test_it(): pass", conftest=SNAPSHOT)
    done = project.microvm("--inline-snapshot=fix", "--microvm-isolation=session")
    assert done.ret == 0
    assert (project.path / "test_it.py").read_text() == "rewritten"
    done.stdout.no_fnmatch_line("*gone with their machines*test_it.py*")


def test_review_of_snapshots_is_refused(project):
    project.write(test_it="def test_it(): pass", conftest=SNAPSHOT)
    done = project.microvm("--inline-snapshot=create,review")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(
        "*--inline-snapshot cannot work with --microvm: inline-snapshot asks at a terminal*"
    )


def test_forked_is_left_to_machines(project):
    """The option is known to the host's pytest alone, if at all: the machine's gets it in no case."""
    project.write(
        conftest="""
            def pytest_addoption(parser):
                parser.addoption("--forked", action="store_true")
        """,
        test_it="def test_it(request): assert not request.config.option.forked",
    )
    done = project.microvm("--forked")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines("*unrecognized arguments: --forked")


def test_the_guard_stays_on_the_host(project, monkeypatch):
    project.write(test_it="def test_it(): pass")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    project.microvm("-p", "pytest_microvm.plugin", "-p", "pytest_microvm.plugin.guard").assert_outcomes(
        passed=1
    )
