"""The initramfs archive: byte by byte, and as a real unpacker reads it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.images.cpio import CpioEntry, cpio_archive


def test_one_file_byte_by_byte():
    archive = cpio_archive([CpioEntry.file("a/b", b"hello", 0o755)])
    expected = (
        b"070701"
        b"00000001"  # inode
        b"000081ED"  # regular file, 0755
        b"00000000" b"00000000"  # uid, gid
        b"00000001"  # links
        b"00000000"  # mtime
        b"00000005"  # size
        b"00000000" b"00000000"  # device of the archive
        b"00000000" b"00000000"  # device node
        b"00000004"  # length of the name with its NUL
        b"00000000"  # checksum, unused
        b"a/b\0" + b"\0\0"  # header and name fill a multiple of 4
        b"hello\0\0\0"
        b"070701" + b"00000000" * 4 + b"00000001" + b"00000000" * 6 + b"0000000B" + b"00000000"
        b"TRAILER!!!\0\0\0\0"
    )  # fmt: skip
    assert archive.rstrip(b"\0") == expected.rstrip(b"\0")
    assert len(archive) % 512 == 0


def test_same_entries_same_bytes():
    entries = [CpioEntry.directory("d"), CpioEntry.symlink("d/l", "x"), CpioEntry.character_device("c", 5, 1)]
    assert cpio_archive(entries) == cpio_archive(iter(entries))


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../b", ""])
def test_names_outside_the_root_are_refused(name):
    with pytest.raises(ValueError, match="below the root"):
        cpio_archive([CpioEntry.file(name, b"")])


def test_a_name_comes_once():
    with pytest.raises(ValueError, match="twice"):
        cpio_archive([CpioEntry.directory("a"), CpioEntry.file("a", b"")])


_names = st.text("abcdefgh.-_é", min_size=1, max_size=20).filter(lambda name: name not in {".", ".."})
_files = st.dictionaries(_names, st.tuples(st.binary(max_size=70), st.integers(0, 0o7777)), max_size=8)


@given(_files)
def test_members_can_be_read_back(files):
    archive = cpio_archive(CpioEntry.file(name, data, mode) for name, (data, mode) in files.items())
    assert {name: (data, stat.S_IMODE(mode)) for name, mode, data in _members(archive)} == files


def _members(archive):
    """Read an archive as the specification says, independently of the writer."""
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_length]
        assert name.endswith(b"\0")
        start = (at + 110 + name_length + 3) & ~3
        if name == b"TRAILER!!!\0":
            return
        yield name[:-1].decode(), mode, archive[start : start + size]
        at = (start + size + 3) & ~3


_UNPACKERS = [
    argv
    for argv in (["cpio", "-idm"], ["busybox", "cpio", "-idm"], ["bsdcpio", "-idm"])
    if shutil.which(argv[0])
]


@pytest.mark.skipif(not _UNPACKERS, reason="no program here unpacks cpio archives (cpio, busybox, bsdcpio)")
def test_a_real_unpacker_agrees(tmp_path):
    archive = cpio_archive(
        [
            CpioEntry.directory("d", 0o1777),
            CpioEntry.file("d/program", b"#!/bin/sh\n" * 100, 0o755),
            CpioEntry.file("empty", b""),
            CpioEntry.symlink("d/link", "/proc/self/fd"),
        ]
    )
    subprocess.run(_UNPACKERS[0], input=archive, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "d/program").read_bytes() == b"#!/bin/sh\n" * 100
    assert stat.S_IMODE((tmp_path / "d/program").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o1777
    assert (tmp_path / "empty").read_bytes() == b""
    assert os.readlink(tmp_path / "d/link") == "/proc/self/fd"  # noqa: PTH115 - the text itself
