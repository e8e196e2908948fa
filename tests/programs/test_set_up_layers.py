"""Layers from the archive that a set-up's machine sends: what is kept, and what is refused."""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from pytest_microvm.errors import BuildError
from pytest_microvm.guest.files import StreamWriter
from pytest_microvm.guest.root_changes import pack_upper
from pytest_microvm.images.image import Image
from pytest_microvm.images.set_up import SetUp, build_set_up_layer
from support.oci import archive, folder, hard_link, member, symlink

EPOCH = 1735689600
NOWHERE = Path("/nowhere")
SET_UP = SetUp(
    kit="own", image=Image("base", "0" * 64, "x86_64", NOWHERE, NOWHERE, NOWHERE, NOWHERE, (), {}), files=(),
    sdists=(), commands=("true",), network=(), environment=(), resources=(), epoch=EPOCH,
)  # fmt: skip


@pytest.fixture
def layer(tmp_path):
    """Return a function that builds the layer of an archive and returns its file."""

    def build(data):
        place = tmp_path / "building"
        place.mkdir(exist_ok=True)
        built = build_set_up_layer(place, SET_UP, lambda _set_up, file, _tell: file.write(data), print)
        return built.files["layer"]

    return build


def listed(layer):
    """Return the entries of a file system: kind and mode, owner and time by path."""
    done = subprocess.run(
        ["unsquashfs", "-lln", "-UTC", layer], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    lines = [line.split(maxsplit=5) for line in done if "squashfs-root/" in line]
    return {line[-1].removeprefix("squashfs-root/"): (line[0], line[1]) for line in lines}


def test_caches_logs_and_temporary_files_are_left_out(layer):
    kept = [
        folder("etc"), member("etc/kept", "x"), folder("var"), folder("var/log"), folder("var/log/app"),
        folder("var/cache"), folder("var/cache/apt"), folder("tmp"), folder("usr"), folder("usr/share"),
        folder("usr/share/doc"), folder("root"), member("usr/share/docs", "x"),
    ]  # fmt: skip
    dropped = [
        member("etc/passwd-", "x"), member("var/log/app/a.log", "x"), folder("var/cache/apt/archives"),
        member("var/cache/apt/archives/a.deb", "x"), member("tmp/.wh.gone", ""), member("tmp/x", "x"),
        folder("usr/share/doc/less"), member("usr/share/doc/less/copyright", "x"), folder("root/.cache"),
        member("root/.cache/pip", "x"), member("usr/share/doc/.wh..wh..opq", ""),
    ]  # fmt: skip
    linked = [hard_link("etc/linked", "var/log/app/a.log")]
    found = listed(layer(archive([*kept, *dropped, *linked])))
    assert set(found) == {*(info.name for info, _data in kept), "etc/linked"}


def test_same_changes_at_another_time_give_the_same_layer(layer):
    def changes(mtime):
        return archive([folder("a", mtime=mtime), member("a/b", "content", mtime=mtime), symlink("c", "a")])

    first = layer(changes(EPOCH + 1)).read_bytes()
    assert layer(changes(EPOCH + 1000)).read_bytes() == first
    assert layer(changes(EPOCH - 1)).read_bytes() != first


HOSTILE = {
    "path": archive([member("../../out", "x")]),
    "inside": archive([member("a/../../out", "x")]),
    "whiteout": archive([member("etc/null", type=tarfile.CHRTYPE)]),
    "device": archive([member("etc/disk", type=tarfile.BLKTYPE, devmajor=2**20)]),
    "link": archive([hard_link("etc/out", "/etc/shadow")]),
    "below a link": archive([symlink("etc/out", "/"), member("etc/out/file", "x")]),
    "garbage": b"garbage" * 1000,
    "cut off": archive([member("etc/big", b"x" * 20_000)])[:9000],
    "compressed": b"\x1f\x8b" + bytes(100_000),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_archive_is_refused_and_nothing_is_written(layer, tmp_path, what):
    with pytest.raises(BuildError, match="what the set-up of kit own changed cannot be a part of an image"):
        layer(HOSTILE[what])
    assert {path.name for path in tmp_path.rglob("*")} <= {"building", "layer.squashfs"}


def packed(upper):
    """Return the members of the archive of a folder, by name, and the archive."""
    buffer = io.BytesIO()
    pack_upper(StreamWriter(buffer.write), str(upper), "/")
    buffer.seek(0)
    with tarfile.open(fileobj=buffer, errors="surrogateescape") as tar:
        return {found.name: (found, tar.extractfile(found) if found.isreg() else None) for found in tar}


def test_guest_packs_every_kind_of_file(tmp_path):
    upper = tmp_path / "upper"
    (upper / "etc").mkdir(parents=True)
    for own in ("etc/machine-id", "etc/resolv.conf"):
        (upper / own).write_text("own")
    for mount_point in ("proc", "dev"):
        (upper / mount_point / "x").mkdir(parents=True)
    (upper / "etc" / "one").write_text("content")
    (upper / "etc" / "one").chmod(0o4711)
    (upper / "etc" / "two").hardlink_to(upper / "etc" / "one")
    (upper / "etc" / "link").symlink_to("/nowhere")
    os.mkfifo(upper / "etc" / "fifo")
    os.mkdir(os.fsencode(upper) + b"/\xff")  # noqa: PTH102 - a name that is not UTF-8
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(upper / "etc" / "socket"))
    found = packed(upper)
    assert sorted(found) == ["etc", "etc/fifo", "etc/link", "etc/one", "etc/two", "\udcff"]
    assert (found["etc/one"][0].mode, found["etc/two"][0].linkname) == (0o4711, "etc/one")
    assert found["etc/link"][0].linkname == "/nowhere"
    assert found["etc/fifo"][0].isfifo()


def test_guest_refuses_a_name_that_would_hide_a_file(tmp_path):
    (tmp_path / ".wh.shadow").touch()
    with pytest.raises(OSError, match=r"begins with \.wh\."):
        packed(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="devices and the overlay's attributes need root")
def test_guest_packs_what_an_overlay_hides(tmp_path):
    upper = tmp_path / "upper"
    (upper / "opaque").mkdir(parents=True)
    os.mknod(upper / "gone", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    os.mknod(upper / "disk", stat.S_IFBLK | 0o600, os.makedev(8, 1))
    try:
        os.setxattr(upper / "opaque", "trusted.overlay.opaque", b"y")
    except OSError:
        pytest.skip("the file system has no trusted attributes")
    found = packed(upper)
    assert list(found) == ["disk", ".wh.gone", "opaque", "opaque/.wh..wh..opq"]
    assert (found["disk"][0].devmajor, found["disk"][0].devminor) == (8, 1)
