"""Temporary folders that a hostile machine names and sends."""

import io
import tarfile
import types
from pathlib import PurePosixPath

import pytest

from pytest_microvm.errors import MachineCrashed, ProtocolViolation
from pytest_microvm.suite import kept_folders as module
from pytest_microvm.suite.kept_folders import GuestFolders, KeptFolders, parse_folders
from pytest_microvm.untrusted.extraction import extract

BASE = PurePosixPath("/tmp/pytest-of-root/pytest-0")


class ArchiveMachine:
    """A machine whose folders are archives with files of given sizes.

    Args:
        folders: Paths and sizes of files, by folder.
    """

    def __init__(self, **folders):
        limits = types.SimpleNamespace(disk=1000, memory=24)
        self.facts = types.SimpleNamespace(id="vm-1", limits=limits)
        self.asked = []
        self._folders = folders

    def pull_folder(self, source, target, limits):
        self.asked.append(str(source))
        if source.name not in self._folders:
            raise MachineCrashed("the machine ended")
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, size in self._folders[source.name].items():
                info = tarfile.TarInfo(name)
                info.size = size
                tar.addfile(info, io.BytesIO(bytes(size)))
        archive.seek(0)
        extract(archive, target, limits)


@pytest.fixture
def folders(pytestconfig, tmp_path):
    """The plug-in; folders go below ``tmp_path / "base"``."""
    factory = pytest.TempPathFactory.from_config(
        types.SimpleNamespace(
            getini=pytestconfig.getini,
            option=types.SimpleNamespace(basetemp=str(tmp_path / "base")),
            trace=pytestconfig.trace,
        ),
        _ispytest=True,
    )
    return KeptFolders(
        types.SimpleNamespace(
            _tmp_path_factory=factory,
            getini=pytestconfig.getini,
            option=types.SimpleNamespace(basetemp=str(tmp_path / "base")),
        )
    )


def named(*names):
    return GuestFolders(BASE, names)


def shown(plugin):
    lines = []
    plugin.pytest_terminal_summary(
        types.SimpleNamespace(write_line=lambda line, **_markup: lines.append(line))
    )
    return lines


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".lock", ".git", "a/b", "../up", "/etc", "a\0b", "a\x1b]0;x", "a\nb", "é" * 150]
)
def test_names_of_no_folder_are_refused(folders, tmp_path, name):
    machine = ArchiveMachine()
    assert folders.take(machine, "test_it", named(name)) == []
    assert machine.asked == []
    assert files_in(tmp_path) == []
    (line,) = shown(folders)
    assert "its name cannot be one of this computer" in line
    assert line.isprintable()


def test_same_name_from_two_machines_gets_a_number(folders, tmp_path):
    for text in ("one", "two"):
        machine = ArchiveMachine(test_it0={text: 1}, data={text: 1})
        machine.facts.id = text
        folders.take(machine, f"test_{text}", named("test_it0", "data"))
    expected = ["data/one", "data0/two", "test_it0/one", "test_it1/two"]
    assert files_in(tmp_path / "base") == expected
    assert shown(folders) == [f"microvm: kept tmp_path of 2 failed tests in {tmp_path / 'base'}"]


def test_folder_of_one_machine_comes_once(folders, tmp_path):
    machine = ArchiveMachine(data0={"a": 1}, b0={"b": 1})
    folders.take(machine, "test_a", named("data0"))
    assert folders.take(machine, "test_b", named("b0", "data0")) == [str(tmp_path / "base" / "b0")]
    assert machine.asked == [f"{BASE}/data0", f"{BASE}/b0"]


def test_digits_alone_get_a_number(folders, tmp_path):
    for machine in (ArchiveMachine(**{"12": {"a": 1}}), ArchiveMachine(**{"12": {"b": 1}})):
        machine.facts.id = str(id(machine))
        folders.take(machine, "test_it", named("12"))
    assert files_in(tmp_path / "base") == ["12/a", "tmp0/b"]


def test_folders_of_a_run_are_as_large_as_one_machine(folders, tmp_path):
    machine = ArchiveMachine(a0={"x": 1000}, b0={"y": 25}, c0={"z": 24})
    places = folders.take(machine, "test_it", named("a0", "b0", "c0"))
    assert places == [str(tmp_path / "base" / name) for name in ("a0", "c0")]
    assert files_in(tmp_path / "base") == ["a0/x", "c0/z"]
    kept, not_kept = shown(folders)
    assert kept == f"microvm: kept tmp_path of 1 failed test in {tmp_path / 'base'}"
    assert "test_it: b0: the machine sent 'y', which is refused: more than " in not_kept
    assert "--microvm-keep=failed" in not_kept


def test_number_of_files_and_folders_is_limited(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_FOLDERS", 2)
    folders._entries = 3
    machine = ArchiveMachine(a0={"1": 0, "2": 0}, b0={"3": 0, "4": 0}, c0={"5": 0})
    folders.take(machine, "test_it", named("a0", "b0", "c0"))
    assert files_in(tmp_path / "base") == ["a0/1", "a0/2"]
    line = shown(folders)[1]
    assert "more than 1 entries" in line
    assert "test_it: more than 2 folders" in line


def test_lines_are_limited(folders, monkeypatch):
    monkeypatch.setattr(module, "_MAX_TOLD", 7)
    folders.take(ArchiveMachine(), "test_it", named(*(f"a{number}" for number in range(20))))
    (line,) = shown(folders)
    assert line.count("test_it: ") == 5
    assert "; and 2 more; " in line


@pytest.mark.parametrize(
    "value", [1, [], {}, {"base": 1, "names": []}, {"base": "tmp", "names": []},
              {"base": "/tmp", "names": [1]}, {"base": "/t\0", "names": []}, {"base": "/tmp", "names": "a"}],
)  # fmt: skip
def test_malformed_folders_are_refused(value):
    with pytest.raises(ProtocolViolation):
        parse_folders(value)


def test_folders_of_a_machine():
    assert parse_folders(None) is None
    assert parse_folders({"base": str(BASE), "names": ["a0"]}) == named("a0")
