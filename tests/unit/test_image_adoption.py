"""An image goes from one computer's store to another's by its digest, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from pytest_microvm.errors import ImageError
from pytest_microvm.images.blobs import canonical_json
from pytest_microvm.images.build_keys import BUILDER_VERSION
from pytest_microvm.images.store import ImageStore

ROLES = ("kernel", "initramfs", "runtime", "rootfs")


def make_manifest(files, **changes):
    values = {
        "format": BUILDER_VERSION,
        "architecture": "x86_64",
        "environment": {"LANG": "C"},
        "files": files,
        "resources": {"cpus": 1, "memory": 512, "disk": 1024},
        **changes,
    }
    return canonical_json(values)


@pytest.fixture
def origin(tmp_path):
    """A store with an image, as a build leaves it."""
    folder = tmp_path / "origin"
    (folder / "images" / "new").mkdir(parents=True)
    store = ImageStore(folder)
    files = {}
    for role in ROLES:
        path = folder / "images" / "new" / role
        path.write_bytes(role.encode() * 1000)
        files[role] = store._artifacts.blobs.add(path)
    return store, store.adopt("base", make_manifest(files), None)


@pytest.fixture
def here(tmp_path):
    return ImageStore(tmp_path / "here")


def from_(store, fetched=None):
    def fetch(digest, path):
        if fetched is not None:
            fetched.append(digest)
        shutil.copy(store._artifacts.blobs.path(digest), path)

    return fetch


def everything_below(root):
    return sorted(path.name for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_an_adopted_image_is_the_same_and_found_by_its_digest(origin, here):
    store, image = origin
    fetched = []
    adopted = here.adopt("base", store.manifest(image), from_(store, fetched))
    assert adopted.digest == image.digest
    assert sorted(fetched) == sorted(path.name for path in image.files().values())
    assert here.get(f"sha256:{image.digest}") == adopted
    assert adopted.rootfs.read_bytes() == image.rootfs.read_bytes()
    assert (adopted.environment, adopted.resources) == (image.environment, image.resources)
    assert [(one.image.name, one.current) for one in here.list()] == [("base", False)]


@pytest.mark.parametrize("written", ["layers", "role"])
def test_layers_go_with_an_image(origin, here, written):
    """Earlier versions wrote the only layer as one more role of the files."""
    store, image = origin
    files = {role: path.name for role, path in image.files().items()}
    one, two = files["kernel"], files["runtime"]  # any files do
    if written == "layers":
        adopted = here.adopt("base", make_manifest(files, layers=[one, two]), from_(store))
        expected = [one, two]
    else:
        adopted = here.adopt("base", make_manifest({**files, "layer": one}), from_(store))
        expected = [one]
    assert [path.name for path in adopted.layers] == expected
    assert adopted.file_systems == (adopted.rootfs, *adopted.layers)
    here.prune()
    assert not adopted.layers[0].exists()


def test_only_what_is_missing_is_fetched(origin, here):
    store, image = origin
    here.adopt("base", store.manifest(image), from_(store))
    path = here.get(f"sha256:{image.digest}").kernel
    path.unlink()
    with pytest.raises(ImageError, match="is not in the cache"):
        here.get(f"sha256:{image.digest}")
    fetched = []
    here.adopt("base", store.manifest(image), from_(store, fetched))
    assert fetched == [path.name]


def test_blob_with_a_wrong_digest_is_refused_and_leaves_no_files(origin, here, tmp_path):
    store, image = origin

    def fetch(digest, path):
        path.write_bytes(
            b"x" if digest == image.runtime.name else (store._artifacts.blobs.path(digest)).read_bytes()
        )

    with pytest.raises(ImageError, match="something else"):
        here.adopt("base", store.manifest(image), fetch)
    assert everything_below(tmp_path / "here") == []
    with pytest.raises(ImageError, match="is not in the cache"):
        here.get(f"sha256:{image.digest}")


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{}",
        make_manifest(dict.fromkeys(ROLES, "../../../etc/passwd")),
        make_manifest({"kernel": "a" * 64}),
        make_manifest(dict.fromkeys(ROLES, "a" * 64), layers="a" * 64),
        make_manifest(dict.fromkeys(ROLES, "a" * 64), layers=["../x"]),
        make_manifest(dict.fromkeys(ROLES, "a" * 64), format=99),
        json.dumps(json.loads(make_manifest(dict.fromkeys(ROLES, "a" * 64)))).encode(),
    ],
)
def test_what_is_no_manifest_is_refused(here, manifest):
    def fetch(_digest, _path):
        pytest.fail("nothing is to be fetched")

    with pytest.raises(ImageError, match="no image of this version"):
        here.adopt("base", manifest, fetch)


def test_a_name_leads_nowhere_else(origin, here):
    store, image = origin
    with pytest.raises(ImageError, match="invalid image name"):
        here.adopt("../../x", store.manifest(image), from_(store))


def test_a_prune_removes_what_was_adopted(origin, here, tmp_path):
    store, image = origin
    here.adopt("base", store.manifest(image), from_(store))
    assert here.prune() == sum(path.stat().st_size for path in image.files().values())
    assert everything_below(tmp_path / "here") == []


def test_an_image_that_is_not_here_has_no_manifest(origin, here):
    _store, image = origin
    with pytest.raises(ImageError, match=f"sha256:{image.digest[:12]}"):
        here.manifest(image)
    unknown = hashlib.sha256(b"").hexdigest()
    with pytest.raises(ImageError, match="run again"):
        here.get(f"sha256:{unknown}")
