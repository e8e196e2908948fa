"""Whatever happens in a machine: the right outcome for that test, the reason, and the run goes on."""

import xml.etree.ElementTree as ET

import junitparser
import pytest

from support.comparison import only_locally


def written(project):
    """Return the JUnit report of the last run."""
    return ET.parse(project.path / "out.xml")  # noqa: S314 - written by pytest itself


MACHINE_ENDS = """
    import os
    def test_before(): pass
    def test_dies(): os._exit(3)
    def test_after(): pass
"""


def test_a_machine_that_ends_during_a_test(project):
    project.write(test_it=MACHINE_ENDS)
    result = project.microvm("-v")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "test_it.py::test_before PASSED *",
            "test_it.py::test_dies CRASHED *",
            "test_it.py::test_after PASSED *",
            "crashed: the machine ended",
            "*local process: no console*",
            "microvm: 3 tests in 3 machines, *, 1 crashed",
        ]
    )


@pytest.mark.parametrize("isolation", ["class", "module", "session"])
def test_a_shared_machine_that_ends_is_replaced_for_the_rest(project, isolation):
    project.write(
        test_it="""
            import os
            class TestAll:
                def test_one(self): os.environ["MARK"] = "1"
                def test_shared(self): assert os.environ["MARK"]
                def test_dies(self): os.kill(os.getpid(), 9)
                def test_fresh(self): assert "MARK" not in os.environ
        """
    )
    result = project.microvm(f"--microvm-isolation={isolation}")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["microvm: 4 tests in 2 machines, *"])


def test_a_test_that_hangs(project):
    project.write(test_it="import time\ndef test_hangs(): time.sleep(3600)\ndef test_after(): pass")
    result = project.microvm("--microvm-timeout=3")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["quota: timeout: limit 3 s, observed 3* s", "microvm: *, 1 quota"])


def test_isolation_decides_who_shares_a_machine(project):
    project.write(
        test_a="""
            import os, pytest
            seen = []
            class TestOne:
                def test_1(self): seen.append(1)
                def test_2(self): seen.append(1)
            class TestTwo:
                def test_3(self): seen.append(1)
            def test_4(): seen.append(1)
            def test_5(): seen.append(1)
            @pytest.fixture(autouse=True, scope="session")
            def once():
                yield
                print("torn down after", len(seen))
        """,
        test_b="def test_6(): pass",
    )
    machines = {}
    for isolation in ("test", "class", "module", "session"):
        result = project.microvm(f"--microvm-isolation={isolation}", "-rA")
        result.assert_outcomes(passed=6)
        (line,) = [line for line in result.outlines if line.startswith("microvm: 6 tests in")]
        torn_down = [line for line in result.outlines if line.startswith("torn down after")]
        machines[isolation] = (line.split()[4], torn_down[-1].split()[-1])
    assert machines == {"test": ("6", "1"), "class": ("5", "1"), "module": ("2", "5"), "session": ("1", "5")}


@only_locally
def test_a_session_that_ends_runs_the_projects_last_hooks(project):
    where = project.path.parent / f"{project.path.name}-finished"
    project.write(
        conftest=f"def pytest_sessionfinish(exitstatus): open({str(where)!r}, 'a').write('finished')",
        test_it="def test_it(): pass",
    )
    project.microvm("--microvm-isolation=session").assert_outcomes(passed=1)
    assert where.read_text() == "finished"


def test_no_test_can_end_a_run_as_if_all_had_passed(project):
    project.write(
        test_it="import pytest\ndef test_ends(): pytest.exit('done', returncode=0)\ndef test_b(): assert 0"
    )
    assert project.microvm().ret == pytest.ExitCode.INTERRUPTED


def test_pytest_exit_in_a_test(project):
    project.write(
        test_it="import pytest\ndef test_it(): pytest.exit('enough', returncode=9)\ndef test_b(): pass"
    )
    result = project.assert_same("-v")
    assert result.ret == 9


def test_keyboard_interrupt_in_a_test(project):
    project.write(test_it="def test_it(): raise KeyboardInterrupt\ndef test_after(): pass")
    native, remote = project.native(), project.microvm()
    assert remote.ret == native.ret == 2
    remote.stdout.fnmatch_lines(["!* KeyboardInterrupt !*", "*no tests ran*"])


def test_a_hook_that_stops_the_run(project):
    project.write(
        conftest="def pytest_runtest_teardown(item): item.session.shouldstop = 'seen enough'",
        test_it="def test_a(): pass\ndef test_b(): pass",
    )
    project.assert_same()


def test_a_broken_hook_is_one_tests_error(project):
    project.write(
        conftest="def pytest_runtest_logstart(nodeid):\n    assert 'bad' not in nodeid",
        test_it="def test_bad(): pass\ndef test_good(): pass",
    )
    result = project.microvm()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["INTERNALERROR in the guest's pytest", "*AssertionError*"])


@pytest.mark.parametrize(
    "body",
    [
        "import json; json.dumps = json.loads = json.JSONEncoder = None",
        "import os; os.write = os.read = os.getpid = None",
        "import os; os.closerange(3, 256)",
        "import os; [os.close(fd) for fd in (0, 1, 2)]",
        "import os, sys; sys.stdout = sys.stderr = sys.__stdout__ = None",
        "import os, tempfile; os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd())",
        "import os; os.environ.clear()",
        "import sys; [sys.modules.pop(name) for name in list(sys.modules) if not name.startswith('_')]",
        "import sys; sys.path[:] = []",
        "import random; random.seed = None",
        "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=False).start()",
        "import os\n    if os.fork() == 0: return\n    os.wait()",
        "import multiprocessing as m\n    pool = m.Pool(2)\n    assert pool.map(abs, [-1, 2]) == [1, 2]",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', '1'], close_fds=False, check=True)",
        "import gc; gc.disable(); gc.unfreeze()",
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.alarm(0)",
    ],
)
def test_a_rude_test_is_still_reported(project, body):
    project.write(test_it=f"def test_rude():\n    {body}\n\ndef test_after(): pass")
    for isolation in ("test", "session"):
        result = project.microvm(f"--microvm-isolation={isolation}", "--microvm-timeout=60")
        outcomes = result.parseoutcomes()
        assert outcomes.get("passed", 0) + outcomes.get("failed", 0) + outcomes.get("errors", 0) >= 2, (
            outcomes
        )
        result.stdout.no_fnmatch_line("*crashed*")
        result.stdout.no_fnmatch_line("*timeout: *")


HOSTILE = """
    import pytest
    @pytest.hookimpl(tryfirst=True, hookwrapper=True)
    def pytest_report_to_serializable(report):
        outcome = yield
        data = outcome.get_result()
        if report.when == "call" and "evil" in report.nodeid:
            {change}
            outcome.force_result(data)
"""


@pytest.mark.parametrize(
    "change",
    [
        "data['nodeid'] = 'test_it.py::test_good'",
        "data['outcome'] = 'splen did'",
        "data['when'] = 'never'",
        "data['longrepr'] = {'reprcrash': 1, 'reprtraceback': 2}",
        "data['longrepr'] = [1, 2]",
        "data['sections'] = [['one']]",
        "data['keywords'] = 3",
        "data['user_properties'] = 'x'",
        "data = []",
        "data = {'$report_type': 'CollectReport'}",
    ],
)
def test_a_report_that_is_not_one(project, change):
    project.write(
        conftest=HOSTILE.format(change=change), test_it="def test_evil(): assert 0\ndef test_good(): pass"
    )
    result = project.microvm()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["crashed: the guest's pytest sent *"])


@pytest.mark.parametrize(
    "change",
    [
        "data['toterminal'] = data['passed'] = data['_id'] = data['failed'] = data['item_index'] = 7",
        "data['duration'] = float('inf'); data['start'] = 'x'; data['stop'] = 10**400",
        "data['user_properties'] = [['microvm.outcome', 'passed'], ['own', {'deep': [1, None]}]]",
    ],
)
def test_what_a_report_may_not_say_is_dropped(project, change):
    project.write(
        conftest=HOSTILE.format(change=change), test_it="def test_evil(): assert 0\ndef test_good(): pass"
    )
    result = project.microvm("--durations=0", "--junitxml=out.xml")
    result.assert_outcomes(passed=1, failed=1)
    (evil,) = [case for case in written(project).iter("testcase") if case.get("name") == "test_evil"]
    outcomes = [p.get("value") for p in evil.iter("property") if p.get("name") == "microvm.outcome"]
    assert outcomes == ["failed"]


def test_bytes_that_are_no_protocol(project):
    project.write(
        test_it="""
            import contextlib, os
            def test_evil():
                for name in os.listdir("/proc/self/fd"):
                    if int(name) >= 900:
                        with contextlib.suppress(OSError):  # not all can be written to
                            os.write(int(name), b"\\xff" * 100)
            def test_good(): pass
        """
    )
    result = project.microvm()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["crashed: the guest broke the protocol: *"])


@only_locally  # takes minutes under emulation
def test_a_report_without_end(project):
    project.write(
        conftest=HOSTILE.format(change="data['longrepr'] = 'x' * 200_000_000"),
        test_it="def test_evil(): assert 0\ndef test_good(): pass",
    )
    result = project.microvm()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["quota: output: limit 64 MiB, observed 128* MiB"])


def test_much_output_is_shown(project):
    project.write(test_it="def test_much():\n    print('line\\n' * 1_000_000)\n    assert 0")
    result = project.microvm("-rN")
    result.assert_outcomes(failed=1)
    assert "[1000001 more characters were cut]" in result.outlines
    assert result.outlines.count("line") == 800_000


def test_text_cannot_command_the_terminal_or_ci(project):
    project.write(
        test_it=r"""
            import pytest
            @pytest.mark.parametrize("value", ["\x1b]0;title\x07", "::error::x"])
            def test_text(value):
                print("::set-output name=x::y")
                print("  ##[command]x")
                print("\x1b[31mred\x1b[0m \x1b[2J \x07 \x9b1m \u202e")
                raise ValueError("\x1b]52;c;AAAA\x07")
        """
    )
    result = project.microvm("-v", "-s")
    result.assert_outcomes(failed=2)
    text = "\n".join(result.outlines)
    assert not set(text) & set("\x07\x9b\u202e")
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text
    assert "\x1b[31mred\x1b[0m" in text
    assert not [line for line in result.outlines if line.lstrip().startswith(("::", "##["))]


def test_junit_properties(project):
    project.write(
        test_it="""
            def test_passes(record_property): record_property("own", "value")
            def test_fails(): assert 0
            def test_dies():
                import os
                os._exit(1)
        """
    )
    for family in ("xunit1", "xunit2"):
        project.microvm("--junitxml=out.xml", "-o", f"junit_family={family}")
        suite = next(iter(junitparser.JUnitXml.fromfile(str(project.path / "out.xml"))))
        shared = {item.name: item.value for item in suite.properties()}
        assert set(shared) == {
            *("microvm.image", "microvm.image_digest", "microvm.accelerator", "microvm.accelerator_reason"),
            "microvm.isolation",
        }
        assert (suite.tests, suite.failures) == (3, 2)
        cases = {case.name: {p.name: p.value for p in case.child(junitparser.Properties)} for case in suite}
        assert set(cases["test_fails"]) == {
            *(
                "microvm.image",
                "microvm.image_digest",
                "microvm.accelerator",
                "microvm.id",
                "microvm.ready_ms",
            ),
            *("microvm.cpus", "microvm.memory", "microvm.peak_memory_bytes", "microvm.cpu_seconds"),
            *("microvm.disk_bytes", "microvm.channel_bytes"),
            "microvm.outcome",
        }
        outcomes = {name: properties["microvm.outcome"] for name, properties in cases.items()}
        assert outcomes == {"test_passes": "passed", "test_fails": "failed", "test_dies": "crashed"}
        assert cases["test_passes"]["own"] == "value"


@pytest.mark.parametrize(
    "options", [["-n", "2"], ["-n", "2", "--dist=loadscope"], ["-n", "2", "--dist=worksteal"]]
)
def test_xdist(project, options):
    project.write(
        test_a="""
            import pytest, warnings
            class Mine(UserWarning): pass
            @pytest.mark.parametrize("n", range(6))
            def test_n(n): assert n != 3
            def test_warns(): warnings.warn(Mine("foreign"))
            def test_skip(): pytest.skip("no")
        """,
        test_b="import os\ndef test_dies(): os._exit(1)\ndef test_b(): pass",
    )
    result = project.microvm(*options, "--junitxml=out.xml")
    result.assert_outcomes(passed=7, failed=2, skipped=1, warnings=1)
    result.stdout.fnmatch_lines(["*Mine: foreign", "microvm: 10 tests in 10 machines, *, 1 crashed"])
    suite = next(iter(junitparser.JUnitXml.fromfile(str(project.path / "out.xml"))))
    assert suite.tests == 10


@only_locally  # the printing plug-in lies beside the local backend
def test_machine_hooks_are_called_in_order(project):
    project.write(test_it=MACHINE_ENDS)
    result = project.microvm("-p", "support.hook_printer", "-q")
    told = [line.split()[1:] for line in result.outlines if line.startswith("told: ")]
    assert told == [
        *(["started", "main-1", "test_it.py::test_before"], ["stopped", "main-1"], ["passed", "main-1"]),
        *(["started", "main-2", "test_it.py::test_dies"], ["stopped", "main-2"], ["crashed", "main-2"]),
        *(["started", "main-3", "test_it.py::test_after"], ["stopped", "main-3"], ["passed", "main-3"]),
    ]


def test_random_numbers_differ_between_machines(project):
    project.write(
        test_it="""
            import random
            def test_a(record_property): record_property("number", random.random())
            def test_b(record_property): record_property("number", random.random())
        """
    )
    project.microvm("--junitxml=out.xml").assert_outcomes(passed=2)
    numbers = [p.get("value") for p in written(project).iter("property") if p.get("name") == "number"]
    assert len(set(numbers)) == 2


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("disk='256M'", "disk cannot be set for one test with --microvm"),
        ("memory='256M'", "set it for all tests with --microvm-memory"),
        ("disc='256M'", "disc"),
    ],
)
def test_a_marker_that_cannot_hold_for_one_test(project, key, said):
    project.write(test_it=f"import pytest\n\n@pytest.mark.microvm({key})\ndef test_it():\n    pass")
    result = project.microvm()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert said in result.stdout.str() + result.stderr.str()
    result.assert_outcomes()
