"""Wide fixtures that are set up once and forked for each test: as natively, and isolated."""

import json
import re

import pytest

from support.comparison import ENTRIES

CONFTEST = """
    import logging
    import warnings

    import pytest

    @pytest.fixture(scope="session")
    def base():
        print("base up")
        logging.getLogger("base").warning("base logs")
        warnings.warn("base warns")
        yield {"base": 1}
        print("base down")

    @pytest.fixture(scope="session", params=["one", "two"])
    def chosen(request, base):
        print("chosen", request.param)
        yield request.param
        print("not chosen", request.param)

    @pytest.fixture(scope="session")
    def late():
        print("late up")
        yield "late"
        print("late down")

    @pytest.fixture(scope="session")
    def lost():
        raise LookupError("no database")

    @pytest.fixture(scope="module")
    def missing():
        pytest.skip("no server")
"""

FIRST = """
    import unittest

    import pytest

    def setup_module():
        print("module up")

    def teardown_module():
        print("module down")

    @pytest.fixture(scope="module")
    def word(base):
        yield "word"
        print("word down")
        raise OSError("word is stuck")

    def test_base(base): assert base == {"base": 1}
    def test_word(word): assert word == "word"
    def test_fails(word, base): assert word == "other"
    def test_chosen(chosen, word): assert chosen == "one"
    def test_lost(lost): pass
    def test_lost_again(lost, base): pass
    def test_missing(missing): pass
    @pytest.mark.skip(reason="never")
    def test_skipped(late): pass
    @pytest.mark.xfail(reason="known")
    def test_xfail(lost): pass
    def test_dynamic(request): assert request.getfixturevalue("late") == "late"
    @pytest.mark.usefixtures("late")
    def test_used(): pass
    def test_none(): pass
    def test_word_again(word): pass

    class TestClass:
        @pytest.fixture(scope="class", autouse=True)
        def room(self, request, base):
            request.cls.room = "room"
            yield
            raise RuntimeError("room is locked")
        def test_room(self): assert self.room == "room"
        def test_room_again(self): assert self.room == "room"

    class TestPlain:
        @classmethod
        def setup_class(cls): cls.value = 1
        def test_value(self): assert self.value == 1

    class TestUnit(unittest.TestCase):
        @classmethod
        def setUpClass(cls): cls.value = 1
        @classmethod
        def tearDownClass(cls): print("class down")
        def setUp(self): self.own = 2
        def test_value(self): assert (self.value, self.own) == (1, 2)
        def test_fails(self): self.assertEqual(self.value, 3)
"""

SECOND = """
    import pytest

    @pytest.fixture(scope="module", autouse=True)
    def around(base):
        yield
        print("around down")

    @pytest.fixture(scope="session")
    def late(late): return late + "r"

    def test_chosen(chosen): assert chosen in ("one", "two")
    def test_late(late): assert late == "later"
    def test_last(base): pass
"""


@pytest.fixture
def suite(project):
    project.write(conftest=CONFTEST, test_first=FIRST, sub____init__="", sub__test_second=SECOND)
    return project


PURE = [f"--microvm-pure-fixtures={name}" for name in ("base", "chosen", "late", "lost")]


@pytest.mark.parametrize(
    "arguments",
    [["-v"], ["-rA"], ["-q", "--tb=short"], ["-k", "late or room or chosen"], ["-s", "-v"]],
)
@pytest.mark.parametrize("pure", [[], PURE], ids=["", "pure"])
def test_shown_as_natively(suite, arguments, pure):
    suite.assert_same("--microvm-fixtures=fork", *pure, *arguments)


@pytest.mark.parametrize("pure", [[], ["--microvm-pure-fixtures=base"]], ids=["", "pure"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_set_up_and_torn_down_once_in_order(suite, entry, pure):
    """What the fixtures of the suite print goes to a file, which is the native one."""
    for name in ("conftest.py", "test_first.py", "sub/test_second.py"):
        path = suite.path / name
        lines = 'def print(*words):\n    with open("log", "a") as file:\n        file.write(f"{words}\\n")\n'
        path.write_text(lines + path.read_text())
    suite.native()
    native = (suite.path / "log").read_text()
    (suite.path / "log").unlink()
    suite.microvm("--microvm-fixtures=fork", "--microvm-write-back=log", *pure)
    assert (suite.path / "log").read_text() == native
    assert native.count("base up") == native.count("base down") == 1


def properties(path):
    """Return the property ``microvm.fork_of`` of each test of a JUnit file."""
    text = path.read_text()
    found = {}
    for case in re.findall(r"<testcase.*?</testcase>|<testcase[^>]*/>", text, re.DOTALL):
        name = re.search(r' name="([^"]*)"', case)[1]
        fork = re.search(r'name="microvm.fork_of" value="([^"]*)"', case)
        found[name] = fork and fork[1]
    return found


def test_nothing_reaches_another_test(project):
    project.write(
        test_it="""
            import pytest

            @pytest.fixture(scope="module")
            def rows(): return []

            @pytest.mark.parametrize("number", range(4))
            def test_adds(rows, number):
                rows.append(number)
                assert len(rows) == 1

            def test_needs_none(): pass
        """
    )
    done = project.microvm("--microvm-fixtures=fork", "--junitxml=out.xml")
    done.assert_outcomes(passed=5)
    done.stdout.fnmatch_lines("microvm: 5 tests in 5 machines (4 forks with fixtures that stood)*")
    forks = properties(project.path / "out.xml")
    assert forks.pop("test_needs_none") is None
    assert len(set(forks.values())) == 1
    assert None not in forks.values()


def slow(project, seconds, tests):
    project.write(
        test_it=f"""
            import os
            import time
            import pytest

            @pytest.fixture(scope="module")
            def quick(): return os.getpid()

            @pytest.fixture(scope="module")
            def slow(quick):
                time.sleep({seconds})
                return os.getpid()

            @pytest.fixture(scope="class", autouse=True)
            def after(request): yield

            @pytest.mark.parametrize("number", range({tests}))
            def test_it(slow, number): print("pid", slow)
        """
    )


def pids(done):
    return re.findall(r"^pid (\d+)$", done.stdout.str(), re.MULTILINE)


def test_auto_forks_what_was_slow(project):
    """The first test measures; all others share one set-up, and the next run's share it from the begin."""
    slow(project, 0.8, 8)
    done = project.microvm("-rA")
    done.assert_outcomes(passed=8)
    assert len(set(pids(done))) == 2
    known = json.loads((project.path / ".pytest_cache/v/microvm/fixtures").read_text())
    assert known["module test_it.py slow"] >= 0.8
    assert len(set(pids(project.microvm("-rA")))) == 1


def test_auto_repeats_what_is_quick(project):
    slow(project, 0, 4)
    done = project.microvm("-rA")
    assert len(set(pids(done))) == 4


def test_repeat_is_an_option(project):
    slow(project, 0.3, 4)
    done = project.microvm("-rA", "--microvm-fixtures=repeat")
    assert len(set(pids(done))) == 4


def test_for_the_debugger_each_machine_sets_up_its_own(project):
    slow(project, 0, 3)
    done = project.microvm("-rA", "--microvm-fixtures=fork", "--pdb")
    assert len(set(pids(done))) == 3


def test_with_xdist_each_worker_has_one(project):
    pytest.importorskip("xdist")
    slow(project, 0, 6)
    done = project.microvm("-rA", "--microvm-fixtures=fork", "-n2", "--dist=load")
    done.assert_outcomes(passed=6)
    assert len(set(pids(done))) == 2


def test_stopped_early(project):
    """What stands is torn down when the run stops; a failure of that is told."""
    project.write(
        test_it="""
            import pytest

            @pytest.fixture(scope="session")
            def base():
                yield
                open("torn", "a").write("x")
                raise OSError("stuck")

            def test_fails(base): assert 0
            def test_other(base): pass
        """
    )
    done = project.microvm("-x", "--microvm-fixtures=fork", "--microvm-write-back=torn")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines("*test_fails: fixtures failed to tear down after the run was stopped")
    assert (project.path / "torn").read_text() == "x"


def test_a_set_up_that_ends_its_machine(project):
    project.write(
        test_it="""
            import os
            import pytest

            @pytest.fixture(scope="session")
            def base(): os._exit(3)

            def test_one(base): pass
            def test_two(base): pass
            def test_fine(): pass
        """
    )
    done = project.microvm("--microvm-fixtures=fork", "-v")
    done.stdout.fnmatch_lines(["*::test_one CRASHED*", "*::test_two CRASHED*", "*::test_fine PASSED*"])


def test_a_tear_down_that_ends_its_machine(project):
    project.write(
        test_a="""
            import os
            import pytest

            @pytest.fixture(scope="module")
            def base():
                yield
                os._exit(3)

            def test_one(base): pass
        """,
        test_b="def test_two(): pass",
    )
    done = project.microvm("--microvm-fixtures=fork", "-v")
    done.assert_outcomes(passed=2, errors=1)
    done.stdout.fnmatch_lines("*the machine of the fixtures*ended*")


def test_a_set_up_that_takes_too_long(project):
    slow(project, 60, 1)
    done = project.microvm("--microvm-fixtures=fork", "--microvm-timeout=2", "-v")
    done.stdout.fnmatch_lines("*QUOTA*")


def test_exit_in_a_set_up(project):
    project.write(
        test_it="""
            import pytest

            @pytest.fixture(scope="session")
            def base(): pytest.exit("enough", 7)

            def test_one(base): pass
            def test_two(base): pass
        """
    )
    project.assert_same("--microvm-fixtures=fork")


def test_coverage_counts_set_ups_and_tear_downs(project):
    project.write(
        lib="""
            def up():
                return 1

            def down():
                return 2

            def never():
                return 3
        """,
        test_it="""
            import lib
            import pytest

            @pytest.fixture(scope="module")
            def base():
                lib.up()
                yield
                lib.down()

            @pytest.mark.parametrize("number", range(3))
            def test_it(base, number): pass
        """,
    )
    done = project.microvm("--microvm-fixtures=fork", "--cov=lib", "--cov-report=term-missing")
    done.stdout.fnmatch_lines("lib.py * 6 * 1 * 83% * 8")
    native = project.native("--cov=lib", "--cov-report=term-missing")
    native.stdout.fnmatch_lines("lib.py * 6 * 1 * 83% * 8")


def test_what_fixtures_write_comes_back(project):
    project.write(
        test_it="""
            from pathlib import Path
            import pytest

            @pytest.fixture(scope="module")
            def base():
                Path("up.txt").write_text("up")
                yield
                Path("down.txt").write_text(Path("log.txt").read_text())

            @pytest.mark.parametrize("number", range(3))
            def test_it(base, number):
                with open("log.txt", "a") as file:
                    file.write(str(number))
        """
    )
    done = project.microvm("--microvm-fixtures=fork", "--microvm-write-back=*.txt")
    done.assert_outcomes(passed=3)
    assert (project.path / "up.txt").read_text() == "up"


FLAKY = """
    import os
    import pytest

    @pytest.fixture(scope="module")
    def counted(): return os.getpid()

    def test_flaky(counted):
        number = os.urandom(1)[0] % 8
        if number < 2:
            print("the queue is empty")
        assert number >= 2

    def test_fine(): pass
"""


@pytest.mark.parametrize("options", [[], ["-n2"], ["--microvm-fixtures=fork"]])
def test_repeat_tells_what_differs(project, options):
    """Of 60 runs with a chance of a quarter, none or all fail once in 10^7 times; they fail in two ways."""
    project.write(test_it=FLAKY)
    done = project.microvm("--microvm-repeat=60", "--tb=no", *options)
    text = done.stdout.str()
    runs = re.search(r"microvm: test_it.py::test_flaky: 60 runs: (\d+) passed \(.*\), (\d+) failed", text)
    assert runs
    assert int(runs[1]) + int(runs[2]) == 60
    done.stdout.fnmatch_lines(
        [
            "  * failed in * s (median): assert [01] >= 2 (line *)",
            "      only these print: the queue is empty",
            "microvm: test_it.py::test_fine: 60 runs: 60 passed (100 %)",
            "microvm: 2 tests in 120 machines*",
        ]
    )


def test_repeat_needs_a_machine_for_each_run(project):
    project.write(test_it="def test(): pass")
    done = project.microvm("--microvm-repeat=2", "--microvm-isolation=module")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines("*repeat needs a machine for each run of a test, but isolation is module")
