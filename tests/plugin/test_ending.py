"""What plug-ins and the project's hooks say at the end of a run: as natively, but in a machine of its own."""

import json

import pytest

from support.comparison import only_locally

SOURCE = """
def sign(number):
    if number < 0:
        return -1
    return 1
"""
TESTS = """
    import package
    def test_positive(): assert package.sign(1) == 1
    def test_again(): assert package.sign(2) == 1
"""


def covered(project, name="coverage.json"):
    """Return the lines, branches and totals of a coverage report of the project, which is removed."""
    file = project.path / name
    report = json.loads(file.read_text())
    file.unlink()
    for found in report["files"].values():
        for part in (found, *found["functions"].values(), *found["classes"].values()):
            part["contexts"] = {line: sorted(names) for line, names in part.get("contexts", {}).items()}
    return report["files"], report["totals"]


@pytest.fixture
def measured(project):
    project.write(package=SOURCE, test_it=TESTS)
    return project


@pytest.mark.parametrize("isolation", ["test", "module"])
def test_coverage_is_the_native_one(measured, isolation):
    options = [
        "--cov=package",
        "--cov-branch",
        "--cov-report=json",
        "--cov-report=term-missing",
    ]
    native = measured.native(*options)
    expected = covered(measured)
    assert expected[1]["percent_covered"] < 100
    result = measured.microvm(f"--microvm-isolation={isolation}", *options)
    assert covered(measured) == expected
    assert result.ret == native.ret == 0
    start = native.outlines.index(next(line for line in native.outlines if "tests coverage" in line))
    table = [line for line in native.outlines[start:] if line][:8]
    assert [line for line in result.outlines if line in table] == table


def test_coverage_with_contexts(measured):
    options = ["--cov=package", "--cov-context=test", "--cov-report=json"]
    measured.write(__DOT__coveragerc="[json]\nshow_contexts = true")
    measured.native(*options)
    expected = covered(measured)
    measured.microvm(*options)
    assert covered(measured) == expected


def test_coverage_of_a_package_that_pytest_itself_has_loaded(project):
    project.write(
        test_it="""
            import iniconfig

            def test_it(tmp_path):
                (tmp_path / "a.ini").write_text("[a]\\nb = 1")
                assert iniconfig.IniConfig(tmp_path / "a.ini")["a"]["b"] == "1"
        """
    )
    options = ["--cov=iniconfig", "--cov-branch", "--cov-report=json"]
    project.native(*options)
    expected = covered(project)
    assert expected[1]["covered_lines"]
    project.microvm(*options)
    assert covered(project) == expected


def test_coverage_of_files_that_nothing_imports(project):
    """The package is found by its name: it is in no folder of that name here."""
    project.write(
        pytest__DOT__ini="[pytest]\npythonpath = src",
        src__package__unused="def never():\n    return 1",
        test_it="def test_it():\n    import package\n    assert package.VALUE",
    )
    (project.path / "src/package/__init__.py").write_text("VALUE = 1\n")
    options = ["--cov=package", "--cov-report=json"]
    project.native(*options)
    expected = covered(project)
    assert "src/package/unused.py" in expected[0]
    project.microvm(*options)
    assert covered(project) == expected


def test_coverage_is_appended(measured):
    measured.write(test_negative="import package\ndef test_it(): assert package.sign(-1) == -1")
    expected = None
    for run in (measured.native, measured.microvm):
        run("--cov=package", "--cov-report=", "test_it.py")
        assert run("--cov=package", "--cov-append", "--cov-report=json", "test_negative.py").ret == 0
        found = covered(measured)
        assert found[1]["percent_covered"] == 100
        assert found == (expected or found)
        expected = found
        (measured.path / ".coverage").unlink()


def test_coverage_of_workers(measured):
    options = ["--cov=package", "--cov-branch", "--cov-report=json"]
    measured.native(*options)
    expected = covered(measured)
    measured.microvm("-n", "2", *options)
    assert covered(measured) == expected


def test_coverage_of_child_processes(measured):
    measured.write(
        __DOT__coveragerc="[run]\npatch = subprocess\nbranch = true",
        test_child="""
            import subprocess, sys
            def test_negative():
                code = "import package; assert package.sign(-1) == -1"
                assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        """,
    )
    options = ["--cov=package", "--cov-report=json"]
    measured.native(*options)
    expected = covered(measured)
    assert expected[1]["percent_covered"] == 100
    result = measured.microvm(*options)
    assert result.ret == 0
    assert covered(measured) == expected
    assert not list(measured.path.glob(".coverage.*"))


def test_coverage_switched_off_by_a_later_option(measured):
    result = measured.microvm("--cov=package", "--cov-fail-under=100", "--no-cov")
    assert result.ret == 0
    assert "tests coverage" not in result.stdout.str()


def test_coverage_of_a_machine_that_fails_is_missed_by_name(measured):
    measured.write(test_dies="import os\ndef test_dies(): os._exit(3)")
    result = measured.microvm("--cov=package", "--cov-report=json")
    assert result.ret == 1
    assert covered(measured)[1]["covered_lines"] == 3
    result.stdout.fnmatch_lines(["*workers failed to return coverage data*"])


def test_coverage_gate_fails_the_run(measured):
    options = ["--cov=package", "--cov-report=xml", "--cov-fail-under=90"]
    native = measured.native(*options)
    (measured.path / "coverage.xml").unlink()
    result = measured.microvm(*options)
    assert result.ret == native.ret == 1
    message = "ERROR: Coverage failure: total of 75 is less than fail-under=90"
    assert message in native.outlines
    assert message in result.outlines
    assert 'line-rate="0.75"' in (measured.path / "coverage.xml").read_text()


def test_hooks_at_the_end_run_once(project):
    project.write(
        conftest="""
            from pathlib import Path
            seen = []
            def pytest_runtest_logreport(report):
                if report.when == "call":
                    seen.append(report.outcome)
            def pytest_sessionfinish(session, exitstatus):
                print("finished with", int(exitstatus), session.testscollected)
            def pytest_terminal_summary(terminalreporter):
                terminalreporter.section("OUR SUMMARY")
                terminalreporter.line(" ".join(seen))
            def pytest_report_teststatus(report):
                if report.passed and report.when == "call":
                    return "passed", "P", "YES"
        """,
        test_it="""
            def test_one(): pass
            def test_two(): assert 0
            def test_three(): pass
        """,
    )
    for options in ([], ["-x"], ["-v"]):
        shown = []
        for result in (project.native(*options), project.microvm(*options)):
            assert result.ret == 1
            lines = [
                line for line in result.outlines if line.startswith(("test_it", "finished with", "passed"))
            ]
            shown.append([line for line in lines if "FAILED" not in line])
        assert shown[0] == shown[1]


def test_exit_status_of_a_hook(project):
    project.write(
        conftest="def pytest_sessionfinish(session): session.exitstatus = 7",
        test_it="def test_it(): pass",
    )
    assert project.native().ret == project.microvm().ret == 7


@pytest.mark.parametrize("options", [["--no-summary"], ["-p", "no:terminal"]])
def test_run_without_a_summary(project, options):
    project.write(conftest="def pytest_sessionfinish(): print('finished')", test_it="def test_it(): pass")
    native, result = project.native(*options), project.microvm(*options)
    assert native.ret == result.ret == 0
    assert native.stdout.str().count("finished") == result.stdout.str().count("finished") == 1


def test_hook_does_not_make_a_failed_run_green(project):
    project.write(
        conftest="def pytest_sessionfinish(session): session.exitstatus = 0",
        test_it="def test_it(): assert 0",
    )
    assert project.microvm().ret == 1


def test_hook_that_fails_fails_the_run(project):
    project.write(
        conftest="def pytest_sessionfinish(session): raise RuntimeError('no report')",
        test_it="def test_it(): pass",
    )
    result = project.microvm()
    assert result.ret != 0
    assert "no report" in result.stdout.str()


def test_plugins_exchange_data_as_with_xdist(project):
    project.write(
        conftest="""
            import socket
            server = socket.create_server(("127.0.0.1", 0))
            outputs = []
            def pytest_configure_node(node):
                node.workerinput["port"] = server.getsockname()[1]
            def pytest_sessionfinish(session):
                if hasattr(session.config, "workeroutput"):
                    session.config.workeroutput["ran"] = (b"bytes", {1: {"a"}}, session.config.ran)
            def pytest_testnodedown(node, error):
                outputs.append(node.workeroutput["ran"])
            def pytest_terminal_summary(terminalreporter):
                terminalreporter.line(f"OUTPUTS {sorted(outputs)}")
        """,
        test_it="""
            import pytest
            @pytest.mark.parametrize("number", [1, 2])
            def test_it(number, pytestconfig):
                assert pytestconfig.workerinput["port"] > 0
                assert pytestconfig.workerinput["workerid"] == "gw0"
                pytestconfig.ran = number
        """,
    )
    result = project.microvm()
    result.assert_outcomes(passed=2)
    assert "OUTPUTS [(b'bytes', {1: {'a'}}, 1), (b'bytes', {1: {'a'}}, 2)]" in result.outlines


def test_machine_that_ended_has_no_output(measured):
    measured.write(test_dies="import os\ndef test_dies(): os._exit(3)")
    result = measured.microvm("--cov=package", "--cov-report=term")
    result.assert_outcomes(passed=2, failed=1)
    assert "The following workers failed to return coverage data" in result.stdout.str()


@only_locally
def test_file_that_is_no_report_is_named(project):
    project.write(
        conftest="def pytest_sessionfinish(): open('left.txt', 'w').write('x')",
        test_it="def test_it(): pass",
    )
    result = project.microvm()
    result.stdout.fnmatch_lines(
        ["microvm: written by tests and gone with their machines: 1 file (left.txt); *"]
    )


def test_coverage_where_files_come_back_too(measured):
    options = ["--cov=package", "--cov-report=json"]
    measured.native(*options)
    expected = covered(measured)
    result = measured.microvm("--microvm-write-back=*.txt", *options)
    assert result.ret == 0
    assert covered(measured) == expected


@pytest.mark.parametrize("options", [[], ["--cov=lib"], ["--microvm-isolation=session"]])
def test_hooks_at_the_end_see_errors_of_the_collection(project, options):
    project.write(
        conftest="""
            def pytest_sessionfinish(session, exitstatus):
                print("\\nFINISH", int(exitstatus), session.testscollected, session.testsfailed)

            def pytest_terminal_summary(terminalreporter):
                counts = {name: len(found) for name, found in terminalreporter.stats.items() if name}
                terminalreporter.write_line(f"SUMMARY {counts}")
        """,
        lib="VALUE = 1",
        test_fine="def test_it(): pass",
        test_broken="import no_such_module",
    )
    project.assert_same(*options)


def test_hooks_at_the_end_see_errors_of_a_collection_that_went_on(project):
    project.write(
        conftest="""
            def pytest_sessionfinish(session, exitstatus):
                print("\\nFINISH", int(exitstatus), session.testscollected, session.testsfailed)
        """,
        test_fine="def test_it(): pass",
        test_broken="import no_such_module",
    )
    for run in (project.native, project.microvm):
        done = run("--continue-on-collection-errors")
        assert done.ret == 1
        done.stdout.fnmatch_lines("FINISH 1 1 1")


HOOKS_THAT_SEE_THE_COURSE = """
    def pytest_sessionfinish(session, exitstatus):
        print("\\nFINISH", int(exitstatus), session.testscollected, session.testsfailed, session.shouldfail)

    def pytest_terminal_summary(terminalreporter, exitstatus):
        counts = {name: len(found) for name, found in terminalreporter.stats.items() if name}
        terminalreporter.write_line(f"SUMMARY {int(exitstatus)} {counts}")
"""


@pytest.mark.parametrize(
    "more", [[], ["--cov=lib"], ["--microvm-isolation=session"]], ids=["test", "coverage", "session"]
)
@pytest.mark.parametrize("limit", ["-x", "--maxfail=2", "--maxfail=3"])
def test_hooks_at_the_end_of_a_collection_that_was_stopped(project, limit, more):
    """The third error is the last file's: pytest interrupts the run instead."""
    project.write(
        conftest=HOOKS_THAT_SEE_THE_COURSE,
        lib="VALUE = 1",
        test_a="import no_such_module",
        test_b="def test_it(): pass",
        test_c="import no_such_module",
        test_d="import no_such_module",
    )
    result = project.assert_same(limit, *more)
    result.stdout.fnmatch_lines(["FINISH *", "SUMMARY *"])


@pytest.mark.parametrize("more", [[], ["--microvm-isolation=session"]], ids=["test", "session"])
def test_hooks_at_the_end_of_tests_that_were_stopped(project, more):
    project.write(
        conftest=HOOKS_THAT_SEE_THE_COURSE,
        test_it="def test_a(): assert 0\ndef test_b(): pass",
    )
    for result in (project.native("-x"), project.microvm("-x", *more)):
        assert result.ret == 1
        result.stdout.fnmatch_lines(["FINISH 1 2 1 stopping after 1 failures", "SUMMARY 1 {'failed': 1}"])
        assert result.stdout.str().count("!! stopping after 1 failures !!") == 1


@pytest.mark.parametrize("options", [["-x"], []], ids=["stopped", "whole"])
@pytest.mark.parametrize("broken", ["import no_such_module", "def test_a(): assert 0"], ids=["file", "test"])
def test_hooks_at_the_end_of_a_run_of_workers(project, broken, options):
    project.write(conftest=HOOKS_THAT_SEE_THE_COURSE, test_a=broken, test_b="def test_b(): pass")
    seen = []
    for run in (project.native, project.microvm):
        result = run("-n1", *options)
        lines = [line for line in result.outlines if line.startswith(("FINISH", "SUMMARY"))]
        seen.append((result.ret, lines, result.stdout.str().count("stopping after 1 failures")))
    assert seen[0] == seen[1]


def test_section_of_a_hook_after_a_stop(project):
    """The host says that the run was stopped; other lines of the kind are the hook's."""
    project.write(
        conftest="""
            def pytest_terminal_summary(terminalreporter):
                terminalreporter.write_sep("!", title="mine", red=True)
                terminalreporter.write_sep("=", "also mine")
        """,
        test_a="import no_such_module",
        test_b="def test_it(): pass",
    )
    project.assert_same("-x")
