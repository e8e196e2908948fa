"""The debugger runs where the test is, on the terminal of this computer."""

import sys

import pytest

from support.comparison import TESTS, only_locally
from support.debugging import SUITE, debug
from support.terminal import OnTerminal

pytestmark = only_locally
BACKEND = ["--microvm", "-p", "support.local.backend"]


@pytest.fixture
def suite(project):
    project.write(test_it=SUITE)
    return project


@pytest.mark.parametrize("options", [[], BACKEND], ids=["native", "machines"])
def test_session_at_a_terminal(suite, options):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pdb", *options]
    with OnTerminal(command, variables={"PYTHONPATH": str(TESTS)}) as terminal:
        debug(terminal)


def test_end_of_input_quits(suite):
    results = [run("--pdb", "-k", "fails") for run in (suite.native, suite.microvm)]
    for result in results:
        assert result.ret == 2
        result.stdout.fnmatch_lines(["*PDB post_mortem*", "*Exit: Quitting debugger*"])


@pytest.mark.parametrize("colour", ["yes", "no"])
def test_failure_has_the_native_colours(suite, colour):
    shown = []
    for run in (suite.native, suite.microvm):
        lines = run("--pdb", "-k", "fails", f"--color={colour}").outlines
        begin = next(number for number, line in enumerate(lines) if ">> traceback >>" in line)
        end = next(number for number, line in enumerate(lines) if ">> entering PDB >>" in line)
        shown.append(lines[begin : end + 1])
    assert shown[0] == shown[1]
    assert ("\x1b[" in "".join(shown[0])) == (colour == "yes")


def test_trace_stops_at_the_first_line(suite):
    for run in (suite.native, suite.microvm):
        result = run("--trace", "-k", "fails")
        result.stdout.fnmatch_lines(["*PDB runcall*", '-> wanted = "w" * 3'])


def test_no_test_takes_the_terminal_by_itself(suite):
    result = suite.microvm("-k", "breakpoint")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["*bdb.BdbQuit", "*Debugger*", "to debug in this terminal: pytest --microvm --pdb"]
    )


def test_machine_that_asks_for_the_terminal_is_ended(project):
    project.write(
        test_it="""
            def test_asks(pytestconfig):
                plugins = pytestconfig.pluginmanager.get_plugins()
                (plugin,) = [each for each in plugins if type(each).__name__ == "_SessionPlugin"]
                plugin._records.append({"k": "debug", "socket": "/tmp/x"})
        """
    )
    result = project.microvm()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*sent a request for the terminal*"])


def test_project_cannot_lend_the_terminal(project):
    project.write(pytest__DOT__ini="[pytest]\naddopts = --pdb", test_it="def test_it(): pass")
    result = project.microvm()
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*addopts*--pdb*"])
