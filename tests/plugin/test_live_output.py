"""What tests print with ``-s`` and ``--capture=tee-sys``: in its place as natively, at once, made safe."""

import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from support import guards
from support.comparison import ENTRIES, only_locally
from support.tiers import by_turns

SUITE = """
    import logging
    import os
    import subprocess
    import sys
    import threading

    import pytest

    print("while collecting")
    log = logging.getLogger("own")

    @pytest.fixture
    def around():
        print("up")
        yield
        print("down")
        log.warning("logged in teardown")

    @pytest.fixture
    def broken():
        print("up to here")
        raise RuntimeError("in setup")

    @pytest.fixture
    def broken_later():
        yield
        print("down to here")
        raise RuntimeError("in teardown")

    def test_passes(around):
        print("in call")
        print("to stderr", file=sys.stderr)

    def test_no_newline(around): print("no newline", end="")
    def test_fails(around):
        print("before")
        log.error("logged")
        print("after")
        assert 0

    def test_commands():
        print("first")
        subprocess.run(["sh", "-c", "echo out; echo err >&2; echo out again"], check=True)
        os.write(1, "raw \\u20ac\\n".encode())

    def test_setup(broken): pass
    def test_teardown(broken_later): pass
    def test_both(broken_later): assert 0
    def test_skips(around):
        print("skipping")
        pytest.skip("not now")
    @pytest.mark.xfail
    def test_xfail(around):
        print("as expected")
        assert 0
    def test_capsys(capsys):
        print("captured")
        with capsys.disabled():
            print("past capturing")
        assert capsys.readouterr().out == "captured\\n"
    def test_capfd(capfd):
        os.write(1, b"captured")
        assert capfd.readouterr().out == "captured"
    def test_thread():
        thread = threading.Thread(target=print, args=["in a thread"])
        thread.start()
        thread.join()
    def test_option(pytestconfig):
        print(pytestconfig.getoption("capture"), sys.stdin.read() == "", sys.stdout.isatty())
    def test_silent(): pass

    class TestClass:
        def setup_method(self): print("setup of", self)
        def __repr__(self): return "an instance"
        def test_method(self): print("\\x1b[31mred\\x1b[0m and green")
"""

CONFTEST = """
    import pytest

    def pytest_runtest_setup(item): print("hook before", item.name)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(report):
        if report.when == "call":
            print("hook after", report.when)
"""


@pytest.fixture
def suite(project, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")  # as on a terminal, nothing native waits in a buffer
    project.write(conftest=CONFTEST, test_suite=SUITE, test_other="def test_other(): print('other file')")
    project.native = lambda *arguments: project.run(
        *("sh", "-c", 'exec "$0" "$@" 2>&1'),  # in machines both streams have one order, as on a terminal
        *(sys.executable, "-m", "pytest", "-p", "no:hypothesispytest", *arguments),
    )
    return project


OPTIONS = [
    ["-s"],
    ["-s", "-v"],
    ["-s", "-vv", "-rA", "--log-cli-level=INFO"],
    ["-s", "-q", "--tb=short", "-rP", "--maxfail=3"],
    ["-s", "--setup-show", "--microvm-isolation=session"],
    ["-s", "--collect-only"],
    ["--capture=no", "-o", "console_output_style=progress-even-when-capture-no"],
    ["--capture=no", "-o", "log_cli=true", "--microvm-isolation=module"],
    ["--capture=tee-sys"],
    ["--capture=tee-sys", "-v", "-rA", "--microvm-isolation=session"],
]


@pytest.mark.parametrize(("entry", "arguments"), by_turns(ENTRIES, OPTIONS))
def test_shown_as_natively(suite, arguments):
    suite.assert_same(*arguments, "-p", "no:cacheprovider")


@pytest.mark.parametrize("arguments", [["-s", "-v"], ["-s"], ["-s", "--log-cli-level=INFO"]])
@pytest.mark.skipif(pytest.version_tuple < (9, 0), reason="older pytest has no subtests")
def test_between_the_outcomes_of_subtests(suite, arguments):
    suite.write(
        conftest="",
        test_other="",
        test_suite="""
            import logging
            import pytest

            @pytest.fixture
            def around():
                yield
                print("down")
                logging.warning("logged in teardown")

            def test_it(subtests, around):
                for number in range(3):
                    with subtests.test("part", number=number):
                        print("part", number)
                        logging.warning("logged %d", number)
                        assert number != 1
                print("after all")
        """,
    )
    suite.assert_same(*arguments)


@pytest.mark.parametrize(
    "arguments", [["-s", "-v"], ["-s", "--log-cli-level=INFO"], ["--log-cli-level=INFO"]]
)
def test_between_the_runs_of_a_flaky_test(suite, arguments):
    suite.write(
        conftest="",
        test_other="",
        test_suite="""
            import logging
            import pytest
            tries = []

            @pytest.fixture
            def around():
                print("up")
                yield
                print("down")
                logging.warning("logged in teardown")

            @pytest.mark.flaky(reruns=2)
            def test_it(around):
                tries.append(1)
                logging.warning("try %d", len(tries))
                print("try", len(tries))
                assert len(tries) == 3
        """,
    )
    suite.assert_same(*arguments)


def test_output_of_hooks_outside_of_tests(suite):
    """Natively some of it comes before pytest's first line, when no machine has been started yet."""
    suite.write(
        conftest="""
            import sys
            print("importing conftest")
            def pytest_configure(): print("configuring", file=sys.stderr)
            def pytest_sessionstart(): print("starting")
            def pytest_collection_modifyitems(): print("modifying")
        """,
        sub__conftest="print('importing conftest below')",
        sub__test_below="print('importing test')\ndef test_below(): print('in test')",
    )
    expected = ["importing conftest", "configuring", "starting", "while collecting", "modifying"]
    for run in (suite.native, suite.microvm):
        shown = "\n".join(run("-s").outlines)
        assert all(shown.count(f"{line}\n") == 1 for line in expected), shown
        assert re.search(r"below\n(.*\n)*importing test\n(.*\n)*modifying\n(.*\n)*collected 17 items", shown)


def test_junit_has_it_where_a_native_report_has(suite):
    for capture in ("no", "tee-sys"):
        found = []
        for run in (suite.native, suite.microvm):
            run(f"--capture={capture}", "--junitxml=out.xml", "-o", "junit_logging=all")
            cases = ET.parse(suite.path / "out.xml").iter("testcase")  # noqa: S314 - written by pytest itself
            parts = ("system-out", "system-err")
            found.append({case.get("name"): [case.findtext(part) for part in parts] for case in cases})
        assert found[1] == found[0]
        assert ("in call" in str(found[0])) is (capture == "tee-sys")


def test_repeated_tests_show_it_each_time(project):
    project.write(test_it="def test_it(): print('once')")
    result = project.microvm("-s", "--microvm-repeat=3")
    result.stdout.fnmatch_lines(["test_it.py once", ".once", ".once", "."], consecutive=True)


def test_with_workers_it_is_in_the_reports(project):
    project.write(test_it="def test_good(): print('of good')\ndef test_bad():\n print('of bad')\n assert 0")
    result = project.microvm("-s", "-n2", "-rP")
    result.assert_outcomes(passed=1, failed=1)
    for line in ("of good", "of bad"):
        assert result.outlines.count(line) == 1


WAITS = """
    import pathlib, pytest

    @pytest.fixture
    def around():
        print("up", end=" ", flush=True)
        yield

    def test_it(around):
        print("running", flush=True)
        pathlib.Path({path!r}).read_bytes()
"""


@only_locally
@pytest.mark.parametrize("capture", ["no", "tee-sys"])
def test_output_is_shown_while_the_test_runs(project, capture):
    file = project.path.parent / f"{project.path.name}-go-on"
    os.mkfifo(file)
    project.write(test_it=WAITS.format(path=str(file)))
    options = ["--microvm", *project._arguments, "-p", "no:hypothesispytest"]
    command = [sys.executable, "-m", "pytest", f"--capture={capture}", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pytest_process:
        shown = []
        while not shown or "running" not in shown[-1]:  # the test waits meanwhile
            shown.append(pytest_process.stdout.readline())
        file.write_bytes(b"")
        rest, _ = pytest_process.communicate(timeout=guards.SUITE)
    assert shown[-1] == "test_it.py up running\n"
    assert "1 passed" in rest


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)", "os.abort()"])
def test_what_was_printed_before_a_crash_is_shown(project, end):
    project.write(
        test_it=f"import os\ndef test_it():\n print('last words')\n {end}\ndef test_after(): print('next')"
    )
    result = project.microvm("-s", "-v")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["test_it.py::test_it last words", "CRASHED", "*test_after next", "PASSED"])


def test_time_limit_counts_while_output_is_shown(project):
    project.write(test_it="import time\ndef test_it():\n while True:\n  print('tick')\n  time.sleep(0.01)")
    result = project.microvm("-s", "--microvm-timeout=3")
    result.stdout.fnmatch_lines(["*tick", "tick", "quota: timeout: limit 3 s, observed 3* s"])


def test_a_modules_handler_and_a_standard_stream_that_it_kept(suite):
    """They were made while pytest captured the collection."""
    suite.write(
        conftest="",
        test_other="",
        test_suite="""
            import logging, sys
            kept = sys.stdout
            log = logging.getLogger("own")
            log.addHandler(logging.StreamHandler())
            def test_it():
                log.error("by the handler")
                print("kept", file=kept)
        """,
    )
    suite.assert_same("-s", "-v")


@pytest.mark.parametrize("isolation", ["test", "session"])
def test_nothing_of_the_relay_is_seen_by_a_test(project, isolation):
    project.write(
        test_it="""
            import os, threading
            import pytest
            def test_it():
                assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
                with pytest.raises(ChildProcessError):
                    os.wait()
                os.closerange(3, 256)
                print("still shown")
            def test_forks():
                child = os.fork()
                if child == 0:
                    print("of the child", flush=True)
                    os._exit(0)
                os.waitpid(child, 0)
                print("of the parent")
        """,
    )
    result = project.microvm("-s", f"--microvm-isolation={isolation}")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        ["test_it.py still shown", ".of the child", "of the parent", "."], consecutive=True
    )


HOSTILE = r"""
    import os, sys
    def test_escapes(): print("\x1b]0;title\x07\x1b[2J\x1b[31mred")
    def test_commands(): print("::error::x\n ##vso[task.complete]y ##[error]z ##teamcity[q]", end="##")
    def test_parts():
        for part in (b"\n:", b":error::a\n#", b"#[error]b\n\x1b", b"[2Jc\n\xe2", b"\x82", b"\xac\r", b"\n"):
            os.write(1, part)
            sys.__stdout__.flush()
    def test_returns(): print("real\rfake\x08\x08\u202ekaf\u2066")
    def test_bytes(): os.write(1, bytes(range(256)))
    def test_surrogate(): print("\ud800".encode(errors="surrogatepass").decode(errors="replace"))
    def test_flood():
        for number in range(5 * 1024): print(f"{number:1023}")
    def test_after(): print("last")
"""


def test_hostile_output_is_made_safe(project):
    project.write(test_it=HOSTILE)
    result = project.microvm("-s", "-v", "--color=no", "--capture=no")
    result.assert_outcomes(passed=8)
    shown = result.stdout.str()
    assert not [line for line in shown.splitlines() if line.lstrip().startswith("::")]
    assert not re.search(r"##(\[|vso\[|teamcity\[)", shown)
    assert set(re.findall(r"\x1b[^m]*m?", shown)) == {"\x1b[31m", "\x1b[0m"}
    assert not set(shown) & set("\x00\x07\x08\x0d\x7f\x9b\u202e\u2066")
    assert "\x1b[31mred\n\x1b[0mPASSED" in shown  # no colour hides an outcome
    assert "b\n\\x1b[2Jc\n\u20ac\n" in shown
    assert sum(line.endswith(("5119", " 0")) for line in result.outlines) == 2


def test_flood_ends_at_the_quota(project):
    project.write(
        test_it="""
            import os
            def test_flood():
                while True: os.write(1, b"x" * 1000 + b"\\n")
            def test_child(): os.system("yes " + "y" * 1000)
            def test_after(): print("last")
        """
    )
    result = project.microvm("-s", "-v", "--microvm-output=1M")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["quota: output: limit 1 MiB, observed 1*"])
    assert len(result.stdout.str()) < 4 * 1024**2


def test_flood_in_a_tear_down_is_cut(project):
    """It waits for the outcome; this computer keeps no more of it than of a report."""
    project.write(
        test_it="""
            import os, pytest
            @pytest.fixture
            def flood():
                yield
                for _ in range(6 * 1024): os.write(1, b"x" * 1023 + b"\\n")
            def test_it(flood): print("called")
        """
    )
    result = project.microvm("-s", "-v")
    result.stdout.fnmatch_lines(
        ["*test_it called", "PASSED*", "[[]* more characters were cut]", "*1 passed*"]
    )


@only_locally
def test_ctrl_c_while_output_is_shown(project):
    project.write(test_it="def test_it():\n while True: print('y', flush=True)")
    options = ["--microvm", *project._arguments, "-p", "no:hypothesispytest", "-s"]
    with subprocess.Popen([sys.executable, "-m", "pytest", *options], stdout=subprocess.PIPE) as running:
        while running.stdout.readline() != b"y\n":
            pass
        os.kill(running.pid, signal.SIGINT)
        rest, _ = running.communicate(timeout=guards.SUITE)
    assert b"KeyboardInterrupt" in rest
    assert running.returncode == pytest.ExitCode.INTERRUPTED
