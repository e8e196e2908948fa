"""Signatures of images on a real registry: which pulls they allow, and that nothing is fetched otherwise."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from pytest_microvm.cli import main
from pytest_microvm.errors import ImageError, PullError
from pytest_microvm.images.artifacts import Built
from pytest_microvm.images.kits import load_kit
from pytest_microvm.images.locked import LockedImages
from pytest_microvm.images.oci.signatures import _arrived
from pytest_microvm.images.store import ImageStore, platform_name_and_key
from pytest_microvm.settings import trust as project_trust
from support.oci import ARCHITECTURE, INDEX, OTHER_ARCHITECTURE, LayoutBuilder, archive, member
from support.registry import registry
from support.signatures import Signer, attach, payload

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def signer(tmp_path):
    return Signer(tmp_path / "mine")


@pytest.fixture
def user(server, tmp_path, monkeypatch):
    """A user whose configuration is empty, in an empty folder; returns the file of the configuration."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".config").mkdir()
    (tmp_path / "home" / ".config" / "containers").symlink_to(server.home / ".config" / "containers")
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("XDG_CONFIG_HOME", project_trust.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    give_platform()
    return tmp_path / "home" / ".config" / "pytest-microvm" / "config.toml"


def give_platform():
    def build(made):
        for role in ("kernel", "initramfs", "runtime"):
            (made / role).write_text(role)
        return Built({path.name: path for path in made.iterdir()}, {"python": "3.11"})

    store()._artifacts.get(*platform_name_and_key(load_kit("base")), build, print)


def store():
    return ImageStore(Path(os.environ["PYTEST_MICROVM_CACHE"]))


def demand(user, name, *keys):
    """Configure which keys must have signed images."""
    user.parent.mkdir(exist_ok=True)
    paths = ", ".join(f'"{key}"' for key in keys)
    user.write_text(f'[signatures]\n"{name}" = [{paths}]\n')


class Image:
    """An image on the registry, with a name of its own."""

    def __init__(self, server, folder, *, index=False):
        self.server, self.folder = server, folder
        self.name = f"team/app{next(NUMBERS)}"
        self.identity = f"{server.address}/{self.name}"
        layout = LayoutBuilder(folder / self.name)
        self.push = lambda content: self._push(layout, content, index=index)
        self.push("x")

    def _push(self, layout, content, *, index):
        layout.entries.clear()
        images = [
            layout.image(archive([member(self.name.rpartition("/")[2], content)]), architecture=each)
            for each in ((OTHER_ARCHITECTURE, ARCHITECTURE) if index else (ARCHITECTURE,))
        ]
        self.manifest = images[-1]["digest"]
        found = images[0]
        if index:
            found = layout.document({"schemaVersion": 2, "mediaType": INDEX, "manifests": images}, INDEX)
        self.digest = found["digest"]
        self.reference = self.server.push(layout.publish(found), f"{self.name}:1")

    def attach(self, *signed, digest=""):
        """Store payloads with their signatures."""
        attach(
            self.server, self.folder / f"sig{next(NUMBERS)}", self.name, digest or self.digest, list(signed)
        )

    def sign(self, signer, **claims):
        """Sign it."""
        self.attach(signed(signer, self.digest, self.identity, **claims))


def signed(signer, digest, identity, **claims):
    data = payload(digest, identity, **claims)
    return data, signer.sign(data)


@pytest.fixture
def image(server, tmp_path):
    return Image(server, tmp_path / "images")


def refusal(reference):
    """Return the error of a pull that must not fetch or store anything."""
    with pytest.raises(PullError) as caught:
        store().get(reference)
    assert caught.value.reason == "unverified"
    assert store().list() == []
    images = Path(os.environ["PYTEST_MICROVM_CACHE"]) / "images"
    assert not list(images.glob("downloads/**/*"))
    assert not list(images.glob("artifacts/oci-*"))
    return caught.value


# What is accepted


def test_right_key_is_accepted(user, image, signer):
    image.sign(signer)
    demand(user, image.server.address, signer.public)
    found = store().get(image.reference)
    assert store().get(image.reference).digest == found.digest
    assert store().pull_record(image.reference, Path.cwd())["signed_by"] != ""


def test_signature_of_an_index_is_enough(user, server, tmp_path, signer):
    image = Image(server, tmp_path / "images", index=True)
    image.sign(signer)
    demand(user, image.identity, signer.public)
    assert store().get(image.reference)
    record = store().pull_record(image.reference, Path.cwd())
    assert (record["resolved"], record["manifest"]) == (image.digest, image.manifest)


def test_one_signature_of_several_is_enough(user, image, signer, tmp_path):
    other = Signer(tmp_path / "other")
    image.attach(
        (b"not JSON", "not base64"),
        signed(other, image.digest, image.identity),
        signed(signer, "sha256:" + "0" * 64, image.identity),
        signed(signer, image.digest, f"{image.identity}:1"),
    )
    demand(user, image.server.address, tmp_path / "other" / "key.pub", signer.public)
    assert other.public.is_file()
    assert store().get(image.reference)


def test_image_that_no_rule_is_about_needs_no_signature(user, image, signer):
    demand(user, "registry.example/team", signer.public)
    assert store().get(image.reference)
    layout = LayoutBuilder(Path("oci").absolute())
    folder = layout.publish(layout.image(archive([member("b", "b")])), "1")
    demand(user, "*")
    assert store().get(folder)  # signatures are on registries alone


# What is refused


def test_image_without_a_signature_is_refused(user, image, signer, capsys):
    demand(user, image.server.address, signer.public)
    error = refusal(image.reference)
    assert "signature 1: it has none" in error.details
    assert str(signer.public) in error.details
    assert image.digest in error.details
    assert main(["image", "pull", image.reference]) == 65
    assert "has no signature that your configuration accepts" in capsys.readouterr().err


def test_other_key_is_refused(user, image, signer, tmp_path):
    image.sign(Signer(tmp_path / "other"))
    demand(user, image.server.address, signer.public)
    assert "another key, or damaged" in refusal(image.reference).details


def test_signature_of_another_image_is_refused(user, image, server, signer, tmp_path):
    other = Image(server, tmp_path / "others")
    replayed = signed(signer, other.digest, image.identity)
    image.attach(replayed)
    demand(user, image.server.address, signer.public)
    assert f"it is of another image, {other.digest}" in refusal(image.reference).details


def test_signature_for_another_name_is_refused(user, image, server, signer):
    image.attach(signed(signer, image.digest, f"{server.address}/team/other"))
    demand(user, image.server.address, signer.public)
    assert f"it is for another name, {server.address}/team/other" in refusal(image.reference).details


def test_signature_for_another_tag_is_refused(user, image, signer):
    image.attach(signed(signer, image.digest, f"{image.identity}:2"))
    demand(user, image.server.address, signer.public)
    assert "it is for another name" in refusal(image.reference).details


@pytest.mark.parametrize(
    "change",
    [
        lambda data, text: (data.replace(b"null", b"nul1"), text),
        lambda data, text: (data[:-1], text),
        lambda data, text: (data, text[:-8] + "AAAAAAA="),
        lambda data, _text: (data, "%%%"),
        lambda data, _text: (data, ""),
    ],
    ids=["payload", "shorter", "signature", "no-base64", "empty"],
)
def test_damaged_signature_is_refused(user, image, signer, change):
    image.attach(change(*signed(signer, image.digest, image.identity)))
    demand(user, image.server.address, signer.public)
    assert "another key, or damaged" in refusal(image.reference).details


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 50_000,
        b'{"critical": {"type": 1, "image": {"docker-manifest-digest": 1}, "identity": []}}',
    ],
    ids=["empty", "list", "bytes", "deep", "numbers"],
)
def test_signed_nonsense_is_refused(user, image, signer, data):
    image.attach((data, signer.sign(data)))
    demand(user, image.server.address, signer.public)
    assert "its payload is not one of cosign" in refusal(image.reference).details


@pytest.mark.parametrize("claims", [{"type": "atomic container signature"}, {"more": "x"}])
def test_other_claims_are_refused(user, image, signer, claims):
    image.sign(signer, **claims)
    demand(user, image.server.address, signer.public)
    assert "its payload is not one of cosign" in refusal(image.reference).details


def test_huge_payload_is_refused(user, image, signer):
    data = payload(image.digest, image.identity) + b" " * 300_000
    image.attach((data, signer.sign(data)))
    demand(user, image.server.address, signer.public)
    assert "too many, or too large ones" in refusal(image.reference).details


@pytest.mark.thorough
def test_hundreds_of_signatures_are_refused(user, image, signer):
    payloads = [payload(image.digest, f"{image.identity}:{number}") for number in range(101)]
    image.attach(*((data, signer.sign(data)) for data in payloads))
    demand(user, image.server.address, signer.public)
    assert "too many, or too large ones" in refusal(image.reference).details


def test_registry_that_sends_more_than_announced_is_stopped(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_bytes(b"x" * 1000)
    assert _arrived(tmp_path) == 1000
    with (tmp_path / "blobs" / "b").open("wb") as file:
        file.truncate(100 * 1024**2)
    with pytest.raises(PullError, match="sends more than it announces"):
        _arrived(tmp_path)


def test_signed_tag_that_moved_is_refused(user, image, signer):
    image.sign(signer)
    image.push("y")
    demand(user, image.server.address, signer.public)
    assert "it has none" in refusal(image.reference).details


def test_signatures_of_another_image_at_the_right_place_are_refused(user, image, signer):
    before = image.digest
    entry = signed(signer, before, image.identity)
    image.push("y")
    image.attach(entry)  # the attacker copies them to the new image's tag
    demand(user, image.server.address, signer.public)
    assert f"it is of another image, {before}" in refusal(image.reference).details


def test_rule_without_keys_refuses_all(user, image, signer):
    image.sign(signer)
    demand(user, "*")
    assert "accepted keys: none" in refusal(image.reference).details


# Every way to an image


def test_image_that_was_pulled_before_the_rule_is_verified(user, image, signer, tmp_path):
    first = store().get(image.reference)
    assert main(["image", "pull", image.reference, "--as", "app"]) == 0
    demand(user, image.server.address, signer.public)
    with pytest.raises(PullError, match="has no signature"):
        store().get(image.reference)
    with pytest.raises(ImageError, match="no signature of it that you demand has been verified"):
        store().get("app")
    image.sign(signer)
    assert store().get(image.reference).digest == first.digest
    assert main(["image", "pull", image.reference, "--as", "app"]) == 0
    assert store().get("app").digest == first.digest
    demand(user, image.server.address, Signer(tmp_path / "new").public)  # the old key was withdrawn
    with pytest.raises(PullError, match="has no signature"):
        store().get(image.reference)


def test_locked_digest_needs_a_signature_too(user, image, signer, monkeypatch, tmp_path):
    monkeypatch.setenv(project_trust.VARIABLE, "1")
    Path("pyproject.toml").write_text(f'[tool.pytest-microvm]\nimage = "{image.reference}"\n')
    assert main(["lock"]) == 0
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(tmp_path / "other"))
    give_platform()
    demand(user, image.server.address, signer.public)
    locked = LockedImages(store(), Path.cwd(), "require")
    with pytest.raises(PullError, match="has no signature"):
        locked.get(image.reference)
    image.sign(signer)
    assert locked.get(image.reference)


def test_project_cannot_change_the_rules(user, image, signer):
    demand(user, image.server.address, signer.public)
    Path("config.toml").write_text("[signatures]\n")
    Path("pyproject.toml").write_text("[tool.pytest-microvm]\nsignatures = {}\n")
    refusal(image.reference)
    assert main(["lock", image.reference]) == 4  # the key is unknown


def test_unusable_rules_refuse_the_pull(user, image, capsys):
    demand(user, image.server.address, "no-such.pub")
    assert main(["image", "pull", image.reference]) == 4
    assert "no-such.pub cannot be read" in capsys.readouterr().err
    user.write_text("[signatures")
    assert main(["image", "pull", image.reference]) == 4
    assert str(user) in capsys.readouterr().err
    assert store().list() == []
