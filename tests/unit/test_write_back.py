"""Files of tests that come back into the workspace, and those that do not."""

import os
import shutil
import types
from pathlib import Path, PurePosixPath

import pytest

from pytest_microvm.errors import HostError, TransferError, UsageError
from pytest_microvm.suite import merged_files, write_back
from pytest_microvm.suite.write_back import WriteBack
from pytest_microvm.suite.written_options import (
    OutsidePath,
    Places,
    WantedFiles,
    folders_of,
    wanted_files,
)


class FolderMachine:
    """A machine whose file system is a folder: it has a copy of the workspace.

    Args:
        folder: The folder.
        top: The workspace.
    """

    facts = types.SimpleNamespace(id="vm-1")

    def __init__(self, folder, top):
        self._folder = folder
        self.top = folder / top.relative_to("/")
        shutil.copytree(top, self.top, symlinks=True)

    def _place(self, path):
        assert isinstance(path, PurePosixPath)
        return self._folder / path.relative_to("/")

    def pull(self, source, target):
        place = self._place(source)
        if place.is_dir() or place.is_symlink():
            raise TransferError(f"{source.name} is not a file in the machine")
        shutil.copy(place, target)

    def push(self, source, target):
        self._place(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, self._place(target))

    def remove(self, target):
        self._place(target).unlink(missing_ok=True)

    def write(self, path, content):
        """Write a file of its workspace; return the path."""
        file = self.top / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return path


@pytest.fixture
def top(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    os.utime(folder / "old.txt", (0, 0))
    return folder


@pytest.fixture
def machines(tmp_path, top):
    """Return a function that starts a machine with the workspace."""
    numbers = iter(range(10))
    return lambda: FolderMachine(tmp_path / f"machine{next(numbers)}", top)


def written(top, *patterns, projects=(), **other):
    wanted = WantedFiles(patterns, projects, while_running=True, **other)
    return WriteBack(types.SimpleNamespace(), top, wanted)


def shown(plugin):
    lines = []
    plugin.pytest_terminal_summary(
        types.SimpleNamespace(write_line=lambda line, **_markup: lines.append(line))
    )
    return lines


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_wanted_files_come_back_and_others_are_named(top, machines):
    plugin, machine = written(top, "*.txt"), machines()
    plugin.take(
        machine,
        [
            machine.write("a/new.txt", "new"),
            machine.write("old.txt", "changed"),
            machine.write("b.py", "code"),
            machine.write(".coverage.x", ""),
        ],
    )
    assert files_of(top) == {"a/new.txt": "new", "old.txt": "changed"}
    kept, gone = shown(plugin)
    assert kept == "microvm: written by tests: 2 files (a/new.txt, old.txt)"
    assert gone.startswith("microvm: written by tests and gone with their machines: 1 file (b.py); ")
    assert "--microvm-write-back" in gone


def test_removed_file_is_removed(top, machines):
    plugin, machine = written(top, "*.txt"), machines()
    (machine.top / "old.txt").unlink()
    plugin.take(machine, ["old.txt\0", "never-there.txt\0", "removed.py\0"])
    assert files_of(top) == {}
    assert shown(plugin) == []


def test_next_machine_gets_what_came_back(top, machines):
    plugin, first, second = written(top, "*.txt"), machines(), machines()
    plugin.take(first, [first.write("sum.txt", "1\n"), first.write("gone.txt", "")])
    (first.top / "gone.txt").unlink()
    plugin.take(first, ["gone.txt"])
    second.write("gone.txt", "")
    plugin.give(second)
    assert (second.top / "sum.txt").read_text() == "1\n"
    assert not (second.top / "gone.txt").exists()
    plugin.take(second, [second.write("sum.txt", "1\n2\n")])
    assert files_of(top) == {"old.txt": "old", "sum.txt": "1\n2\n"}


@pytest.mark.parametrize("path", ["old.txt", "new.txt"])
def test_file_that_changed_on_the_host_is_left_alone(top, machines, path):
    plugin, machine = written(top, "*.txt"), machines()
    (top / path).write_text("mine")
    plugin.take(machine, [machine.write(path, "the machine's")])
    assert files_of(top) == {"old.txt": "old", path: "mine", f"{path}.microvm-vm-1": "the machine's"}
    (line,) = shown(plugin)
    assert line.startswith(f"microvm: not written: {path}: ")
    assert f"the machine's version: {path}.microvm-vm-1" in line


def test_nothing_is_written_through_a_link(top, machines, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.txt").write_text("mine")
    machine = machines()
    (top / "folder").symlink_to(elsewhere)
    (top / "link.txt").symlink_to(elsewhere / "a.txt")
    plugin = written(top, "*.txt")
    plugin.take(machine, [machine.write("folder/a.txt", "x"), machine.write("link.txt", "x")])
    assert files_of(elsewhere) == {"a.txt": "mine"}


def test_no_machine_gets_a_file_through_a_link(top, machines, tmp_path):
    plugin, machine = written(top, "*.txt"), machines()
    plugin.take(machine, [machine.write("a.txt", "x")])
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (top / "a.txt").unlink()
    (top / "a.txt").symlink_to(secret)
    with pytest.raises(UsageError, match="link"):
        plugin.give(machines())


@pytest.mark.parametrize("what", ["link", "folder"])
def test_only_files_come_back(top, machines, what):
    plugin, machine = written(top, "*.txt"), machines()
    place = machine.top / "new.txt"
    if what == "link":
        place.symlink_to("old.txt")
    else:
        place.mkdir()
    plugin.take(machine, ["new.txt"])
    assert files_of(top) == {"old.txt": "old"}
    assert shown(plugin) == ["microvm: not written: new.txt: new.txt is not a file in the machine"]


def test_what_a_machine_can_make_the_host_keep_is_limited(top, machines, monkeypatch):
    monkeypatch.setattr(merged_files, "_MAX_FILES", 2)
    monkeypatch.setattr(merged_files, "_MAX_TOLD", 1)
    monkeypatch.setattr(write_back, "_MAX_PATHS", 5)
    plugin, machine = written(top, "*.txt"), machines()
    plugin.take(machine, [machine.write(f"{number}.txt", "x") for number in range(5)])
    assert set(files_of(top)) == {"old.txt", "0.txt", "1.txt"}
    for _ in range(3):
        plugin.take(machine, [f"{number}.py" for number in range(10)])
    lines = shown(plugin)
    assert lines[1] == "microvm: not written: 2.txt: more than 2 files from one machine"
    assert "gone with their machines: 5 files (" in lines[2]


@pytest.mark.parametrize(
    "path",
    [
        "../x.txt",
        "/x.txt",
        "a/../../x.txt",
        "a//x.txt",
        "",
        "a\0.txt",
        ".git/hooks/x.txt",
        "sub/.GIT/config.txt",
        "a\x1b]0;x.txt",
        "a" * 5000,
    ],
)
def test_paths_that_are_none_of_the_workspace(top, machines, tmp_path, path):
    plugin = written(top, "*", "**/*.txt")
    before = sorted(tmp_path.rglob("*"))
    plugin.take(types.SimpleNamespace(facts=FolderMachine.facts), [path])
    assert sorted(tmp_path.rglob("*")) == before
    assert "\x1b" not in shown(plugin)[0]


@pytest.mark.parametrize(
    "path", ["setup.py", ".envrc", ".vscode/tasks.json", ".github/x.json", "Makefile", ".json"]
)
def test_options_of_the_project_bring_back_only_data(top, machines, path):
    plugin, machine = written(top, projects=("*",)), machines()
    plugin.take(machine, [machine.write(path, "x"), machine.write("report.json", "{}")])
    assert files_of(top) == {"old.txt": "old", "report.json": "{}"}


def test_reports_of_coverage_come_back_from_the_last_machine_alone(top, machines):
    plugin, machine = written(top), machines()
    paths = [
        machine.write(path, "x")
        for path in (".coverage", "coverage.xml", "htmlcov/a/b.html", "sub/.coverage")
    ]
    plugin.take(machine, paths)
    assert files_of(top) == {"old.txt": "old"}
    plugin.take(machine, paths, last=True)
    assert set(files_of(top)) == {"old.txt", ".coverage", "coverage.xml", "htmlcov/a/b.html"}


@pytest.mark.parametrize(("path", "taken"), [("a.txt", "a.txt/x"), ("a/b.txt", "a")])
def test_place_that_is_taken(top, machines, path, taken):
    plugin, machine = written(top, "*.txt"), machines()
    (top / taken).parent.mkdir(exist_ok=True)
    (top / taken).write_text("mine")
    plugin.take(machine, [machine.write(path, "x")])
    assert (top / taken).read_text() == "mine"
    assert shown(plugin)[0].startswith(f"microvm: not written: {path.split('/')[0]}")


def test_workspace_that_is_gone(top, machines):
    plugin, machine = written(top, "*.txt"), machines()
    path = machine.write("a.txt", "x")
    shutil.rmtree(top)
    with pytest.raises(HostError, match="cannot be written"):
        plugin.take(machine, [path])


def test_worker_tells_its_controller(top, machines):
    worker, machine = written(top, "*.txt"), machines()
    worker._config.workeroutput = {}
    worker.take(machine, [machine.write("a.txt", "x"), machine.write("b.py", "")])
    finishing = worker.pytest_sessionfinish()
    next(finishing)
    with pytest.raises(StopIteration):
        next(finishing)
    controller, last = written(top, "*.txt"), machines()
    controller.pytest_testnodedown(types.SimpleNamespace(workeroutput=worker._config.workeroutput))
    controller.pytest_testnodedown(types.SimpleNamespace())
    assert shown(controller) == shown(worker)
    (last.top / "a.txt").unlink()
    controller.give(last)
    assert (last.top / "a.txt").read_text() == "x"


def test_last_machine_gets_what_it_adds_to(top, machines):
    wanted = wanted_files((), ["--cov-append"], (), {}, Places(top, top))
    plugin, machine = WriteBack(types.SimpleNamespace(), top, wanted), machines()
    plugin.give(machine, last=True)
    assert not (machine.top / ".coverage").exists()
    (top / ".coverage").write_text("data")
    plugin.give(machine)
    assert not (machine.top / ".coverage").exists()
    plugin.give(machine, last=True)
    assert (machine.top / ".coverage").read_text() == "data"


@pytest.mark.parametrize(
    ("words", "patterns", "early"),
    [
        ([], (), False),
        (["--snapshot-update"], ("__snapshots__/", "!**/__snapshots__/**/*.lock"), True),
        (["--alluredir=al"], ("/sub/al/",), True),
        (["--alluredir", "al", "tests"], ("/sub/al/",), True),
        (["--alluredir=.."], (), False),
        (["--benchmark-storage=file://./b"], ("/sub/b/",), True),
        (["--benchmark-json=a b[1].json"], ("/sub/a\\ b\\[1\\].json",), False),
        (["--cov-report=xml:out/c.xml"], ("/sub/out/c.xml",), False),
        (["--cov-report", "html:out"], ("/sub/out/",), False),
        (["--cov-report=term"], (), False),
        (["-k", "--snapshot-update"], (), False),
        (["--inline-snapshot=report"], (), False),
        (["--inline-snapshot=report,fix"], ("*.py", "/.inline-snapshot/", "__inline_snapshot__/"), True),
        (["--inline-snapshot", "create"], ("*.py", "/.inline-snapshot/", "__inline_snapshot__/"), True),
    ],
)
def test_options_imply_their_files(words, patterns, early):
    places = Places(Path("/top"), Path("/top/sub"))
    by_user = wanted_files((), words, (), {"-k": "1"}, places)
    assert (by_user.by_user, by_user.by_project, by_user.while_running) == (patterns, (), early)
    by_project = wanted_files(("*.x",), (), words, {"-k": "1"}, places)
    assert (by_project.by_user, by_project.by_project) == (("*.x",), patterns)


# Outside the workspace


@pytest.fixture
def places(top):
    return Places(top, top, mounted=(Path("/out"),))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--alluredir=../al"], OutsidePath(Path("/al"), is_folder=True, early=True)),
        (["--alluredir", "../al"], OutsidePath(Path("/al"), is_folder=True, early=True)),
        (["--benchmark-storage=file:///b/c"], OutsidePath(Path("/b/c"), is_folder=True, early=True)),
        (["--benchmark-json=/b.json"], OutsidePath(Path("/b.json"), is_folder=False, early=False)),
        (["--cov-report=xml:/c.xml"], OutsidePath(Path("/c.xml"), is_folder=False, early=False)),
        (["--cov-report=html:../h"], OutsidePath(Path("/h"), is_folder=True, early=False)),
        (["--cov-report=xml:/out/c.xml"], None),
        (["--cov-report=xml"], None),
        (["--alluredir=al"], None),
        (["--html=/report.html"], None),
    ],
)
def test_paths_outside_that_the_user_names(words, found):
    places = Places(Path("/top"), Path("/top"), mounted=(Path("/out"),))
    wanted = wanted_files((), words, (), {}, places)
    assert wanted.outside == (() if found is None else (found,))
    assert wanted.while_running == (found is not None and found.early) or words == ["--alluredir=al"]
    assert wanted.lines == ()


def test_paths_outside_that_a_project_names_stay_in_machines(places):
    wanted = wanted_files((), (), ["--alluredir=/al", "--cov-report=xml:/out/c.xml"], {}, places)
    assert wanted.outside == ()
    (line,) = wanted.lines
    assert line.startswith("microvm: --alluredir in the project's addopts names /al, outside the project: ")


@pytest.mark.parametrize("where", ["..", ".", "/", "~"])
def test_folders_that_hold_more_than_reports_are_refused(places, monkeypatch, tmp_path, where):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = str(tmp_path / "home") if where == "~" else where
    wanted = wanted_files((), [f"--alluredir={path}"], (), {}, places)
    assert wanted.outside == ()
    (line,) = wanted.lines
    assert line.startswith(f"microvm: --alluredir={path} holds ")


def test_path_outside_by_a_link_of_the_project_is_refused(places, top, tmp_path):
    (top / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="link of the project"):
        wanted_files((), ["--alluredir=link/../../al"], (), {}, places)


def test_cleaning_of_results_is_announced(places):
    wanted = wanted_files((), ["--clean-alluredir"], (), {}, places)
    assert wanted.lines[0].startswith("microvm: --clean-alluredir ")


def test_folders_of_the_user_s_paths_exist_in_machines(places, top, tmp_path):
    (top / "build").mkdir()
    words = [
        *("--a=build/a.json", "--cov-report=xml:build/c.xml", f"--b={tmp_path}/b.json"),
        *("--c=none/c.json", "-k", "x/y", "tests/test_it.py", "--d=d.json"),
    ]
    assert folders_of(words, {"-k": "1"}, places) == (top / "build", tmp_path)


@pytest.fixture
def outside(top, tmp_path):
    """A plug-in that brings back one folder and one file outside the workspace."""
    folder, file = tmp_path / "reports" / "allure", tmp_path / "report.json"
    return written(
        top,
        outside=(OutsidePath(folder, True, True), OutsidePath(file, False, False)),
    )


def make(machine, path, content="x"):
    place = machine._place(PurePosixPath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(content)
    return str(path)


def test_files_come_back_outside(outside, machines, tmp_path):
    machine = machines()
    folder, file = tmp_path / "reports" / "allure", tmp_path / "report.json"
    paths = [make(machine, folder / "a" / "r.json"), make(machine, file)]
    outside.take(machine, paths)
    assert files_of(folder) == {"a/r.json": "x"}
    assert not file.exists()  # plug-ins write it in the last machine
    outside.take(machine, paths, last=True)
    assert file.read_text() == "x"
    assert shown(outside) == [f"microvm: written by tests: 2 files ({folder}/a/r.json, {file})"]


def test_files_of_an_earlier_run_are_replaced_outside(outside, machines, tmp_path):
    file = tmp_path / "report.json"
    file.write_text("old")
    os.utime(file, (0, 0))
    outside._outside[1][1]._started = file.stat().st_ctime_ns
    machine = machines()
    outside.take(machine, [make(machine, file, "new")], last=True)
    assert file.read_text() == "new"


@pytest.mark.parametrize(
    "path",
    [
        "/elsewhere/x",
        "{folder}-more/x",
        "{folder}/../x",
        "{folder}/.git/config",
        "{folder}",
        "{file}/x",
        "{file}.txt",
    ],
)
def test_no_other_path_outside_comes_back(outside, machines, tmp_path, path):
    path = path.format(folder=tmp_path / "reports" / "allure", file=tmp_path / "report.json")
    before = sorted(tmp_path.rglob("*"))
    outside.take(types.SimpleNamespace(facts=FolderMachine.facts), [path], last=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_written_through_a_link_outside(outside, machines, tmp_path):
    folder, elsewhere = tmp_path / "reports" / "allure", tmp_path / "elsewhere"
    for each in (folder, elsewhere):
        each.mkdir(parents=True)
    (folder / "sub").symlink_to(elsewhere)
    machine = machines()
    outside.take(machine, [make(machine, folder / "sub" / "x.json")])
    assert files_of(elsewhere) == {}
    assert shown(outside)[-1].startswith(f"microvm: not written: {folder}/sub")


def test_worker_tells_its_controller_of_files_outside(outside, top, machines, tmp_path):
    machine = machines()
    outside._config.workeroutput = {}
    outside.take(machine, [make(machine, tmp_path / "reports" / "allure" / "r.json")])
    assert [*outside.pytest_sessionfinish()] == [None]
    controller = written(top)
    controller.pytest_testnodedown(types.SimpleNamespace(workeroutput=outside._config.workeroutput))
    assert shown(controller) == shown(outside)


def test_temporary_folders_are_no_written_files(top, machines):
    wanted = wanted_files(("*.txt",), (), (), {}, Places(top, top), basetemp="tmp")
    plugin, machine = WriteBack(types.SimpleNamespace(), top, wanted), machines()
    plugin.take(machine, [machine.write("tmp/test_it0/a.txt", "x"), machine.write("tmp/b.py", "x")])
    assert files_of(top) == {"old.txt": "old"}
    assert shown(plugin) == []
