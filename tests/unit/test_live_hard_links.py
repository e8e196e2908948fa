"""Files of a live mount that have names outside it, as uv and pnpm install them from their caches."""

import errno
import os
import shutil
import stat
import struct
import subprocess

import pytest

from pytest_microvm.mounts.live.hard_links import one_name
from support.live_guest import Guest, numbers

OLD = 1_000_000_000  # seconds since 1970
WRITE_IT = os.O_RDWR


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    return inside


@pytest.fixture
def outside(tmp_path, folder):
    """A file whose other name is ``inside/sub/module``."""
    (tmp_path / "outside").mkdir()
    file = tmp_path / "outside" / "module"
    file.write_text("as it was\n")
    file.chmod(0o754)
    os.utime(file, (OLD, OLD))
    os.link(file, folder / "sub" / "module")
    return file


@pytest.fixture
def guest(folder):
    with Guest(folder) as one:
        yield one


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def as_it_was(file):
    status = file.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime, status.st_nlink <= 2) == (0o754, OLD, True)
    return file.read_text() == "as it was\n"


def test_write_to_hard_link_changes_a_copy(guest, folder, outside):
    (handle,) = guest.open(guest.node("sub/module"), WRITE_IT)
    assert guest.write(handle, b"IS") == struct.pack("<II", 2, 0)
    assert as_it_was(outside)
    assert (folder / "sub" / "module").read_text() == "IS it was\n"
    assert stat.S_IMODE((folder / "sub" / "module").stat().st_mode) == 0o754
    assert outside.stat().st_nlink == (folder / "sub" / "module").stat().st_nlink == 1
    assert guest.read(handle) == b"IS it was\n"
    assert names(folder / "sub") == ["module"]


def test_all_open_files_of_the_name_see_the_copy(guest, outside):
    (reading,) = guest.open(guest.node("sub/module"))
    (one,) = guest.open(guest.node("sub/module"), WRITE_IT)
    (two,) = guest.open(guest.node("sub/module"), os.O_WRONLY)
    guest.write(one, b"one")
    guest.write(two, b"two", 3)
    assert guest.read(reading) == b"onetwowas\n"
    assert guest.write(reading, b"x") == errno.EBADF
    assert as_it_was(outside)


@pytest.mark.parametrize("by_handle", [False, True])
def test_truncated_hard_link_is_a_copy(guest, folder, outside, by_handle):
    handle = guest.open(guest.node("sub/module"), os.O_WRONLY)[0] if by_handle else None
    assert isinstance(guest.truncate("sub/module", 2, handle), bytes)
    assert as_it_was(outside)
    assert (folder / "sub" / "module").read_text() == "as"


def test_rights_and_times_of_hard_link_are_a_copy_s(guest, folder, outside):
    assert isinstance(guest.chmod("sub/module", 0o600), bytes)
    assert as_it_was(outside)
    changed = (folder / "sub" / "module").stat()
    assert (stat.S_IMODE(changed.st_mode), changed.st_mtime) == (0o600, OLD)
    (folder / "sub" / "module").unlink()
    os.link(outside, folder / "sub" / "module")
    assert isinstance(guest.utime("sub/module", OLD + 1), bytes)
    assert as_it_was(outside)
    assert (folder / "sub" / "module").stat().st_mtime == OLD + 1
    assert (folder / "sub" / "module").read_text() == "as it was\n"


def test_new_name_of_hard_link_is_a_copy_s(guest, folder, outside):
    guest.link("sub/module", "again")
    assert as_it_was(outside)
    assert outside.stat().st_nlink == 1
    assert (folder / "again").samefile(folder / "sub" / "module")
    assert (folder / "again").read_text() == "as it was\n"


def test_host_adds_a_link_to_a_file_open_for_writing(guest, folder, outside):
    (handle,) = guest.create("sub/new")
    assert guest.write(handle, b"first") == struct.pack("<II", 5, 0)
    os.link(folder / "sub" / "new", outside.parent / "new")
    assert guest.write(handle, b"FIRST") == struct.pack("<II", 5, 0)
    assert (outside.parent / "new").read_text() == "first"
    assert (folder / "sub" / "new").read_text() == "FIRST"
    assert guest.read(handle) == b"FIRST"


@pytest.mark.parametrize("moved", ["sub/new", "sub"])
def test_host_moves_a_file_open_for_writing_out(guest, folder, outside, moved):
    (handle,) = guest.create("sub/new")
    assert guest.write(handle, b"first") == struct.pack("<II", 5, 0)
    (folder / moved).rename(outside.parent / "taken")
    assert guest.write(handle, b"FIRST") in (errno.ENOENT, errno.ESTALE)
    assert guest.truncate("sub/new", 0, handle) != b""
    taken = outside.parent / "taken"
    assert (taken / "new" if taken.is_dir() else taken).read_text() == "first"


def test_name_removed_while_open_leaves_the_other_name_alone(guest, outside):
    (handle,) = guest.open(guest.node("sub/module"), WRITE_IT)
    assert guest.unlink("sub/module") == b""
    assert guest.write(handle, b"IS") == errno.ESTALE
    assert as_it_was(outside)


def test_program_open_for_writing_can_be_run_outside(guest, folder, outside):
    program = shutil.copy(shutil.which("true"), outside.parent / "program")
    os.link(program, folder / "program")
    assert isinstance(guest.open(guest.node("program"), WRITE_IT), tuple)
    assert subprocess.run([program], check=False).returncode == 0, "or it would be busy (ETXTBSY)"


def test_copy_counts_and_is_not_made_in_part(folder, outside):
    outside.write_bytes(bytes(20_000))
    with Guest(folder, limit=15_000) as guest:
        (handle,) = guest.open(guest.node("sub/module"), WRITE_IT)
        assert guest.write(handle, b"x") == errno.EDQUOT
        assert guest.chmod("sub/module", 0o600) == errno.EDQUOT
        assert names(folder / "sub") == ["module"]
        assert outside.samefile(folder / "sub" / "module")
        assert isinstance(guest.truncate("sub/module", 0, handle), bytes), "as open(2) with O_TRUNC does"
        assert guest.write(handle, bytes(15_000)) == struct.pack("<II", 15_000, 0)
        assert guest.write(handle, b"x", 15_000) == errno.EDQUOT
    assert outside.read_bytes() == bytes(20_000)


def test_read_only_mount_copies_nothing(folder, outside):
    with Guest(folder, writable=False) as guest:
        assert guest.open(guest.node("sub/module"), WRITE_IT) == errno.EROFS
        assert guest.chmod("sub/module", 0o600) == errno.EROFS
        assert guest.link("sub/module", "again") == errno.EROFS
    assert outside.stat().st_nlink == 2


def test_links_that_the_machine_made_stay_links(guest, folder):
    (handle,) = guest.create("sub/one")
    guest.link("sub/one", "sub/two")
    guest.link("sub/two", "three")
    assert isinstance(guest.rename("sub", "moved"), bytes)
    guest.write(handle, b"all")
    (other,) = guest.open(guest.node("three"), WRITE_IT)
    guest.write(other, b"ALL")
    assert [(folder / name).read_text() for name in ("moved/one", "moved/two", "three")] == ["ALL"] * 3
    assert guest.unlink("moved/one") == b""
    guest.write(handle, b"two", 3)
    assert (folder / "three").read_text() == "ALLtwo"
    assert (folder / "three").stat().st_nlink == 2


def test_one_more_link_of_the_host_s_parts_them(guest, folder, outside):
    (handle,) = guest.create("one")
    guest.link("one", "two")
    os.link(folder / "one", outside.parent / "three")
    guest.write(handle, b"x")
    assert (outside.parent / "three").read_text() == (folder / "two").read_text() == ""
    assert (folder / "one").read_text() == "x"


def test_links_of_the_host_are_parted_inside_too(guest, folder):
    """Where the other names of a file are cannot be told without looking at the whole disk."""
    (folder / "one").write_text("one")
    os.link(folder / "one", folder / "two")
    (handle,) = guest.open(guest.node("one"), WRITE_IT)
    guest.write(handle, b"ONE")
    assert ((folder / "one").read_text(), (folder / "two").read_text()) == ("ONE", "one")


def test_names_are_counted_once_however_they_are_spelled(folder):
    parent = os.open(folder, os.O_RDONLY)
    try:
        spelled = {
            one_name(parent, name)
            for name in ("Modul\u00e9", "modul\u00e9", "module\u0301", "mod\u200dul\u00e9")
        }
        assert len(spelled) == 1
        assert one_name(parent, "module") not in spelled
    finally:
        os.close(parent)


def test_symbolic_link_hard_linked_outside_keeps_its_time(guest, folder, outside):
    (outside.parent / "link").symlink_to("module")
    os.utime(outside.parent / "link", (OLD, OLD), follow_symlinks=False)
    os.link(outside.parent / "link", folder / "link", follow_symlinks=False)
    assert guest.utime("link", OLD + 1) == errno.EPERM
    assert (outside.parent / "link").lstat().st_mtime == OLD
    guest.symlink("a", "own")
    assert isinstance(guest.utime("own", OLD + 1), bytes)
    assert (folder / "own").lstat().st_mtime == OLD + 1


@pytest.mark.parametrize(
    "op", [21, 24, 39, 43, 47]
)  # SETXATTR, REMOVEXATTR, IOCTL, FALLOCATE, COPY_FILE_RANGE
def test_other_ways_to_change_a_file_are_not_there(guest, outside, op):
    (handle,) = guest.open(guest.node("sub/module"), WRITE_IT)
    assert guest.ask(op, guest.node("sub/module"), numbers(handle, 0) + bytes(56)) == errno.ENOSYS
    assert as_it_was(outside)
