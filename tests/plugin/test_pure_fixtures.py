"""Session fixtures that are called pure: set up once, in a state that could be kept, and as natively."""

import re

import pytest

CONFTEST = """
    import os
    import warnings
    import pytest

    class Database:
        def __init__(self): self.drawn = os.urandom(8).hex()
        def __repr__(self): return "Database"

    @pytest.fixture(scope="session")
    def other():
        print("other up")
        yield
        print("other down")

    @pytest.fixture(scope="session")
    def database():
        print("database up")
        warnings.warn("database warns")
        yield Database()
        print("database down")

    @pytest.fixture(scope="session")
    def app(database):
        print("app up")
        yield database
        print("app down")

    @pytest.fixture(scope="session", params=["one", "two"])
    def server(request):
        print("server up", request.param)
        yield request.param
        print("server down")

    @pytest.fixture(scope="module")
    def rows():
        print("rows up")
        yield []
        print("rows down")

    @pytest.fixture(scope="session")
    def broken(database):
        print("broken up")
        raise LookupError("no schema")
"""

PURE = [f"--microvm-pure-fixtures={name}" for name in ("database", "app", "server")]


@pytest.fixture
def suite(project):
    project.write(conftest=CONFTEST)
    return project


def databases(done):
    """Return the different databases that tests printed."""
    return set(re.findall(r"^value (\w+)$", done.stdout.str(), re.MULTILINE))


@pytest.mark.parametrize(("mode", "show"), [("auto", "-v"), ("fork", "-v"), ("fork", "-rA")])
def test_shown_as_natively(suite, mode, show):
    """Fixtures that stand are not set up again for tests that need more of them, or others."""
    suite.write(
        test_a="def test_a(database): pass\ndef test_again(database): pass",
        test_b="def test_b(app): assert 0\ndef test_without(): pass",
        test_c="def test_c(database, rows): pass",
        test_d="def test_d(server, app, rows): pass",
        test_e="def test_e(other, database): pass",
    )
    suite.assert_same(show, *PURE, f"--microvm-fixtures={mode}")


def test_one_set_up_for_all(suite):
    suite.write(
        test_a="def test_a(database): print('value', database.drawn)",
        test_b="def test_b(app): print('value', app.drawn)",
        test_c="def test_c(database, rows): print('value', database.drawn)",
    )
    done = suite.microvm("-rP", *PURE)
    done.stdout.fnmatch_lines("microvm: 3 tests in 3 machines (3 forks with fixtures that stood), *")
    assert len(databases(done)) == 1
    assert done.outlines.count("database up") == done.outlines.count("database down") == 1


def test_quick_fixture_in_front_is_set_up_in_the_fork(suite):
    """The slow one behind it stands already: neither has to be set up once for all."""
    suite.write(
        test_a="""
            import time
            import pytest

            @pytest.fixture(scope="session")
            def slow(database): time.sleep(0.5)

            @pytest.mark.parametrize("number", range(8))
            def test_a(slow, database, number): print("value", database.drawn)

            @pytest.mark.parametrize("number", range(8))
            def test_b(other, slow, database, number): print("value", database.drawn)
        """
    )
    done = suite.microvm("-rP", "--microvm-pure-fixtures=slow")
    done.stdout.fnmatch_lines("microvm: 16 tests in 16 machines (16 forks with fixtures that stood), *")
    assert len(databases(done)) == 1
    assert done.outlines.count("other up") == 8


def test_repeat_sets_up_in_each_machine(suite):
    suite.write(
        test_a="def test_a(database): print('value', database.drawn)\ndef test_b(database): test_a(database)"
    )
    done = suite.microvm("-rP", "--microvm-fixtures=repeat", *PURE)
    assert len(databases(done)) == 2


def test_a_set_up_that_fails_is_not_kept(suite):
    suite.write(test_it="def test_it(broken): pass\ndef test_again(broken): pass")
    done = suite.microvm("--microvm-pure-fixtures=broken")
    done.assert_outcomes(errors=2, warnings=1)
    assert done.outlines.count("broken up") == 1
    lines = [line for line in done.outlines if "cannot be kept" in line]
    assert lines == [
        "microvm: test_it.py::test_it: database, broken cannot be kept for later runs: the set-up failed",
    ]


def test_order_of_set_ups_stays(suite):
    """The order of set-ups stays: what is set up before a pure fixture may shape it."""
    suite.write(test_it="def test_it(other, app): print('value', app.drawn)\ndef test_b(database): pass")
    done = suite.microvm("-rP", "--microvm-fixtures=fork", *PURE)
    done.assert_outcomes(passed=2, warnings=1)
    assert done.outlines.index("other up") < done.outlines.index("database up")
    assert len(databases(done)) == 1


def test_impure_fixture_in_front_is_reported(suite):
    suite.write(test_it="def test_it(other, app): pass\ndef test_b(other, database): pass")
    done = suite.microvm("--microvm-pure-fixtures=app")
    line = "microvm: pure_fixtures: app is not kept: other is set up before it, and is not among them"
    assert line in done.outlines
    assert not any("database" in line for line in done.outlines if line.startswith("microvm:"))


def test_with_xdist_each_worker_tears_it_down(suite):
    pytest.importorskip("xdist")
    suite.write(
        test_it="""
            import pytest

            @pytest.mark.parametrize("number", range(4))
            def test_it(database, number): pass
        """
    )
    done = suite.microvm("-rP", "-n2", "--dist=load", *PURE)
    done.assert_outcomes(passed=4, warnings=2)
    assert done.outlines.count("database down") == 2


def test_torn_down_if_the_run_is_stopped(suite):
    suite.write(
        test_it="""
            import pytest

            @pytest.fixture(scope="session")
            def folder():
                yield
                open("torn", "a").write("x")
                raise OSError("stuck")

            def test_fails(folder): assert 0
            def test_other(folder): pass
        """
    )
    done = suite.microvm("-x", "--microvm-pure-fixtures=folder", "--microvm-write-back=torn")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines("*test_fails: fixtures failed to tear down after the run was stopped")
    assert (suite.path / "torn").read_text() == "x"


def test_files_of_the_set_up_come_back(suite):
    suite.write(
        test_it="""
            from pathlib import Path
            import pytest

            @pytest.fixture(scope="session")
            def schema(): Path("schema.txt").write_text("tables")

            def test_it(schema): pass
        """
    )
    suite.microvm("--microvm-pure-fixtures=schema", "--microvm-write-back=*.txt").assert_outcomes(passed=1)
    assert (suite.path / "schema.txt").read_text() == "tables"


def test_unknown_and_narrow_names_are_reported(suite):
    suite.write(test_it="def test_it(rows, database): pass")
    names = ("rows", "databse", "database")
    done = suite.microvm(*(f"--microvm-pure-fixtures={name}" for name in names))
    done.stdout.fnmatch_lines(
        [
            "microvm: pure_fixtures: rows is not kept: its scope is not session",
            "microvm: pure_fixtures: no test needs a session fixture databse",
        ]
    )


def test_a_name_with_a_space_is_refused(suite):
    done = suite.microvm("--microvm-pure-fixtures=data base")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines("*invalid name: expected one without spaces, got 'data base'*")


def test_a_set_up_that_ends_its_machine(suite):
    suite.write(
        test_it="""
            import os
            import pytest

            @pytest.fixture(scope="session")
            def fatal(): os._exit(3)

            def test_it(fatal): pass
            def test_fine(): pass
        """
    )
    done = suite.microvm("-v", "--microvm-pure-fixtures=fatal")
    done.stdout.fnmatch_lines(
        ["*fatal cannot be kept for later runs: *", "*CRASHED*", "*::test_fine PASSED*"]
    )


def test_exit_in_a_set_up(suite):
    suite.write(
        test_it="""
            import pytest

            @pytest.fixture(scope="session")
            def base(): pytest.exit("enough", 7)

            def test_one(base): pass
        """
    )
    done = suite.microvm("--microvm-pure-fixtures=base")
    assert done.ret == 7
    done.stdout.fnmatch_lines("*Exit: enough*")


def test_a_set_up_that_lies_about_what_stands(suite):
    suite.write(
        test_it="""
            import pytest

            @pytest.fixture(scope="session")
            def liar(request):
                wide = request.config.pluginmanager.get_plugin("microvm_wide")
                type(wide).standing = property(lambda _: ["\\x1b[2J"])

            def test_it(liar): pass
            def test_fine(): pass
        """
    )
    done = suite.microvm("-v", "--microvm-pure-fixtures=liar")
    done.stdout.fnmatch_lines(["*liar cannot be kept for later runs: *", "*CRASHED*", "*::test_fine PASSED*"])
    assert "\x1b" not in done.stdout.str()
