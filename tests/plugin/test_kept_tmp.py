"""``tmp_path`` folders of failed tests come back to where pytest has its own, with ``--microvm-keep-tmp``.

The machines of this backend share one folder of temporary folders, and see those of machines before them. So
where each test has a machine, the first test is the one that fails.
"""

import re
from pathlib import Path

import pytest

from support.comparison import only_locally

pytestmark = only_locally  # tests/integration/test_what_suites_leave.py has machines

ONE = """
    import pytest

    @pytest.fixture(scope="session")
    def data(tmp_path_factory):
        folder = tmp_path_factory.mktemp("data")
        (folder / "data.txt").write_text("shared")
        return folder

    def test_fails(tmp_path, data):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a.txt").write_text("failed")
        (data / "data.txt").write_text("changed")
        assert 0

    def test_passes(tmp_path, data):
        (tmp_path / "a.txt").write_text("passed")
"""
OF_ONE = {"test_fails0/sub/a.txt": "failed", "data0/data.txt": "changed"}
SEVERAL = """
    import pytest

    @pytest.fixture(scope="session")
    def data(tmp_path_factory):
        folder = tmp_path_factory.mktemp("data")
        (folder / "data.txt").write_text("shared")
        return folder

    def test_passes(tmp_path, data):
        (tmp_path / "a.txt").write_text("passed")

    def test_without():
        assert 0

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_each(number, tmp_path, data):
        (tmp_path / "b.txt").write_text(str(number))
        (data / "data.txt").write_text(f"changed by {number}")
        assert number == 2

    def test_dynamic(request):
        (request.getfixturevalue("tmp_path") / "c.txt").write_text("passed")

    def test_own(tmp_path_factory):
        (tmp_path_factory.mktemp("own") / "d.txt").write_text("own")
        assert 0
"""
OF_SEVERAL = {
    "test_each_1_0/b.txt": "1",
    "test_each_3_0/b.txt": "3",
    "data0/data.txt": "shared",
    "own0/d.txt": "own",
}
LINE = re.compile(r"microvm: kept tmp_path of (\d+) failed tests? in (\S+)")


@pytest.fixture
def root(tmp_path_factory, monkeypatch):
    """The folder in which pytest makes its folders, one for each user."""
    folder = tmp_path_factory.mktemp("root")
    monkeypatch.setenv("PYTEST_DEBUG_TEMPROOT", str(folder))
    return folder


def kept(result):
    """Return how many tests the run names, and the files in the folder that it names, by path."""
    count, folder = next(found.groups() for line in result.outlines if (found := LINE.fullmatch(line)))
    return int(count), files_in(Path(folder))


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name != ".lock"
    }


@pytest.mark.parametrize(
    "options",
    [[], ["--microvm-fixtures=fork"], ["--microvm-isolation=class"]],
    ids=["test", "forks", "class"],
)
def test_folders_of_failed_test_come_back(project, root, options):
    project.write(test_it=ONE)
    result = project.command("--microvm-keep-tmp", *options)
    assert kept(result) == (1, OF_ONE)
    shown = [line for line in result.outlines if line.endswith(("/test_fails0", "/data0"))]
    assert [Path(line).is_dir() for line in shown] == [True, True]
    assert any("Kept tmp_path" in line for line in result.outlines)


@pytest.mark.parametrize("isolation", ["module", "session"])
def test_machine_of_several_tests_keeps_no_passed_test(project, root, isolation):
    """The factory's folder is one, which comes once, as it is after the first failure."""
    project.write(test_it=SEVERAL)
    result = project.command("--microvm-keep-tmp", f"--microvm-isolation={isolation}")
    result.assert_outcomes(passed=3, failed=4)
    assert kept(result) == (4, OF_SEVERAL)


def test_folders_come_from_the_machines_of_workers(project, root):
    project.write(test_it=ONE)
    count, files = kept(project.command("--microvm-keep-tmp", "-n1"))
    assert (count, files) == (1, {f"popen-gw0/{path}": text for path, text in OF_ONE.items()})


def test_launcher_keeps_them_as_the_projects_policy_says(project, root):
    project.write(test_it=ONE)
    assert kept(project.launched("--microvm-keep-tmp")) == (1, OF_ONE)
    project.write(pytest__DOT__ini="[pytest]\ntmp_path_retention_policy = none")
    result = project.launched("--microvm-keep-tmp")
    result.stdout.fnmatch_lines("microvm: no tmp_path was kept: tmp_path_retention_policy is none")


def test_nothing_is_kept_without_the_option(project, root):
    project.write(test_it=ONE)
    result = project.command()
    result.stdout.no_fnmatch_line("*kept tmp_path*")
    assert not [
        path for path in root.glob("pytest-of-*/*") if path.name == "pytest-1"
    ]  # pytest-0: the guest's


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("tmp_path_retention_policy=none", "tmp_path_retention_policy is none"),
        ("tmp_path_retention_count=0", "tmp_path_retention_count is 0"),
    ],
)
@pytest.mark.parametrize("workers", [[], ["-n1"]], ids=["alone", "worker"])
def test_setting_with_which_pytest_keeps_nothing(project, root, setting, why, workers):
    project.write(test_it=ONE)
    result = project.command("--microvm-keep-tmp", "-o", setting, *workers)
    result.stdout.fnmatch_lines(f"microvm: no tmp_path was kept: {why}")
    result.stdout.no_fnmatch_line("*kept tmp_path of*")


def test_policy_failed_is_that_of_the_machine(project, root):
    """As natively: a test that fails before it is called has no folder any more."""
    project.write(
        pytest__DOT__ini="[pytest]\ntmp_path_retention_policy = failed",
        test_it="""
            import pytest

            @pytest.fixture
            def broken(tmp_path):
                (tmp_path / "a.txt").write_text("set-up")
                raise OSError

            def test_set_up(broken): pass

            def test_call(tmp_path):
                (tmp_path / "a.txt").write_text("call")
                assert 0
        """,
    )
    native = project.run(project.PYTEST, "-p", "no:hypothesispytest")
    assert native.ret == 1
    (base,) = root.glob("pytest-of-*/pytest-0")
    assert kept(project.command("--microvm-keep-tmp")) == (1, files_in(base))
    assert files_in(base) == {"test_call0/a.txt": "call"}


def test_as_many_runs_are_kept_as_pytest_is_told(project, root):
    project.write(test_it=ONE)
    folders = []
    for _ in range(3):
        result = project.command("--microvm-keep-tmp", "-o", "tmp_path_retention_count=1")
        assert kept(result) == (1, OF_ONE)
        folders += [Path(found[2]) for line in result.outlines if (found := LINE.fullmatch(line))]
    assert [folder.exists() for folder in folders] == [False, False, True]


def test_basetemp_of_the_user_gets_the_folders(project, root, tmp_path_factory):
    """It is emptied first, as natively; the machine of this backend has it, too."""
    base = tmp_path_factory.mktemp("above") / "base"
    (base / "old").mkdir(parents=True)
    project.write(test_it=ONE)
    result = project.command("--microvm-keep-tmp", f"--basetemp={base}", "-k", "test_passes")
    assert not (base / "old").exists()
    result.stdout.no_fnmatch_line("*--basetemp*")
    result = project.command(f"--basetemp={base}", "-k", "test_passes")
    result.stdout.fnmatch_lines("microvm: --basetemp: *--microvm-keep-tmp*")


def test_basetemp_through_a_link_of_the_project_is_refused(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "tmp").mkdir()
    (project.path / "link").symlink_to(elsewhere)
    project.write(test_it=ONE)
    result = project.command("--microvm-keep-tmp", "--basetemp=link/tmp")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("ERROR: */link is a link of the project *")
    assert (elsewhere / "tmp").is_dir()


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ({"pytest__DOT__ini": "[pytest]\naddopts = --microvm-keep-tmp"}, "addopts*has --microvm-keep-tmp*"),
        ({"pyproject__DOT__toml": "[tool.pytest-microvm]\nkeep_tmp = 1"}, "*keep_tmp: invalid flag*"),
    ],
    ids=["addopts", "value"],
)
def test_project_cannot_ask_for_it_itself(project, words, where):
    project.write(test_it=ONE, **words)
    result = project.command()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(f"ERROR: {where}")


def test_run_without_temporary_folders_is_refused(project):
    project.write(test_it="def test_it(): pass")
    result = project.command("--microvm-keep-tmp", "-p", "no:tmpdir")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --microvm-keep-tmp needs *", "next step: leave out -p no:tmpdir"])


def test_what_may_not_come_is_named(project, root):
    project.write(
        test_it="""
            import os

            def test_it(tmp_path):
                (tmp_path / "own").symlink_to("a.txt")
                (tmp_path / "a.txt").write_text("a")
                (tmp_path / "out").symlink_to("/etc/passwd")
                os.mkfifo(tmp_path / "pipe")
                (tmp_path / ".git" / "hooks").mkdir(parents=True)
                (tmp_path / ".git" / "config").write_text("[core]\\nfsmonitor = touch sprung")
                assert 0
        """
    )
    result = project.command("--microvm-keep-tmp")
    assert kept(result) == (1, {"test_it0/a.txt": "a"})
    result.stdout.fnmatch_lines(
        "microvm: left out of what was kept: test_it0/out: a link that may lead out; "
        "test_it0/pipe: neither a file, a folder nor a link; test_it0/.git: git's own"
    )
    place = next(root.glob("pytest-of-*/pytest-1/test_it0/own"))
    assert place.readlink() == Path("a.txt")


def test_machine_that_ended_is_named(project, root):
    project.write(test_it="import os\ndef test_it(tmp_path): os._exit(3)")
    result = project.command("--microvm-keep-tmp")
    result.stdout.fnmatch_lines(
        "microvm: tmp_path not kept: test_it.py::test_it: its machine has ended (crashed); "
        "--microvm-keep=failed keeps the machines of failed tests"
    )


def test_tear_down_of_a_forked_fixture_keeps_its_folders(project, root):
    project.write(
        test_it="""
            import pytest

            @pytest.fixture(scope="module")
            def data(tmp_path_factory):
                folder = tmp_path_factory.mktemp("data")
                yield folder
                (folder / "end.txt").write_text("torn down")
                raise OSError("stuck")

            def test_it(data): pass
        """
    )
    result = project.command("--microvm-keep-tmp", "--microvm-fixtures=fork")
    result.assert_outcomes(passed=1, errors=1)
    assert kept(result) == (1, {"data0/end.txt": "torn down"})
