"""The lock of a live mount's directory: across mounts, processes, and directories inside each other."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pytest_microvm.mounts.live import lock
from pytest_microvm.mounts.live.lock import FolderLock
from support import guards
from support.live_guest import Guest

HOLD = """
import os, sys
from pytest_microvm.mounts.live.lock import FolderLock
with FolderLock(os.open(sys.argv[1], os.O_RDONLY)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "inside"
    (inside / "a" / "b").mkdir(parents=True)
    (inside / "c").mkdir()
    return inside


@contextlib.contextmanager
def held(folder):
    """Hold the lock of a folder, as another mount of it does."""
    root = os.open(folder, os.O_RDONLY)
    one = FolderLock(root)
    try:
        with one:
            yield
    finally:
        one.close()
        os.close(root)


@contextlib.contextmanager
def asking(folder):
    """Ask for the lock of a folder on a thread, which has it at the end.

    Yields:
        A function that returns whether the thread waits for the lock.
    """
    reached = threading.Event()

    def ask():
        with held(folder):
            reached.set()

    def waits():
        until(lambda: is_waited_for() or reached.is_set())
        return not reached.is_set()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield waits
    finally:
        thread.join(guards.PROCESS)
        assert reached.is_set()


def is_waited_for():
    """Return whether anything waits for a lock, as the kernel tells it (proc_locks(5))."""
    number = lock.lock_file().stat().st_ino
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return any(line[1] == "->" and line[6].endswith(f":{number}") for line in lines)


def until(condition):
    deadline = time.monotonic() + guards.PROCESS
    while not condition():
        assert time.monotonic() < deadline


@pytest.mark.parametrize(("one", "other"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), (".", "a/b")])
def test_overlapping_folders_exclude_each_other(folder, one, other):
    with contextlib.ExitStack() as stack, held(folder / one):
        waits = stack.enter_context(asking(folder / other))
        assert waits()


@pytest.mark.parametrize(("one", "other"), [("a", "c"), ("a/b", "c")])
def test_folders_side_by_side_do_not_wait(folder, one, other):
    with held(folder / one), held(folder / other):
        pass


def test_folder_reached_by_another_path_is_the_same(folder):
    (folder.parent / "link").symlink_to(folder)
    with contextlib.ExitStack() as stack, held(folder / "a"):
        waits = stack.enter_context(asking(folder.parent / "link" / "a"))
        assert waits()


def test_process_that_is_killed_lets_go(folder):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with asking(folder / "a" / "b") as waits:
            assert waits()
            process.kill()


def test_folder_moved_while_its_lock_is_waited_for(folder):
    with contextlib.ExitStack() as stack, held(folder / "c"):
        with held(folder / "a"):
            waits = stack.enter_context(asking(folder / "a" / "b"))
            assert waits()
            (folder / "a" / "b").rename(folder / "c" / "b")
        assert waits(), "now for the lock of the folder that it is in"


def test_lock_file_that_was_removed_is_made_again(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "lock_file", lambda: tmp_path / "locks" / "live.lock")
    root = os.open(folder, os.O_RDONLY)
    one = FolderLock(root)
    with one:
        pass
    (tmp_path / "locks" / "live.lock").unlink()
    with one:
        assert (tmp_path / "locks" / "live.lock").stat().st_nlink == 1
    one.close()
    os.close(root)


def test_lock_folder_of_others_is_refused(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "lock_file", lambda: tmp_path / "locks" / "live.lock")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "locks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="not a directory of this user alone"), held(folder):
        pass
    (tmp_path / "locks").unlink()
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks").chmod(0o777)
    with Guest(folder) as guest:
        assert guest.symlink("a", "x") == errno.EPERM
    with Guest(folder, writable=False) as guest:
        assert isinstance(guest.open(guest.node("a")), int)
        assert guest.node("a/b")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_link_is_judged_after_what_another_machine_does(folder):
    """The other machine has the lock, and moves a directory upwards, from which no link led out."""
    with Guest(folder) as guest:
        answers = []
        node = guest.node("a/b")
        thread = threading.Thread(target=lambda: answers.append(guest.ask(6, node, b"up\0../..\0")))
        with held(folder):
            thread.start()
            until(lambda: is_waited_for() or answers)
            (folder / "a" / "b").rename(folder / "b")
        thread.join(guards.PROCESS)
        assert answers == [errno.ENOENT], "its place is gone"
    assert not (folder / "b" / "up").is_symlink()
