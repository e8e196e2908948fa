"""Layers of mirrored environments, packed by mksquashfs and looked at with unsquashfs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_microvm.errors import BuildError
from pytest_microvm.images.blobs import canonical_json, sha256_file
from pytest_microvm.images.build_keys import BUILDER_VERSION
from pytest_microvm.images.mirror.environment import environment_at
from pytest_microvm.images.mirror.layer import build_layer, libraries_unchanged
from pytest_microvm.images.mirror.selection import select
from pytest_microvm.images.store import ImageStore

MULTIARCH = f"{os.uname().machine}-linux-gnu"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """A virtual environment of this Python, with a package of its own."""
    prefix = tmp_path_factory.mktemp("environment") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    site = next((prefix / "lib").glob("python3*")) / "site-packages"
    (site / "own.py").write_text("value = 1\n")
    subprocess.run([prefix / "bin/python", "-m", "py_compile", site / "own.py"], check=True)
    (site / "stale.py").write_text("value = 1\n")
    subprocess.run([prefix / "bin/python", "-m", "py_compile", site / "stale.py"], check=True)
    (site / "stale.py").write_text("value = 22\n")
    (prefix / "bin" / "tool").write_text("#!/bin/sh\n")
    (prefix / "bin" / "tool").chmod(0o6755)
    return prefix


def rootfs(folder, libraries):
    """Return a squashfs whose folder of libraries has the given files."""
    for name, content in libraries.items():
        path = folder / "root" / "usr" / "lib" / MULTIARCH / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "root").mkdir(exist_ok=True)
    target = folder / "rootfs.squashfs"
    subprocess.run(["mksquashfs", folder / "root", target, "-quiet", "-no-progress"], check=True)
    return target


def layer(folder, prefix, libraries):
    environment = environment_at(prefix)
    (folder / "out").mkdir()
    return build_layer(folder / "out", environment, select(environment), [rootfs(folder, libraries)])


def listed(path):
    out = subprocess.run(["unsquashfs", "-lln", path], capture_output=True, text=True, check=True).stdout
    rows = (
        re.match(r"(\S+)\s+(\S+)\s+\d+\s+\S+\s+\S+\s+squashfs-root/?(.*)", line) for line in out.splitlines()
    )
    return {row[3].partition(" -> ")[0]: (row[1], row[2]) for row in rows if row}


def below(path):
    return str(path).lstrip("/")


def test_layer_has_the_environment_at_its_paths(tmp_path, prefix):
    path, _libraries = layer(tmp_path, prefix, {})
    found = listed(path)
    site = next((prefix / "lib").glob("python3*/site-packages"))
    assert below(prefix / "bin/python") in found
    assert below(os.path.realpath(sys.executable)) in found
    assert [name for name in found if re.fullmatch(rf"{below(site)}/__pycache__/own\..*\.pyc", name)]
    assert not [name for name in found if "/stale." in name and name.endswith(".pyc")]
    assert {owner for _mode, owner in found.values()} == {"0/0"}
    assert found[below(prefix / "bin/tool")][0] == "-rwxr-xr-x"  # no set-user-id bit
    assert found["tmp"][0] == ("drwxrwxrwt" if Path("/tmp").stat().st_mode & 0o1000 else found["tmp"][0])


def test_layer_can_be_read_back(tmp_path, prefix):
    path, _libraries = layer(tmp_path, prefix, {})
    name = below(next((prefix / "lib").glob("python3*/site-packages")) / "own.py")
    told = subprocess.run(["unsquashfs", "-cat", path, name], capture_output=True, check=True).stdout
    assert told == b"value = 1\n"


def test_packages_of_the_image_are_hidden(tmp_path, prefix):
    path, _libraries = layer(tmp_path, prefix, {})
    subprocess.run(
        ["unsquashfs", "-q", "-n", "-d", tmp_path / "all", path], check=True, stdout=subprocess.DEVNULL
    )
    site = tmp_path / "all" / below(next((prefix / "lib").glob("python3*/site-packages")))
    assert os.getxattr(site, "trusted.overlay.opaque") == b"y"
    with pytest.raises(OSError, match="No data available"):
        os.getxattr(site.parent.parent, "trusted.overlay.opaque")


@pytest.mark.parametrize("minor", [1, 999])
def test_newer_c_library_serves_both(tmp_path, prefix, minor):
    """glibc runs programs made for an older one, and not the other way round."""
    own = {"libc.so.6": b"\0GLIBC_2.%d\0" % minor, "libm.so.6": b"the image's"}
    path, described = layer(tmp_path, prefix, own)
    names = {name.rpartition("/")[2] for name in listed(path)}
    assert ("libc.so.6" in names, "libm.so.6" in names) == ((True, True) if minor == 1 else (False, False))
    assert ("/libc.so.6" in described) == (minor == 1)
    assert libraries_unchanged(described)


def test_folders_of_the_image_are_not_hidden(tmp_path, prefix):
    """As of an image with musl: /lib has its loader. The layer's programs find theirs all the same."""
    for name in ("lib", "lib64", "usr/lib64"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "root" / "sbin").symlink_to("usr/sbin")
    path, _libraries = layer(tmp_path, prefix, {})
    found = listed(path)
    assert "lib" not in found or found["lib"][0].startswith("d")
    assert found[f"lib/{MULTIARCH}/libc.so.6"][0].startswith("l")
    loaders = [name for name in found if name.startswith("lib64/ld-linux")]
    assert [found[name][0][0] for name in loaders] == ["l"]


def test_changed_library_is_noticed(tmp_path):
    library = tmp_path / "libown.so.1"
    library.write_bytes(b"first")
    stamp = f'{{"{library}": [5, {library.stat().st_mtime_ns}]}}'
    assert libraries_unchanged(stamp)
    library.write_bytes(b"second")
    assert not libraries_unchanged(stamp)
    library.unlink()
    assert not libraries_unchanged(stamp)


def test_file_that_goes_away_meanwhile_is_an_error_with_its_name(tmp_path, prefix):
    environment = environment_at(prefix)
    chosen = select(environment)
    gone = prefix / "gone.txt"
    gone.write_text("x")
    chosen.add(str(gone))
    gone.unlink()
    with pytest.raises(BuildError, match=rf"{gone} changed while it was copied"):
        build_layer(tmp_path, environment, chosen, [rootfs(tmp_path, {})])


def test_damaged_image_is_an_error(tmp_path, prefix):
    environment = environment_at(prefix)
    (tmp_path / "rootfs").write_bytes(b"no squashfs")
    with pytest.raises(BuildError, match="unsquashfs failed"):
        build_layer(tmp_path, environment, select(environment), [tmp_path / "rootfs"])


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "cache")


@pytest.fixture
def image(store, tmp_path):
    """An image of four small files, stored as from another computer."""
    files = {"rootfs": rootfs(tmp_path, {})}
    for role in ("kernel", "initramfs", "runtime"):
        files[role] = tmp_path / role
        files[role].write_text(role)
    by_digest = {sha256_file(path): path for path in files.values()}
    manifest = {
        "format": BUILDER_VERSION,
        "architecture": os.uname().machine,
        "environment": {"PATH": "/usr/bin:/bin"},
        "files": {role: sha256_file(path) for role, path in files.items()},
        "resources": {"cpus": 1, "memory": 512 * 1024**2, "disk": 1024**3},
    }

    def fetch(digest, path):
        path.write_bytes(by_digest[digest].read_bytes())

    return store.adopt("plain", canonical_json(manifest), fetch)


def test_environment_is_laid_over_an_image(store, image, prefix):
    told = []
    found = store.mirrored(image, environment_at(prefix), progress=told.append)
    (layer,) = found.layers
    assert found.files() == {**image.files(), "layer1": layer}
    assert found.file_systems == (image.rootfs, layer)
    assert dict(found.environment) == {"PATH": f"{prefix}/bin:/usr/bin:/bin", "VIRTUAL_ENV": str(prefix)}
    assert re.fullmatch(r"env \(CPython 3\.\d+\.\d+, 0 packages\)", found.python)
    assert any(re.search(r"mirroring env .*: \d+ files, \d+ MB", line) for line in told)
    told.clear()
    assert store.mirrored(image, environment_at(prefix), progress=told.append) == found
    assert told == []  # found again, not packed again
    assert store.get(f"sha256:{found.digest}").layers == found.layers


def test_changed_environment_makes_a_new_image_and_old_ones_go(store, image, prefix):
    site = next((prefix / "lib").glob("python3*")) / "site-packages"
    digests = []
    for number in range(5):
        (site / "changing.py").write_text(f"value = {number + 10}\n" * (number + 1))
        digests.append(store.mirrored(image, environment_at(prefix)).digest)
    (site / "changing.py").unlink()
    assert len(set(digests)) == 5
    stored = {entry.image.digest for entry in store.list()}
    assert stored == {image.digest, *digests[2:]}
    assert len(store.mirrored(image, environment_at(prefix)).layers) == 1


def test_image_of_an_environment_that_is_gone_is_pruned(store, image, prefix, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", prefix, copy], check=True)
    found = store.mirrored(image, environment_at(copy))
    store.prune()
    assert [entry.image.digest for entry in store.list() if entry.image.python] == [found.digest]
    subprocess.run(["rm", "-r", copy], check=True)
    store.prune()
    assert [entry for entry in store.list() if entry.image.python] == []
