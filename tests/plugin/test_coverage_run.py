"""``coverage run -m pytest --microvm``: the native numbers, to line, branch and context."""

import json
import sqlite3
import sys

import pytest

from support.comparison import LAUNCHER, only_locally
from support.tiers import thorough_but

SOURCE = """
    def sign(number):
        if number < 0:
            return -1
        return 1

    def never():
        return 3
"""
CONFTEST = """
    import package.core
    import pytest

    def pytest_configure(config):
        config.addinivalue_line("markers", "slow: takes long")

    def pytest_collection_modifyitems(items):
        items.sort(key=lambda item: item.name)

    def pytest_runtest_logreport(report):
        if report.failed:
            package.core.never()

    def pytest_sessionfinish(session):
        if session.testscollected > 1000:
            raise RuntimeError

    def pytest_terminal_summary(terminalreporter):
        terminalreporter.line("the end")

    @pytest.fixture(scope="session")
    def base():
        value = package.core.sign(5)
        yield value
        assert value

    @pytest.fixture
    def own(base):
        yield base
        assert base
"""
TESTS = """
    import pytest
    from package.core import sign

    def helper(number):
        return sign(number)

    def test_positive(own):
        assert helper(1) == own

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_again(number):
        if number == 2:
            pytest.skip("no")
        assert sign(number) == 1

    class TestClass:
        def test_method(self, base):
            assert sign(2) == base
"""
SHOWN = "[json]\nshow_contexts = true\n"
DYNAMIC = "dynamic_context = test_function\n"


@pytest.fixture
def measured(project):
    project.write(
        package__core=SOURCE,
        package__unused="def f():\n    return 1\n",
        conftest=CONFTEST,
        test_it=TESTS,
    )
    (project.path / "package/__init__.py").write_text("VALUE = 1\n")
    return project


def coverage(project, *words):
    """Run coverage in the project; its result must be a success."""
    done = project.run(sys.executable, "-m", "coverage", *words)
    assert done.ret == 0, done.stdout.str() + done.stderr.str()
    return done


def runs(project, *options, pytest_options=()):
    """Return the two ways to run the suite, each as a function that returns what pytester would."""
    common = ["-p", "no:hypothesispytest", "-p", "no:cacheprovider", *pytest_options]
    start = [sys.executable, "-m", "coverage", "run", *options, "-m", "pytest", *common]
    return (
        lambda *more: project.run(*start, *more),
        lambda *more: project.run(*start, "--microvm", *project._arguments, *more),
    )


def reported(project):
    """Return what ``coverage json`` says of the project's files, and of all; remove the data."""
    coverage(project, "json", "-q")
    file = project.path / "coverage.json"
    report = json.loads(file.read_text())
    file.unlink()
    for data in project.path.glob(".coverage*"):
        if data.name != ".coveragerc":
            data.unlink()
    for found in report["files"].values():
        for part in (found, *found.get("functions", {}).values(), *found.get("classes", {}).values()):
            part["contexts"] = {line: sorted(names) for line, names in part.get("contexts", {}).items()}
    own = {name: found for name, found in report["files"].items() if not name.startswith("/")}
    return own, report["totals"] if len(own) == len(report["files"]) else None


def assert_same(project, *options, pytest_options=(), status=0):
    """Run the suite both ways; the reports must be the same. Return them and the result in machines."""
    results, reports = [], []
    for run in runs(project, *options, pytest_options=pytest_options):
        results.append(run())
        assert results[-1].ret == status, results[-1].stdout.str() + results[-1].stderr.str()
        reports.append(reported(project))
    assert reports[0][0]
    assert reports[1][0] == reports[0][0]
    return reports[0], results[1]


CONFIGURED = {
    "lines": ("", ["--source=."]),
    "branches": ("[run]\nbranch = true\nsource = package\n", []),
    "omit": ("[run]\nomit =\n    */unused.py\n    conftest.py\n", ["--source=.", "--branch"]),
    "contexts": (f"{SHOWN}[run]\n{DYNAMIC}source = .\n", []),
    "relative": (f"{SHOWN}[run]\n{DYNAMIC}branch = true\nrelative_files = true\n", ["--source=."]),
    "static": (SHOWN, ["--context=static", "--include=package/*,test_it.py"]),
    "packages": ("[run]\nsource_pkgs = package\n", []),
}


@pytest.mark.parametrize("case", thorough_but(CONFIGURED, "branches", "relative", "static", "packages"))
def test_numbers_are_the_native_ones(measured, case):
    config, options = CONFIGURED[case]
    measured.write(__DOT__coveragerc=config)
    (files, totals), result = assert_same(measured, *options)
    assert totals
    assert any(found["executed_lines"] for found in files.values())
    result.stdout.no_fnmatch_line("microvm: coverage*")
    result.stderr.no_fnmatch_line("*CoverageWarning*")


def test_without_source_the_projects_files_are_measured(measured):
    (files, _), _ = assert_same(measured)
    assert {"conftest.py", "test_it.py", "package/core.py"} <= set(files)


WAYS = ["--microvm-isolation=module", "--microvm-isolation=session", "--microvm-fixtures=fork"]


@pytest.mark.parametrize("option", thorough_but(WAYS, *WAYS[1:]))
def test_numbers_do_not_depend_on_isolation(measured, option):
    native, remote = runs(measured, "--source=.", "--branch")
    assert native().ret == 0
    expected = reported(measured)
    assert remote(option).ret == 0
    assert reported(measured) == expected


def test_failed_suite(measured):
    measured.write(test_more="import package.core\ndef test_fails(): assert package.core.sign(-1) == 1")
    (files, _), _ = assert_same(measured, "--source=.", status=1)
    assert "return 3" not in files  # the conftest file has called it for the failure
    assert 7 in files["package/core.py"]["executed_lines"]


def test_error_in_the_collection(measured):
    measured.write(test_broken="import package.core\npackage.core.sign(-1)\nimport no_such_module")
    (files, _), _ = assert_same(measured, "--source=.", status=2)
    assert 3 in files["package/core.py"]["executed_lines"]


def test_data_is_appended(measured):
    measured.write(test_negative="import package.core\ndef test_it(): assert package.core.sign(-1) == -1")
    native, _ = runs(measured, "--source=package")
    assert native("test_it.py").ret == 0
    for run in runs(measured, "--source=package", "--append"):
        kept = (measured.path / ".coverage").read_bytes()
        assert run("test_negative.py").ret == 0
        found = reported(measured)
        assert found[0]["package/core.py"]["missing_lines"] == [7]
        (measured.path / ".coverage").write_bytes(kept)


def test_parallel_mode(measured):
    reports = []
    for run in runs(measured, "--source=.", "--branch", "--parallel-mode"):
        assert run().ret == 0
        assert not (measured.path / ".coverage").exists()
        assert len(list(measured.path.glob(".coverage.*"))) == 1
        coverage(measured, "combine", "-q")
        reports.append(reported(measured))
    assert reports[0] == reports[1]


@only_locally
def test_child_processes(measured):
    """As natively, their data is in files of their own."""
    measured.write(
        __DOT__coveragerc="[run]\npatch = subprocess\nsource = package\nbranch = true\n",
        test_child="""
            import subprocess, sys
            def test_negative():
                code = "import package.core; assert package.core.sign(-1) == -1"
                assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        """,
    )
    reports = []
    for run in runs(measured):
        assert run().ret == 0
        names = sorted(path.name for path in measured.path.glob(".coverage.*"))
        coverage(measured, "combine", "-q")
        reports.append(reported(measured))
    assert len(names) == 3  # of this process, of the child in the "machine", and what came back from there
    assert reports[0] == reports[1]
    assert 3 in reports[1][0]["package/core.py"]["executed_lines"]


def test_workers_that_are_measured(measured):
    pytest.importorskip("xdist")
    measured.write(__DOT__coveragerc="[run]\npatch = subprocess\nsource = .\nbranch = true\n")
    reports = []
    for run in runs(measured, pytest_options=["-n2"]):
        done = run()
        assert done.ret == 0, done.stdout.str() + done.stderr.str()
        coverage(measured, "combine", "-q")
        reports.append(reported(measured))
    assert reports[0] == reports[1]


def test_workers_that_are_not(measured):
    """Natively only the controller is measured, in which no test runs."""
    pytest.importorskip("xdist")
    _, remote = runs(measured, "--source=package", pytest_options=["-n2"])
    done = remote()
    assert done.ret == 0
    done.stdout.fnmatch_lines(
        "microvm: coverage measures this process and not pytest-xdist*patch = subprocess*"
    )


def test_interrupted_run_keeps_what_it_has(measured):
    measured.write(test_z="import pytest\ndef test_z(): pytest.exit('enough', 3)\ndef test_zz(): assert 0")
    (files, _), _ = assert_same(measured, "--source=package", status=3)  # hooks at the end do not run
    assert files["package/core.py"]["executed_lines"]


def test_what_is_missing_is_told(measured):
    measured.write(
        test_more="""
            import os
            from pathlib import Path
            import runpy
            import package.core

            def test_dies():
                package.core.sign(-1)
                os._exit(3)

            def test_generated(tmp_path):
                (tmp_path / "made.py").write_text("value = 1")
                runpy.run_path(str(tmp_path / "made.py"))
                Path("made_here.py").write_text("value = 1")
                runpy.run_path("made_here.py")
                Path("made_here.py").unlink()
        """
    )
    _, remote = runs(measured)
    done = remote()
    assert done.ret == 1
    done.stdout.fnmatch_lines(
        [
            "microvm: coverage: lacks what 1 test executed in machines that failed",
            "microvm: coverage: left out, as this computer does not have them in the project: *made*.py*",
        ]
    )
    files, _ = reported(measured)
    assert 3 in files["package/core.py"]["missing_lines"]
    assert not [name for name in files if "made" in name]


def test_package_that_nothing_imports(measured):
    _, remote = runs(measured, "--source=package,json.tool")
    done = remote()
    done.stdout.fnmatch_lines("microvm: coverage: module json.tool was never imported")
    done.stderr.no_fnmatch_line("*was never imported*")


def test_module_that_pytest_has_loaded_before(measured):
    measured.write(test_ini="import iniconfig\ndef test_it(): assert iniconfig.IniConfig('a', data='[a]')")
    _, remote = runs(measured, "--source=iniconfig")
    remote().stdout.fnmatch_lines("microvm: coverage: loaded in machines before they measure: iniconfig*")


def test_data_that_does_not_fit_fails_the_run(measured):
    native, _ = runs(measured, "--source=package", "--branch")
    assert native().ret == 0
    _, remote = runs(measured, "--source=package", "--append")
    done = remote()
    assert done.ret == 1
    done.stdout.fnmatch_lines("microvm: coverage: ERROR: it could not be added: *branch*")


def test_settings_of_a_file_elsewhere(measured, tmp_path_factory):
    """Only settings reach the machine: child processes would need the file."""
    file = tmp_path_factory.mktemp("elsewhere") / "rc"
    file.write_text("[run]\nsource = package\nbranch = true\npatch = subprocess\nparallel = false\n")
    reports = []
    for run in runs(measured, f"--rcfile={file}"):
        done = run()
        assert done.ret == 0
        coverage(measured, "combine", "-q")
        reports.append(reported(measured))
    assert reports[0] == reports[1]
    done.stdout.fnmatch_lines(f"microvm: coverage: child processes are not measured: {file} is outside*")


def test_launcher(measured):
    """It starts a new process, which is measured with its configuration alone."""
    measured._name_backend()
    command = [sys.executable, "-m", "coverage", "run", LAUNCHER, "test", "-p", "no:hypothesispytest"]
    done = measured.run(*command)
    done.assert_outcomes(passed=4, skipped=1)
    done.stdout.fnmatch_lines("microvm: coverage measures `pytest-microvm test`, but not*patch = subprocess*")
    measured.write(__DOT__coveragerc="[run]\nsource = .\nbranch = true\npatch = subprocess\n")
    native, _ = runs(measured)
    reports = []
    for run in (native, lambda: measured.run(*command)):
        done = run()
        assert done.ret == 0, done.stdout.str() + done.stderr.str()
        coverage(measured, "combine", "-q")
        reports.append(reported(measured))
    assert reports[0] == reports[1]


ATTACKS = r"""
    import gc, os

    def forge(change):
        gc.unfreeze()
        (found,) = [it for it in gc.get_objects() if type(it).__name__ == "Measurement"]
        honest = type(found).take
        def take(self):
            record = honest(self)
            change(record)
            return record
        type(found).take = take

    def found(*entry):
        forge(lambda record: record["found"].append(list(entry)))

    HERE = os.path.abspath("package/core.py")
    def test_before(): pass
    def test_kind(): found("", "arcs", HERE, "1 2")
    def test_text(): found("", "lines", HERE, "1 x")
    def test_negative(): found("", "lines", HERE, "-1")
    def test_large(): found("", "lines", HERE, "99999999")
    def test_long(): found("", "lines", HERE, "1 " * 3000000 + "1")
    def test_short(): found("", "lines", HERE)
    def test_context(): found(3, "lines", HERE, "1")
    def test_file(): found("", "lines", ["x"], "1")
    def test_shape(): forge(lambda record: record.update(found={}))
    def test_tracers(): forge(lambda record: record.update(tracers=[]))
    def test_touched(): forge(lambda record: record.update(touched=[HERE]))
    def test_children(): forge(lambda record: record.update(children=["x"]))
    def test_told(): forge(lambda record: record.update(told=[["x"]]))
    def test_unseen(): forge(lambda record: record.update(unseen=[1]))
    def test_after(): pass
"""


def test_hostile_records(measured):
    measured.write(test_it=ATTACKS)
    _, remote = runs(measured, "--source=package")
    done = remote("-v")
    text = done.stdout.str()
    assert "INTERNALERROR" not in text
    done.assert_outcomes(passed=2, failed=14)
    assert text.count(" CRASHED") == 14
    files, _ = reported(measured)
    assert set(files) == {"package/__init__.py", "package/core.py", "package/unused.py"}


def test_hostile_names(measured, tmp_path_factory):
    """A report would show the content of the files that a machine names."""
    outside = tmp_path_factory.mktemp("outside") / "secret.py"
    outside.write_text("password = 1\n")
    (measured.path / "link.py").symlink_to(outside)
    measured.write(
        test_it=ATTACKS.split("    HERE", maxsplit=1)[0]
        + rf"""
    def test_names():
        here = os.getcwd()
        names = [{str(outside)!r}, here + "/link.py", here + "/../" + here + "/conftest.py", "/etc/passwd"]
        def change(record):
            record["found"] += [["", "lines", name, "1"] for name in names]
            record["touched"].update(dict.fromkeys(names, ""))
            record["found"].append(["x\x1b[2J\n::error::y", "lines", here + "/conftest.py", "1"])
            record["tracers"][here + "/package/core.py"] = "no.Such"
            record["told"] += ["\x1b[2J\n::error::z"]
        forge(change)
"""
    )
    _, remote = runs(measured, "--source=package")
    done = remote()
    assert done.ret == 0
    text = done.stdout.str()
    assert "\x1b" not in text
    assert not [line for line in done.outlines if line.lstrip().startswith("::")]
    assert "secret.py" in text
    with sqlite3.connect(measured.path / ".coverage") as database:
        names = {name for (name,) in database.execute("select path from file")}
        contexts = {name for (name,) in database.execute("select context from context")}
    database.close()
    assert not [name for name in names if "secret" in name or "passwd" in name or ".." in name]
    assert not [name for name in contexts if "\x1b" in name or "\n" in name]
    reported(measured)


def test_coverage_that_nobody_asked_for(project):
    project.write(
        test_it="""
            def test_asks(pytestconfig):
                plugins = pytestconfig.pluginmanager.get_plugins()
                (plugin,) = [each for each in plugins if type(each).__name__ == "_SessionPlugin"]
                plugin._records.append({"k": "coverage", "told": []})
        """
    )
    result = project.microvm()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*sent coverage that nobody asked for*"])
