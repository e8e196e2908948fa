"""A run with ``--microvm`` shows what a native run shows, line by line."""

import pytest

from support.comparison import ENTRIES
from support.tiers import by_turns, thorough_but


@pytest.fixture(params=thorough_but(ENTRIES, ENTRIES[0]))
def entry(request):
    return request.param


SUITE = """
    import logging
    import sys
    import unittest
    import warnings

    import pytest

    def test_passes(): pass

    def test_fails():
        print("printed")
        print("to stderr", file=sys.stderr)
        logging.getLogger("here").warning("logged")
        left = {"a": 1, "b": [1, 2, 3]}
        assert left == {"a": 1, "b": [1, 2, 4]}

    def helper(value):
        raise ValueError(f"bad {value}")

    def test_raises():
        try:
            helper(1)
        except ValueError as error:
            raise KeyError("wrapped") from error

    @pytest.mark.parametrize("number", [1, 2, pytest.param(3, marks=pytest.mark.slow(level=2), id="three")])
    def test_parametrized(number, module_value):
        assert number != 2

    @pytest.fixture(scope="module")
    def module_value():
        yield 1

    @pytest.fixture
    def broken(): raise RuntimeError("in setup")

    @pytest.fixture
    def broken_later():
        yield
        raise RuntimeError("in teardown")

    def test_setup(broken): pass
    def test_teardown(broken_later): pass
    def test_both(broken_later): assert 0
    def test_skip(): pytest.skip("not now")
    @pytest.mark.skipif(True, reason="never")
    def test_skipped(): pass
    @pytest.mark.xfail(reason="known")
    def test_xfail(): assert 0
    @pytest.mark.xfail
    def test_xpass(): pass
    @pytest.mark.xfail(strict=True)
    def test_strict(): pass
    def test_import(): pytest.importorskip("no_such_module")
    def test_warns(): warnings.warn("careful")

    class MyWarning(UserWarning): pass
    def test_own_warning(): warnings.warn(MyWarning("mine"))

    class TestClass:
        "Documented."
        @pytest.fixture(autouse=True)
        def prepared(self): self.value = 1
        def test_method(self):
            "What it does."
            assert self.value == 1
        class TestInner:
            def test_deep(self): assert "a" in "bcd"

    class TestCase(unittest.TestCase):
        def setUp(self): self.value = 1
        def test_unit(self): self.assertEqual(self.value, 2)
        @unittest.skip("old")
        def test_old(self): pass

    def test_subtests(subtests):
        for number in range(3):
            with subtests.test("part", number=number):
                assert number != 2

    def test_exit_code_is_no_end(): sys.exit(3)
    def test_group():
        raise ExceptionGroup("several", [ValueError(1), TypeError(2)])
"""


@pytest.fixture
def suite(project):
    project.write(
        pytest__DOT__ini="[pytest]\nmarkers =\n    slow: takes long\n",
        test_suite=SUITE,
        sub__conftest="""
            import pytest
            @pytest.fixture(scope="session")
            def word(): return "sub"
        """,
        sub__test_below="def test_word(word): assert word == 'sub'\ndef test_missing(no_such_fixture): pass",
        package____init__="",
        package__test_inside="""
            '''>>> 1 + 1
            3
            '''
            def test_inside():
                long = "x" * 300
                assert long == "y"
        """,
    )
    return project


OPTIONS = [
    [],
    ["-v"],
    ["-vv", "-rA"],
    ["-q"],
    ["-qq"],
    ["--tb=short", "-l"],
    ["--tb=line", "--no-header"],
    ["--tb=native", "--show-capture=no"],
    ["--tb=no", "-ra", "--no-summary"],
    ["-x"],
    ["--maxfail=3"],
    ["-k", "parametrized or inside"],
    ["-m", "slow"],
    ["-m", "slow(level=2) and not slow(level=3)"],
    ["-k", "not test_suite", "-v"],
    ["--deselect", "test_suite.py::test_fails", "-q"],
    ["--collect-only"],
    ["--collect-only", "-q"],
    ["--collect-only", "-v"],
    ["--collect-only", "-qq"],
    ["--co", "-m", "slow"],
    ["--doctest-modules", "package"],
    ["test_suite.py::TestClass", "test_suite.py::test_parametrized[three]"],
    ["test_suite.py::test_parametrized", "-v"],
    ["sub/test_below.py", "test_suite.py::test_passes", "sub/test_below.py"],
    ["--ignore=test_suite.py", "-rs"],
    ["--runxfail", "-k", "xfail or xpass"],
    ["-W", "error", "-k", "warn"],
    ["-p", "no:warnings", "-k", "warn"],
    ["--disable-warnings", "-k", "warn"],
    ["no_such_file.py"],
    ["test_suite.py::no_such_test"],
    ["-k", "matches_nothing"],
    ["-k", "not ("],
    ["-c", "pytest.ini", "--rootdir=.", "sub"],
    ["--import-mode=importlib", "sub", "package"],
]


@pytest.mark.parametrize(("entry", "arguments"), by_turns(ENTRIES, OPTIONS))
def test_options(suite, arguments):
    suite.assert_same(*arguments)


def test_from_a_directory_below(suite, monkeypatch):
    monkeypatch.chdir(suite.path / "sub")
    suite.assert_same("-v")


@pytest.mark.parametrize("entry", ENTRIES[:1])  # the other has a cache of its own
def test_last_failed(suite):
    def fail_first():
        (suite.path / ".pytest_cache").rename(
            suite.path.parent / f"c{len(list(suite.path.parent.iterdir()))}"
        ) if (suite.path / ".pytest_cache").exists() else None
        suite.native("-q", "-k", "not setup")

    for option in ("--lf", "--ff", "--nf"):
        suite.assert_same(option, "-v", prepare=fail_first)


@pytest.mark.parametrize("entry", ENTRIES[1:])
def test_what_failed_last_is_kept_outside_the_project(project):
    project.write(test_it="def test_good(): pass\ndef test_bad(): assert 0")
    project.microvm().assert_outcomes(passed=1, failed=1)
    project.microvm("--lf").assert_outcomes(failed=1)
    assert not (project.path / ".pytest_cache").exists()


def test_stepwise(suite):
    suite.assert_same("--sw", prepare=lambda: suite.native("--cache-clear", "--co", "-q"))


def test_collection_errors(project):
    project.write(
        test_syntax="def test_a(:\n",
        test_import="import no_such_module\ndef test_b(): pass",
        test_raises="raise RuntimeError('while importing')",
        test_skips="import pytest\npytest.skip('all of it', allow_module_level=True)",
        test_fixture="def test_c(): pass",
        test_param="import pytest\n@pytest.mark.parametrize('a,b', [1])\ndef test_d(a, b): pass",
    )
    project.assert_same()
    project.assert_same("--continue-on-collection-errors", "-rA")
    project.assert_same("-x")
    project.assert_same("--co")
    project.assert_same("test_syntax.py::test_a")


@pytest.mark.skipif(pytest.version_tuple < (9, 0), reason="older pytest has no subtests")
def test_unittest_subtests(project):
    """pytest 9.2 catches their letters with the test's output; here they are shown."""
    project.write(
        test_case="""
            import unittest
            class TestCase(unittest.TestCase):
                def test_sub(self):
                    for number in range(3):
                        with self.subTest(number=number):
                            self.assertNotEqual(number, 1)
        """
    )
    native, remote = project.native(), project.microvm()
    assert remote.ret == native.ret
    remote.stdout.fnmatch_lines(["test_case.py u.*", "SUBFAILED(number=1) test_case.py::TestCase::test_sub*"])
    remote.assert_outcomes(**native.parseoutcomes())


def test_nothing_to_collect(project):
    result = project.assert_same()
    assert result.ret == 5


def test_durations(project):
    project.write(test_slow="import time\ndef test_slow(): time.sleep(0.2)\ndef test_fast(): pass")
    result = project.microvm("--durations=1")
    result.stdout.fnmatch_lines(["*slowest 1 durations*", "0.2*s call * test_slow.py::test_slow"])


def test_hooks_of_the_project_order_and_deselect(project):
    project.write(
        conftest="""
            def pytest_collection_modifyitems(config, items):
                gone = [item for item in items if "b" in item.name]
                config.hook.pytest_deselected(items=gone)
                items[:] = [item for item in reversed(items) if item not in gone]
            def pytest_report_header(): return "from the project"
        """,
        test_letters="def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass",
    )
    native, remote = project.native("-v"), project.microvm("-v")
    assert [line for line in remote.outlines if "::" in line] == [
        line for line in native.outlines if "::" in line
    ]
    remote.stdout.fnmatch_lines(["collected 3 items / 1 deselected / 2 selected", "*2 passed, 1 deselected*"])


@pytest.fixture
def logging_suite(project):
    project.write(
        test_log="""
            import logging, threading
            import pytest
            log = logging.getLogger("own")

            @pytest.fixture
            def logged():
                log.info("in setup")
                yield
                log.warning("in teardown")

            def test_passes(logged):
                log.info("in call")
                thread = threading.Thread(target=log.error, args=("in a thread",))
                thread.start()
                thread.join()

            def test_fails():
                log.info("two\\nlines")
                assert 0

            def test_silent():
                pass
        """
    )
    return project


@pytest.mark.parametrize("entry", ENTRIES)
def test_live_logs(logging_suite):
    logging_suite.write(pytest__DOT__ini="[pytest]\nlog_cli = true\nlog_cli_level = INFO")
    result = logging_suite.assert_same("-p", "no:cacheprovider")
    assert any("live log teardown" in line for line in result.outlines)


@pytest.mark.parametrize("option", ["--log-file={}", "-o log_file={}"])
def test_log_file(logging_suite, option):
    content = {}
    for name, run in (("native", logging_suite.native), ("machines", logging_suite.microvm)):
        run(*option.format(f"{name}.log").split(), "--log-file-level=INFO", "--log-cli-level=ERROR")
        content[name] = (logging_suite.path / f"{name}.log").read_text()
    assert content["machines"] == content["native"]
    assert "in a thread" in content["native"]
