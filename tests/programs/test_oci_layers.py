"""Layers of container images become file systems: packed by mksquashfs and looked at with unsquashfs."""

import gzip
import io
import os
import re
import subprocess
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_microvm.errors import PullError
from pytest_microvm.images.oci import compression
from pytest_microvm.images.oci.compression import unpack
from pytest_microvm.images.oci.contents import Attributes, inspect
from pytest_microvm.images.oci.documents import Descriptor
from pytest_microvm.images.oci.layer import convert, is_for, rewrite
from pytest_microvm.images.oci.spooling import DamagedBlob, Spools, spool
from support.oci import LAYER, archive, compressed, digest, folder, hard_link, member, symlink


def nothing(_paths):
    return {}


@contextmanager
def blob_of(data, place):
    """Open data as a file, as blobs come."""
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(data)
        file.seek(0)
        yield file


def pieces(data, size=100_000):
    """Yield data as it is read from a file."""
    yield from (data[start : start + size] for start in range(0, len(data), size))


def unpacked_blob(blob, place):
    """Return the archive in a blob, and its digest."""
    target = io.BytesIO()
    return unpack(pieces(blob), len(blob), target, place), target.getvalue()


def converted(place, *members, lowest=False, lower=nothing, how="gzip"):
    """Convert a layer of members; return the file system and its facts."""
    data = archive(members)
    blob = compressed(data, how)
    layer = Descriptor(digest(blob), len(blob), LAYER)
    target = Path(tempfile.mkdtemp(dir=place))
    with blob_of(blob, place) as file, spool(file, layer, digest(data), place) as whole:
        built = convert(target, whole, lowest=lowest, lower=lower)
    return built.files["layer"], built.facts


LINE = re.compile(r"(\S{10}) (\S+) +(?:\d+, *)?\d+ \S+ \S+ squashfs-root/?(.*)")


def listed(path):
    """Return mode and owner of everything in a file system, by path."""
    out = subprocess.run(["unsquashfs", "-lln", path], capture_output=True, check=True).stdout
    rows = [LINE.fullmatch(line) for line in out.decode(errors="surrogateescape").splitlines()]
    return {row[3].partition(" -> ")[0]: (row[1], row[2]) for row in rows if row}


def unpacked(path, place):
    """Unpack a file system (as root) and return the folder."""
    target = Path(tempfile.mkdtemp(dir=place)) / "all"
    subprocess.run(["unsquashfs", "-q", "-n", "-d", target, path], check=True, stdout=subprocess.DEVNULL)
    return target


def test_files_keep_their_attributes(tmp_path):
    path, facts = converted(
        tmp_path,
        folder("srv", mode=0o2751, uid=7, gid=8),
        member("srv/app", "app", mode=0o4755, uid=1000, gid=1001, mtime=1_600_000_000),
        member("srv/other", "other", mode=0o600, uid=4_000_000_000),
        symlink("srv/link", "/absolute/../target"),
        member("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        member("dev/disk", type=tarfile.BLKTYPE, devmajor=254, devminor=48, mode=0o660),
        member("run/pipe", type=tarfile.FIFOTYPE, mode=0o622),
    )
    found = listed(path)
    assert found["srv"] == ("drwxr-s--x", "7/8")
    assert found["srv/app"] == ("-rwsr-xr-x", "1000/1001")
    assert found["srv/other"] == ("-rw-------", "4000000000/0")
    assert found["srv/link"][0] == "lrwxrwxrwx"
    assert (found["dev/null"][0], found["dev/disk"][0], found["run/pipe"][0]) == (
        "crw-rw-rw-", "brw-rw----", "prw--w--w-",
    )  # fmt: skip
    assert facts["entries"] == "9"
    tree = unpacked(path, tmp_path)
    assert (tree / "srv/app").read_bytes() == b"app"
    assert (tree / "srv/app").stat().st_mtime == 1_600_000_000
    assert (tree / "srv/link").readlink() == Path("/absolute/../target")


def test_hard_links_stay_hard_links(tmp_path):
    path, _facts = converted(
        tmp_path, member("a", "one"), hard_link("d/b", "a"), hard_link("c", "./d/b"), member("a", "three")
    )
    tree = unpacked(path, tmp_path)
    assert (tree / "a").read_bytes() == b"three"
    assert (tree / "d/b").read_bytes() == b"one"
    assert (tree / "d/b").stat().st_ino == (tree / "c").stat().st_ino


def test_what_is_hidden_is_a_device_or_an_opaque_folder(tmp_path):
    path, facts = converted(
        tmp_path, member("a/.wh.old"), folder("b"), member("b/.wh..wh..opq"), member("b/new", "n"),
        member(".wh.c"), folder("c"), member("c/x", "x"),
    )  # fmt: skip
    tree = unpacked(path, tmp_path)
    hidden = (tree / "a/old").lstat()
    assert (oct(hidden.st_mode), hidden.st_rdev) == ("0o20000", 0)
    for name in ("b", "c"):
        assert os.getxattr(tree / name, "trusted.overlay.opaque") == b"y"
    assert facts["hides"] == "yes"
    assert not is_for(facts, lowest=True, lower=nothing)


def test_lowest_layer_hides_nothing(tmp_path):
    path, facts = converted(tmp_path, member("a/.wh.old"), folder("b"), member("b/.wh..wh..opq"), lowest=True)
    assert set(listed(path)) == {"", "a", "b"}
    assert facts["hides"] == "dropped"
    assert is_for(facts, lowest=True, lower=nothing)
    assert not is_for(facts, lowest=False, lower=nothing)


def test_layer_that_hides_everything_says_so(tmp_path):
    _path, facts = converted(tmp_path, member(".wh..wh..opq"), member("x", "x"))
    assert facts["root"] == "1"


def test_folders_that_are_not_in_it_are_as_in_the_layers_below(tmp_path):
    def lower(paths):
        return {"opt": Attributes(0o2770, 5, 6, 0)} if "opt" in paths else {}

    path, facts = converted(tmp_path, member("opt/app/x", "x"), lower=lower)
    assert listed(path)["opt"] == ("drwxrws---", "5/6")
    assert listed(path)["opt/app"] == ("drwxr-xr-x", "0/0")
    assert is_for(facts, lowest=False, lower=lower)
    assert not is_for(facts, lowest=False, lower=nothing)


def test_capabilities_and_odd_names_arrive(tmp_path):
    capability = b"\x01\x00\x00\x02\x00\x20\x00\x00" + b"\0" * 12  # cap_net_raw
    odd = b"caf\xe9\n\x1b[2J".decode(errors="surrogateescape")
    headers = {"SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape")}
    path, _facts = converted(
        tmp_path,
        member("bin/ping", "x", mode=0o755, pax_headers=headers),
        member(odd, "odd"),
        member("long/" + "n" * 255, "long"),
    )
    tree = unpacked(path, tmp_path)
    assert os.getxattr(tree / "bin/ping", "security.capability") == capability
    assert (tree / odd).read_bytes() == b"odd"
    assert (tree / "long" / ("n" * 255)).read_bytes() == b"long"


@pytest.mark.parametrize("how", ["tar", "gzip", "zstd"])
def test_compressions(tmp_path, how):
    path, _facts = converted(tmp_path, member("x", "x" * 3_000_000), how=how)
    assert (unpacked(path, tmp_path) / "x").stat().st_size == 3_000_000


def test_empty_layer(tmp_path):
    path, facts = converted(tmp_path)
    assert (set(listed(path)), facts["entries"]) == ({""}, "0")


def test_several_gzip_members_are_one_archive(tmp_path):
    data = archive([member("x", b"0123456789" * 100_000)])
    blob = b"".join(gzip.compress(data[start : start + 300_000]) for start in range(0, len(data), 300_000))
    assert unpacked_blob(blob, tmp_path) == (digest(data), data)


# Refused


def refused_unpacking(blob, place):
    with pytest.raises(PullError) as caught:
        unpacked_blob(blob, place)
    assert caught.value.reason == "refused"
    return str(caught.value)


def test_damaged_compression_is_refused(tmp_path):
    whole = gzip.compress(archive([member("x", bytes(range(256)) * 1000)]))
    assert "end too early" in refused_unpacking(whole[:-9], tmp_path)
    assert "compression is damaged" in refused_unpacking(whole[:40] + b"\xff" * 40 + whole[80:], tmp_path)
    assert "compression is damaged" in refused_unpacking(whole + b"trailing", tmp_path)
    zstd = compressed(b"x" * 100_000, "zstd")
    assert "compression is damaged" in refused_unpacking(zstd[:-5], tmp_path)
    assert "compressed with xz" in refused_unpacking(b"\xfd7zXZ\0\0\0", tmp_path)


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_layer_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, how):
    monkeypatch.setattr(compression, "_ALWAYS", 1_000_000)
    bomb = compressed(b"\0" * 30_000_000, how)
    target = io.BytesIO()
    with pytest.raises(PullError, match="it unpacks to more than"):
        unpack(pieces(bomb), len(bomb), target, tmp_path)
    assert len(target.getvalue()) < 30_000_000


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"digest": "sha256:" + "0" * 64}, "it has the digest sha256:"),
        ({"size": 7}, "bytes, and the manifest says 7"),
    ],
)
def test_blob_that_is_not_the_one_in_the_manifest_is_refused(tmp_path, change, why):
    data = archive([member("x", "x")])
    layer = Descriptor(**{"digest": digest(data), "size": len(data), "media_type": LAYER, **change})
    with blob_of(data, tmp_path) as file, pytest.raises(DamagedBlob, match=why):
        spool(file, layer, digest(data), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_archive_that_is_not_the_one_in_the_configuration_is_refused(tmp_path):
    data = archive([member("x", "x")])
    layer = Descriptor(digest(data), len(data), LAYER)
    with blob_of(data, tmp_path) as file, pytest.raises(PullError, match="and the configuration says"):
        spool(file, layer, "sha256:" + "0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [lambda blob: blob[:40] + b"\xff" * 40 + blob[80:], lambda blob: b"x" + blob[1:]]
)
def test_damaged_blob_is_reported_before_its_compression(tmp_path, change):
    """A blob that an earlier pull left damaged is fetched again; one that was pushed damaged is not."""
    blob = compressed(archive([member("x", os.urandom(3_000_000))]), "gzip")
    layer = Descriptor(digest(blob), len(blob), LAYER)
    with blob_of(change(blob), tmp_path) as file, pytest.raises(DamagedBlob, match="it has the digest"):
        spool(file, layer, "sha256:" + "0" * 64, tmp_path)


def test_archive_that_is_damaged_after_its_headers_is_refused(tmp_path):
    """Headers are read once, and contents later."""
    data = archive([member("x", b"x" * 10_000)])
    source = io.BytesIO(data)
    contents = inspect(source)
    source.truncate(5000)
    with pytest.raises(PullError, match="its archive ends too early"):
        rewrite(io.BytesIO(), source, contents, {})


def test_layers_are_decompressed_one_ahead(tmp_path):
    """Layers that turn out to be stored are skipped, and a layer can be taken twice."""
    archives = [archive([member(name, name * 1000)]) for name in "abcd"]
    layers = [(Descriptor(digest(data), len(data), LAYER), digest(data)) for data in archives]
    opened = []

    def blob(layer):
        opened.append([one.digest for one, _id in layers].index(layer.digest))
        return blob_of(archives[opened[-1]], tmp_path)

    with Spools(blob, layers, tmp_path) as spools:
        for number in (0, 2, 2):
            with spools.take(layers[number]) as found:
                found.seek(0)
                assert found.read() == archives[number]
    assert opened == [0, 1, 2, 3, 2]
