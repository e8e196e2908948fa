"""The kernel's word about changed files, in a real folder."""

import os
import time
from pathlib import Path

import pytest

from pytest_microvm.guest.changes import FolderWatch


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "old").write_text("old")
    (tmp_path / ".git").mkdir()
    return tmp_path


def test_nothing_changed(folder):
    watch = FolderWatch(str(folder))
    (folder / "sub" / "old").read_text()
    assert watch.changed() == []


def test_files_that_were_made_written_moved_and_removed(folder):
    (folder / "gone").touch()
    watch = FolderWatch(str(folder))
    (folder / "made").touch()
    (folder / "sub" / "old").write_text("new")
    (folder / "sub" / "moved").symlink_to("old")
    (folder / "sub" / "moved").rename(folder / "moved")
    (folder / "gone").unlink()
    assert watch.changed() == ["gone", "made", "moved", "sub/moved", "sub/old"]
    assert watch.changed() == []


def test_what_is_told_of_a_removed_file(folder):
    watch = FolderWatch(str(folder))
    (folder / "made").touch()
    (folder / "sub" / "old").unlink()
    assert watch.told() == ["made", "sub/old\0"]


def test_folders_made_later(folder):
    watch = FolderWatch(str(folder))
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "one").touch()
    assert watch.changed() == ["a/b/one"]
    (folder / "a" / "b" / "two").touch()
    (folder / "a" / "__pycache__").mkdir()
    (folder / "a" / "__pycache__" / "x.pyc").touch()
    assert watch.changed() == ["a/b/two"]


def test_a_folder_moved_in_counts_with_its_files(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "full"
    other.mkdir()
    (other / "file").touch()
    watch = FolderWatch(str(folder))
    other.rename(folder / "full")
    assert watch.changed() == ["full/file"]


def test_git_and_caches_are_not_watched(folder):
    watch = FolderWatch(str(folder))
    (folder / ".git" / "index").touch()
    assert watch.changed() == []


def test_names_that_are_not_text(folder):
    watch = FolderWatch(str(folder))
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).touch()
    assert [os.fsencode(name) for name in watch.changed()] == [b"\xff"]


def flooded(folder, watch):
    """Make more changes than the kernel remembers."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for number in range(limit // 2 + 10):
        path = folder / f"file{number}"
        path.touch()
        path.unlink()
    return watch


def test_with_too_many_changes_all_new_files_count(folder):
    os.utime(folder / "sub" / "old", ns=(0, 0))
    time.sleep(0.1)
    watch = flooded(folder, FolderWatch(str(folder)))
    (folder / "last").touch()
    (folder / "sub" / "deep").mkdir()
    (folder / "sub" / "deep" / "file").touch()
    changed = watch.changed()
    assert {"last", "sub/deep/file"} <= set(changed)
    assert "sub/old" not in changed


def test_a_missing_folder_has_no_changes(tmp_path):
    assert FolderWatch(str(tmp_path / "missing")).changed() == []
