"""Sparse copies and scratch disks."""

import os
import shutil
import subprocess

import pytest

from pytest_microvm.errors import HostError
from pytest_microvm.programs import needed
from pytest_microvm.programs.needed import require_program
from pytest_microvm.templates.files import (
    content_digest,
    copy_sparse,
    disk_usage,
    format_scratch,
)

MIB = 1024**2


def blocks(path):
    return path.stat().st_blocks * 512


@pytest.mark.parametrize(
    "pieces",
    [
        {0: b"begin", 40 * MIB: b"middle" * 1000, 99 * MIB: b"end"},
        {50 * MIB: os.urandom(MIB)},
        {},
        {0: os.urandom(3 * MIB + 17)},
    ],
    ids=["both-ends", "middle", "nothing", "first"],
)
def test_a_copy_has_the_same_content_and_holes(tmp_path, pieces):
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        for position, data in pieces.items():
            file.seek(position)
            file.write(data)
        file.truncate(100 * MIB + 123)
    copy_sparse(source, target)
    assert target.stat().st_size == 100 * MIB + 123
    assert blocks(target) <= blocks(source) + MIB
    assert blocks(target) < 10 * MIB
    assert subprocess.run(["cmp", source, target], check=False).returncode == 0


def test_content_digest_ignores_holes(tmp_path):
    sparse, full = tmp_path / "sparse", tmp_path / "full"
    with sparse.open("wb") as file:
        for place in (0, 5 * MIB + 70_001, 9 * MIB):
            file.seek(place)
            file.write(b"data" * 20_000)
        file.truncate(10 * MIB + 123)
    full.write_bytes(sparse.read_bytes())
    assert blocks(full) > blocks(sparse)
    assert content_digest(full) == content_digest(sparse)


@pytest.mark.parametrize("place", [0, 65_535, 65_536, 3 * MIB, 10 * MIB + 122])
def test_every_bit_counts(tmp_path, place):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(os.urandom(MIB))
        file.truncate(10 * MIB + 123)
    before = content_digest(path)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    assert content_digest(path) != before
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([byte]))
    assert content_digest(path) == before


def test_the_size_and_the_places_count(tmp_path):
    (tmp_path / "a").write_bytes(bytes(65_536))
    (tmp_path / "b").write_bytes(bytes(65_537))
    (tmp_path / "c").write_bytes(b"x" * 65_536 + bytes(65_536))
    (tmp_path / "d").write_bytes(bytes(65_536) + b"x" * 65_536)
    assert len({content_digest(tmp_path / name) for name in "abcd"}) == 4


def test_an_empty_file(tmp_path):
    (tmp_path / "a").touch()
    copy_sparse(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b""


def test_an_older_target_is_replaced(tmp_path):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"older and longer")
    copy_sparse(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new"


def test_disk_usage_does_not_count_holes(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(500 * MIB)
    (tmp_path / "full").write_bytes(os.urandom(MIB))
    assert MIB <= disk_usage(tmp_path) < 2 * MIB
    assert disk_usage(tmp_path / "missing") == 0


@pytest.mark.parametrize("size", [16 * MIB, 2048 * MIB])
def test_a_scratch_disk_is_sparse_and_sound(tmp_path, size):
    path = tmp_path / "scratch"
    format_scratch(path, size)
    assert path.stat().st_size == size
    assert blocks(path) < 8 * MIB
    check = shutil.which("e2fsck", path="/usr/sbin:/sbin:" + os.environ["PATH"])
    done = subprocess.run([check, "-fn", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mke2fs_is_found_outside_path_or_missed_with_a_hint(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert require_program("mke2fs").endswith("mke2fs")
    monkeypatch.setattr(needed, "_SYSTEM_FOLDERS", str(tmp_path))
    with pytest.raises(HostError) as caught:
        format_scratch(tmp_path / "scratch", 16 * MIB)
    assert "e2fsprogs" in caught.value.details
    assert caught.value.resolution == "pytest-microvm setup"


def test_failed_mke2fs_error_has_details(tmp_path):
    with pytest.raises(HostError) as caught:
        format_scratch(tmp_path / "scratch", 4096)
    assert caught.value.details
