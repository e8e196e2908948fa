"""Pulls from a real registry on loopback, from folders and archives: what is stored, kept, and refused."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading

import pytest
import trustme

from pytest_microvm.errors import HostError, PullError
from pytest_microvm.images.artifacts import Artifacts
from pytest_microvm.images.oci.pulling import Puller, drop_downloads
from pytest_microvm.images.oci.references import Platform, parse_reference
from support import guards
from support.oci import (
    ARCHITECTURE,
    INDEX,
    OTHER_ARCHITECTURE,
    LayoutBuilder,
    archive,
    digest,
    folder,
    member,
)
from support.registry import LOGIN, registry

HERE = Platform(ARCHITECTURE)


class Cache:
    """The layers that pulls store, and what pulls said."""

    def __init__(self, root):
        self.root = root
        self.artifacts = Artifacts(root)
        self.said = []

    def pull(self, reference, *, known=lambda _digest: False, timeout=guards.PROCESS, platform=HERE):
        """Pull an image."""
        puller = Puller(self.artifacts, self.root, self.said.append, timeout)
        return puller.pull(parse_reference(reference, self.root), platform, known)

    def refuses(self, reference, **options):
        """Return the error of a pull that stores nothing."""
        with pytest.raises(PullError) as caught:
            self.pull(reference, **options)
        assert not list(self.root.glob("artifacts/*"))
        assert not list(self.root.glob("building/*"))
        return caught.value

    def downloads(self):
        """Return the digests of the blobs that an interrupted pull left."""
        return {f"sha256:{path.name}" for path in self.root.glob("downloads/sha256/*")}


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def layout(tmp_path):
    return LayoutBuilder(tmp_path / "oci")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A registry without TLS and without logins."""
    with registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def user(plain, monkeypatch):
    """The registry, reached as a user whose skopeo knows it."""
    monkeypatch.setenv("HOME", str(plain.home))
    return plain


def layer(name, size=100_000):
    return archive([member(name, os.urandom(size))])


# What is stored


def test_layers_are_stored_once(cache, layout, user):
    common, one, two = layer("common"), layer("one"), layer("two")
    first = user.push(layout.publish(layout.image(common, one), "one"), "team/one:1")
    second = user.push(layout.publish(layout.image(common, two), "two"), "team/two:1")
    found = cache.pull(first)
    blobs = layout.image(common, one)  # the same again, for its digests
    assert found.manifest == found.resolved == blobs["digest"]
    (layout.path / "blobs").rename(layout.path / "gone")
    shared = manifest_of(layout.path / "gone", found.manifest)["layers"][0]["digest"]
    user.blob(shared).unlink()  # the registry has lost what the cache has
    again = cache.pull(second)
    assert again.layers[0] == found.layers[0]
    assert len({*again.layers, *found.layers}) == 3
    assert cache.downloads() == set()


def manifest_of(blobs, name):
    return json.loads((blobs / "sha256" / name.partition(":")[2]).read_text())


def test_image_that_is_known_is_not_fetched(cache, layout, user):
    reference = user.push(layout.publish(layout.image(layer("x")), "known"), "team/known:1")
    found = cache.pull(reference)
    cache.said.clear()
    assert cache.pull(reference, known=lambda resolved: resolved == found.resolved) is None
    assert cache.said == []


def test_image_of_the_platform_comes_from_an_index(cache, layout, user):
    here, there = layer("here"), layer("there")
    entries = [layout.image(there, architecture=OTHER_ARCHITECTURE), layout.image(here)]
    index = layout.document({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}, INDEX)
    reference = user.push(layout.publish(index, "both"), "team/both:1")
    found = cache.pull(reference)
    assert (found.resolved, found.manifest) == (index["digest"], entries[1]["digest"])
    assert cache.pull(f"{reference.rpartition(':')[0]}@{index['digest']}").manifest == entries[1]["digest"]
    other = cache.pull(reference, platform=Platform(OTHER_ARCHITECTURE))
    assert (other.manifest, other.configuration.platform) == (
        entries[0]["digest"],
        f"linux/{OTHER_ARCHITECTURE}",
    )
    assert other.layers != found.layers


def test_interrupted_pull_goes_on_with_whole_blobs(cache, layout, user):
    descriptor = layout.image(layer("first"), layer("second"))
    reference = user.push(layout.publish(descriptor, "twice"), "team/twice:1")
    first, second = (
        one["digest"] for one in manifest_of(layout.path / "blobs", descriptor["digest"])["layers"]
    )
    content = user.blob(second).read_bytes()
    user.blob(second).write_bytes(content[: len(content) // 2])
    assert cache.refuses(reference).reason == "refused"
    assert first in cache.downloads()
    user.blob(second).write_bytes(content)
    user.blob(first).unlink()
    assert len(cache.pull(reference).layers) == 2
    assert cache.downloads() == set()


def test_damaged_rest_of_an_earlier_pull_is_fetched_again(cache, layout, user):
    descriptor = layout.image(layer("x"))
    reference = user.push(layout.publish(descriptor, "rest"), "team/rest:1")
    (blob,) = (one["digest"] for one in manifest_of(layout.path / "blobs", descriptor["digest"])["layers"])
    rest = cache.root / "downloads" / "sha256" / blob.partition(":")[2]
    rest.parent.mkdir(parents=True)
    rest.write_bytes(b"")
    assert len(cache.pull(reference).layers) == 1
    assert any("fetching it again" in line for line in cache.said)


def test_what_an_interrupted_pull_left_can_be_dropped(cache):
    rest = cache.root / "downloads" / "sha256" / ("0" * 64)
    rest.parent.mkdir(parents=True)
    rest.write_bytes(b"12345")
    assert drop_downloads(cache.artifacts, cache.root) == 5
    assert not rest.parent.exists()


def test_progress_tells_layers_and_bytes(cache, layout, user):
    reference = user.push(
        layout.publish(layout.image(layer("a", 3_000_000), layer("b")), "big"), "team/big:1"
    )
    cache.pull(reference)
    assert "downloading: 0 of 2 layers, 0 of 3 MB" in cache.said
    assert "converting layer 1 of 2 (3.0 MB)" in cache.said


def test_archives_need_no_registry(cache, layout, tmp_path):
    reference = layout.publish(layout.image(layer("x"), config={"Cmd": ["/x"]}), "v1")
    target = f"oci-archive:{tmp_path}/image.tar:v1"
    assert cache.refuses(target).reason == "absent"
    subprocess.run(["skopeo", "--insecure-policy", "copy", "-q", reference, target], check=True)
    found = cache.pull(target)
    assert (found.configuration.arguments, len(found.layers)) == (("/x",), 1)


# Layers in a folder


def test_folders_inherit_attributes_from_the_layers_below(cache, layout):
    below = archive([folder("opt", mode=0o2750, uid=5, gid=6), folder("usr"), folder("usr/b", mode=0o700)])
    above = archive([member("opt/app/x", "x"), member("usr/b/y", "y")])
    found = cache.pull(layout.publish(layout.image(below, above), "a"))
    listed = unsquashed(cache, found.layers[1])
    assert listed["opt"] == "drwxr-s--- 5/6"
    assert listed["usr/b"] == "drwx------ 0/0"
    assert listed["opt/app"] == "drwxr-xr-x 0/0"
    other = cache.pull(layout.publish(layout.image(archive([folder("opt", mode=0o711)]), above), "b"))
    assert unsquashed(cache, other.layers[1])["opt"] == "drwx--x--x 0/0"
    assert cache.pull(f"oci:{layout.path}:a").layers == found.layers


@pytest.mark.parametrize(
    "below", [[member("lib", "x")], [folder("usr/lib"), member("lib", type=b"2", linkname="usr/lib")]]
)
def test_folder_that_is_a_link_below_is_refused(cache, layout, below):
    reference = layout.publish(layout.image(archive(below), archive([member("lib/x", "x")])))
    with pytest.raises(PullError, match="something is in it, and it is"):
        cache.pull(reference)


def test_layers_that_change_nothing_or_everything(cache, layout):
    everything = archive([member(".wh..wh..opq"), member("only", "x")])
    found = cache.pull(layout.publish(layout.image(layer("a"), archive([]), layer("b")), "empty"))
    assert len(found.layers) == 2
    found = cache.pull(layout.publish(layout.image(layer("a"), layer("b"), everything), "everything"))
    assert len(found.layers) == 1
    assert len(cache.pull(layout.publish(layout.image(archive([])), "nothing")).layers) == 1


def test_layer_is_another_one_at_the_bottom_if_it_hides_something(cache, layout):
    hiding = archive([folder("d"), member("d/.wh.x"), member("d/y", "y")])
    bottom = cache.pull(layout.publish(layout.image(hiding), "bottom"))
    above = cache.pull(layout.publish(layout.image(archive([member("d/x", "x")]), hiding), "above"))
    assert "d/x" not in unsquashed(cache, bottom.layers[0])
    assert unsquashed(cache, above.layers[1])["d/x"].startswith("c")
    assert cache.pull(f"oci:{layout.path}:bottom").layers == bottom.layers


def unsquashed(cache, layer):
    """Return mode and owner of each path of a stored layer."""
    out = subprocess.run(
        ["unsquashfs", "-lln", cache.artifacts.blobs.path(layer)], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split() for line in out.splitlines() if "squashfs-root/" in line]
    return {row[-1].partition("/")[2]: " ".join(row[:2]) for row in rows}


# Registries that want more


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1: its file, its key's, and its authority's."""
    place = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    paths = place / "chain.pem", place / "key.pem", place / "ca.crt"
    issued.private_key_pem.write_to_path(paths[1])
    for pem in issued.cert_chain_pems:
        pem.write_to_path(paths[0], append=True)
    authority.cert_pem.write_to_path(paths[2])
    return paths


@pytest.fixture
def secured(tmp_path, certificate, monkeypatch):
    """A registry with TLS that wants a login."""
    place = tmp_path / "registry"
    place.mkdir()
    with registry(place, tls=certificate[:2], login=True) as running:
        monkeypatch.setenv("HOME", str(running.home))
        monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
        yield running


def trust(running, certificate):
    """Make the user's skopeo trust the registry's authority."""
    place = running.home / ".config" / "containers" / "certs.d" / running.address
    place.mkdir(parents=True)
    (place / "ca.crt").write_bytes(certificate[2].read_bytes())


def test_registry_with_tls_and_a_login(cache, layout, secured, certificate, monkeypatch):
    reference = f"docker://{secured.address}/team/app:1"
    untrusted = cache.refuses(reference)
    assert (untrusted.reason, "certificate of its registry is not trusted" in untrusted.brief) == (
        "unreachable",
        True,
    )
    assert "certs.d" in untrusted.resolution
    trust(secured, certificate)
    anonymous = cache.refuses(reference)
    assert (anonymous.reason, "skopeo login" in anonymous.resolution) == ("denied", True)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(secured.home / "auth.json"))
    secured.log_in()
    secured.push(layout.publish(layout.image(layer("x")), "app"), "team/app:1")
    assert len(cache.pull(reference).layers) == 1
    assert LOGIN.partition(":")[2] not in repr(cache.said)


def test_wrong_login_is_denied(cache, secured, certificate, monkeypatch):
    trust(secured, certificate)
    auths = {"auths": {secured.address: {"auth": "dGVzdGVyOndyb25n"}}}  # tester:wrong
    (secured.home / "auth.json").write_text(json.dumps(auths))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(secured.home / "auth.json"))
    assert cache.refuses(f"docker://{secured.address}/team/app:1").reason == "denied"


# Refused


def test_image_that_is_not_there(cache, layout, user):
    user.push(layout.publish(layout.image(layer("x")), "here"), "team/here:1")
    for name in ("team/here:2", "team/nowhere:1", f"team/here@sha256:{'0' * 64}"):
        error = cache.refuses(f"docker://{user.address}/{name}")
        assert (error.reason, "has no such image" in error.brief) == ("absent", True)


def test_image_for_another_platform(cache, layout, user):
    reference = layout.publish(layout.image(layer("x"), architecture=OTHER_ARCHITECTURE), "other")
    for known in (reference, user.push(reference, "team/other:1")):
        error = cache.refuses(known)
        assert (error.reason, error.details) == ("absent", f"it is for linux/{OTHER_ARCHITECTURE}")


def damaged(content):
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


@pytest.mark.parametrize(
    "change", [damaged, lambda content: content[:-50], lambda content: content + b"more"]
)
def test_blob_that_the_registry_has_damaged(cache, layout, user, change):
    descriptor = layout.image(layer("x"))
    reference = user.push(layout.publish(descriptor, "broken"), "team/broken:1")
    (blob,) = (one["digest"] for one in manifest_of(layout.path / "blobs", descriptor["digest"])["layers"])
    user.blob(blob).write_bytes(change(user.blob(blob).read_bytes()))
    assert cache.refuses(reference).reason == "refused"
    user.blob(blob).unlink()


def test_manifest_with_another_digest_than_asked_for(cache, layout, user):
    descriptor = layout.image(layer("x"))
    user.push(layout.publish(descriptor, "pinned"), "team/pinned:1")
    stored = user.blob(descriptor["digest"])
    stored.write_bytes(stored.read_bytes().replace(b'"schemaVersion": 2', b'"schemaVersion":  2'))
    error = cache.refuses(f"docker://{user.address}/team/pinned@{descriptor['digest']}")
    assert error.reason in ("refused", "unreachable")
    stored.unlink()


def test_registry_that_hangs(cache):
    with listening(lambda connection: connection.recv(65536)) as port:
        error = cache.refuses(f"docker://127.0.0.1:{port}/team/app:1", timeout=1)
    assert (error.reason, "nothing has arrived for 1 s" in error.brief) == ("unreachable", True)
    assert "--timeout" in error.resolution


def test_registry_that_does_not_answer(cache):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        error = cache.refuses(f"docker://127.0.0.1:{unused.getsockname()[1]}/team/app:1")
    assert (error.reason, "does not answer" in error.brief) == ("unreachable", True)


def test_registry_without_tls_that_nobody_declared(cache, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    error = cache.refuses(f"docker://{plain.address}/team/app:1")
    assert (error.reason, "insecure = true" in error.resolution) == ("unreachable", True)


def test_daemon_that_is_not_there(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    error = cache.refuses("docker-daemon:app:latest")
    assert (error.reason, f"{tmp_path}/none.sock" in error.details) == ("unreachable", True)


def test_skopeo_that_is_not_there(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="container images cannot be pulled: skopeo") as caught:
        cache.pull("docker://registry.example/team/app")
    assert "apt-get install skopeo" in caught.value.resolution


@pytest.mark.parametrize(
    ("change", "reason", "why"),
    [
        (lambda layout: (layout.path / "index.json").unlink(), "absent", "has no file index.json"),
        (lambda layout: (layout.path / "index.json").write_text("[]"), "refused", "no JSON object"),
        (lambda layout: os.mkfifo(swapped(layout.path / "index.json")), "absent", "has no file index.json"),
        (lambda layout: swapped(layout.path / "index.json").symlink_to("/etc/passwd"), "absent", "links are"),
        (lambda layout: blobs_of(layout, lambda path: path.unlink()), "absent", "has no file sha256/"),
        (lambda layout: blobs_of(layout, lambda path: path.write_bytes(b"{}")), "refused", "is not the one"),
    ],
)  # fmt: skip
def test_folder_that_is_damaged_or_hostile(cache, layout, change, reason, why):
    reference = layout.publish(layout.image(layer("x")))
    change(layout)
    error = cache.refuses(reference)
    assert (error.reason, why in str(error)) == (reason, True), error


def swapped(path):
    path.unlink()
    return path


def blobs_of(layout, change):
    for path in (layout.path / "blobs" / "sha256").iterdir():
        change(path)


def test_folder_with_several_images_needs_a_tag(cache, layout):
    layout.publish(layout.image(layer("x")), "one")
    layout.publish(layout.image(layer("y")), "two")
    error = cache.refuses(f"oci:{layout.path}")
    assert (error.reason, error.details) == ("absent", "its tags: one, two")
    assert "no image with the tag three" in cache.refuses(f"oci:{layout.path}:three").brief
    assert cache.pull(f"oci:{layout.path}:two")


def test_layer_is_refused_before_anything_is_stored(cache, layout):
    """The first layer is sound, and is stored; the image is not."""
    good, bad = archive([member("x", "x")]), archive([member("../../x", "x")])
    with pytest.raises(PullError, match="leads out of the image"):
        cache.pull(layout.publish(layout.image(good, bad)))
    assert len(list(cache.root.glob("artifacts/*"))) == 1
    assert not list(cache.root.glob("building/*"))
    assert digest(good)


@contextlib.contextmanager
def listening(answer):
    """A server that treats each connection in its own way; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as open_ones:

        def serve():
            with contextlib.suppress(OSError):  # closed: the test is over
                while True:
                    connection, _address = server.accept()
                    open_ones.enter_context(connection)
                    answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(guards.PROCESS)
