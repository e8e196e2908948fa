"""Built images go through a real registry on loopback to another store: whole and the same, or not at all."""

from __future__ import annotations

import json
import os
import socket

import pytest

from pytest_microvm.cli import main
from pytest_microvm.errors import ImageError, PullError, UsageError
from pytest_microvm.images.artifacts import Built
from pytest_microvm.images.blobs import canonical_json
from pytest_microvm.images.build_keys import BUILDER_VERSION, platform_name_and_key
from pytest_microvm.images.image import Image
from pytest_microvm.images.kits import load_kit
from pytest_microvm.images.oci.built import ARTIFACT, artifact_of
from pytest_microvm.images.oci.pushing import write_layout
from pytest_microvm.images.store import ImageStore
from pytest_microvm.programs.needed import architecture
from support import guards
from support.oci import LayoutBuilder, archive, digest, member
from support.registry import registry

ROLES = ("kernel", "initramfs", "runtime", "rootfs")
OTHER_MACHINE = {"x86_64": "aarch64", "aarch64": "x86_64"}[architecture()]


class Computer:
    """A computer with a store of its own."""

    def __init__(self, root):
        self.root = root
        self.store = ImageStore(root)
        self.said = []

    def built(self, name="kit", **changes):
        """Store an image as a build leaves it; no machine boots from it."""
        new = self.root / "images" / "new"
        new.mkdir(parents=True, exist_ok=True)
        files = {}
        for role in (*ROLES, "layer"):
            (new / role).write_bytes(os.urandom(100_000))
            files[role] = self.store._artifacts.blobs.add(new / role)
        layers = [files.pop("layer")]
        values = {
            "format": BUILDER_VERSION,
            "architecture": architecture(),
            "environment": {"LANG": "C.UTF-8"},
            "files": files,
            "layers": layers,
            "resources": {"cpus": 1, "memory": 512 * 1024**2, "disk": 2 * 1024**3},
            **changes,
        }
        return self.store.adopt(name, canonical_json(values), None)

    def push(self, image, target):
        """Push an image; return its reference by digest."""
        return self.store.push(image, target, timeout=guards.PROCESS, progress=self.said.append)

    def pull(self, reference, **options):
        """Pull an image."""
        options = {"timeout": guards.PROCESS, **options}
        return self.store.pull(str(reference), base=self.root, progress=self.said.append, **options)

    def files(self):
        """Return the names of all files but locks."""
        return sorted(path.name for path in self.root.rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.fixture
def here(tmp_path):
    return Computer(tmp_path / "here")


@pytest.fixture
def there(tmp_path):
    return Computer(tmp_path / "there")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A registry without TLS and without logins."""
    with registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def hub(plain, monkeypatch):
    """The registry, reached as a user whose skopeo knows it."""
    monkeypatch.setenv("HOME", str(plain.home))
    return plain


def contents(image: Image):
    return {role: path.read_bytes() for role, path in image.files().items()}


def blobs_of(hub, reference):
    """Return the digests of an artifact's files by their media types."""
    document = json.loads(hub.blob(reference.digest).read_text())
    return {one["mediaType"]: one["digest"] for one in document["layers"]}


# There and back


def test_pushed_image_is_the_same_on_another_computer(here, there, hub):
    image = here.built()
    pushed = here.push(image, f"{hub.address}/team/kit:1")
    assert str(pushed) == f"docker://{hub.address}/team/kit@{pushed.digest}"
    assert any("uploading: 0 of" in line for line in here.said)
    pulled = there.pull(f"docker://{hub.address}/team/kit:1", name="team-kit")
    assert (pulled.digest, contents(pulled)) == (image.digest, contents(image))
    assert (pulled.environment, pulled.resources) == (image.environment, image.resources)
    assert any("storing file 5 of 5 (0.1 MB)" in line for line in there.said)
    for name in ("team-kit", f"sha256:{image.digest}", f"docker://{hub.address}/team/kit:1"):
        assert there.store.get(name).digest == image.digest
    (entry,) = (entry for entry in there.store.list() if entry.image.name == "team-kit")
    assert (entry.current, entry.manifest) == (True, pushed.digest)
    there.store.prune()
    assert there.store.intact(there.store.get("team-kit"))


def test_second_pull_fetches_nothing(here, there, hub):
    pushed = here.push(here.built(), f"{hub.address}/team/twice:1")
    there.pull(pushed)
    there.said.clear()
    assert there.pull(f"docker://{hub.address}/team/twice:1").digest == there.pull(pushed).digest
    assert not any("storing" in line or "downloading" in line for line in there.said)


def test_only_missing_files_are_fetched(here, there, hub):
    image = here.built()
    pushed = here.push(image, f"{hub.address}/team/some:1")
    there.pull(pushed).kernel.unlink()
    for kind, blob in blobs_of(hub, pushed).items():
        if "kernel" not in kind:
            hub.blob(blob).unlink()  # the registry has lost what the store has
    assert contents(there.pull(pushed)) == contents(image)


@pytest.mark.thorough
def test_files_that_the_registry_has_are_shared_by_images(here, hub):
    first = here.built()
    manifest = json.loads(here.store.manifest(first))
    second = here.store.adopt("kit", canonical_json({**manifest, "environment": {"A": "b"}}), None)
    pushed = [
        here.push(image, f"{hub.address}/team/shared:{tag}") for tag, image in enumerate((first, second))
    ]
    assert pushed[0].digest != pushed[1].digest
    assert blobs_of(hub, pushed[0]) == blobs_of(hub, pushed[1])


def test_pulled_container_image_can_be_pushed(here, there, hub, tmp_path):
    def build(folder):
        for role in ("kernel", "initramfs", "runtime"):
            (folder / role).write_text(f"{role} of {folder}")
        return Built({path.name: path for path in folder.iterdir()}, {"python": "3.11"})

    for computer in (here, there):
        computer.store._artifacts.get(*platform_name_and_key(load_kit("base")), build, print)
    layout = LayoutBuilder(tmp_path / "oci")
    config = {"Entrypoint": ["/app"], "Cmd": ["-v"], "User": "7", "WorkingDir": "/srv", "Env": ["A.B=c"]}
    layers = [archive([member(name, name)]) for name in "ab"]
    image = here.pull(layout.publish(layout.image(*layers, config=config)))
    pulled = there.pull(here.push(image, f"{hub.address}/team/app:1"))
    assert (pulled.digest, pulled.start, dict(pulled.environment)["A.B"]) == (image.digest, image.start, "c")
    assert pulled.kernel.read_text() == image.kernel.read_text()  # not this computer's own
    assert there.store.get(f"docker://{hub.address}/team/app@{pulled_digest(there)}").digest == image.digest


def pulled_digest(computer):
    return next(entry.manifest for entry in computer.store.list() if entry.manifest)


def test_image_of_an_index_is_found(here, there, hub, tmp_path):
    """An index can name an artifact for each platform, which other programs make."""
    image = here.built()
    layout = LayoutBuilder(tmp_path / "oci")
    data = here.store.manifest(image)
    sizes = {path.name: path.stat().st_size for path in image.files().values()}
    for path in image.files().values():
        layout.blob(path.read_bytes(), "")
    layout.blob(data, "")
    kind = "application/vnd.oci.image.manifest.v1+json"
    document = layout.document(artifact_of(data, sizes), kind)
    assert there.pull(layout.publish(document, "v1")).digest == image.digest


# What is not pushed


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"network": ["pip"]}, "it allows its machines network access"),
        ({"python": "CPython 3.11 of this computer"}, "unknown key 'python'"),
    ],
)
def test_image_with_rights_or_an_environment_of_this_computer_is_not_pushed(here, hub, changes, why):
    with pytest.raises(UsageError, match="cannot be pushed") as caught:
        here.push(here.built(**changes), f"{hub.address}/team/none:1")
    assert why in str(caught.value)


def test_image_that_is_damaged_is_not_pushed(here, hub):
    image = here.built()
    image.kernel.chmod(0o644)
    image.kernel.write_bytes(b"changed")
    with pytest.raises(ImageError, match="is not in the cache, or is damaged"):
        here.push(image, f"{hub.address}/team/damaged:1")


# What is refused


def test_file_that_the_registry_has_exchanged_is_refused(here, there, hub):
    pushed = here.push(here.built(), f"{hub.address}/team/exchanged:1")
    for kind, blob in blobs_of(hub, pushed).items():
        if "rootfs" in kind:
            data = hub.blob(blob).read_bytes()
            hub.blob(blob).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(PullError) as caught:
        there.pull(pushed)
    assert caught.value.reason == "refused"
    assert not list(there.root.glob("images/names/*"))
    assert not list(there.root.glob("images/blobs/sha256/*"))


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"x" + data[1:], lambda _data: b""],
)
def test_file_of_a_folder_that_is_another_one_is_refused(here, there, tmp_path, change):
    image = here.built()
    write_layout(tmp_path / "layout", here.store.manifest(image), set(image.files().values()))
    for blob in (tmp_path / "layout/blobs/sha256").iterdir():
        data = blob.read_bytes()
        blob.unlink()  # links are not followed
        blob.write_bytes(change(data) if blob.name == image.runtime.name else data)
    with pytest.raises(PullError, match=f"layer sha256:{image.runtime.name[:12]} of the image is refused"):
        there.pull(f"oci:{tmp_path}/layout")
    assert there.files() == []


def test_links_of_a_folder_are_not_followed(here, there, tmp_path):
    image = here.built()
    write_layout(tmp_path / "layout", here.store.manifest(image), set(image.files().values()))
    with pytest.raises(PullError, match="links are not followed"):
        there.pull(f"oci:{tmp_path}/layout")


def test_rest_of_an_interrupted_pull_is_fetched_again(here, there, hub):
    image = here.built()
    pushed = here.push(image, f"{hub.address}/team/rest:1")
    rest = there.root / "images/downloads/sha256" / image.kernel.name
    rest.parent.mkdir(parents=True)
    rest.write_bytes(b"the beginning")
    assert contents(there.pull(pushed)) == contents(image)
    assert any("fetching it again" in line for line in there.said)


def test_image_of_another_architecture_is_not_stored(here, there, hub):
    image = here.built(architecture=OTHER_MACHINE)
    pushed = here.push(image, f"{hub.address}/team/other:1")
    with pytest.raises(PullError, match="has no image for") as caught:
        there.pull(pushed)
    assert caught.value.reason == "absent"
    assert there.files() == []
    platform = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}[OTHER_MACHINE]
    assert there.pull(pushed, platform=platform).architecture == OTHER_MACHINE


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 99}, "another format"),
        ({"network": ["all"]}, "network access"),
        ({"resources": {"cpus": 1}}, "resources: expected"),
        ({"environment": {"\x1b[2J=": "x"}}, "invalid variable"),
    ],
)
def test_hostile_image_is_refused_before_a_file_is_fetched(there, hub, tmp_path, changes, why):
    layout = LayoutBuilder(tmp_path / "oci")
    files = {role: digest(role.encode()).partition(":")[2] for role in ROLES}
    resources = {"cpus": 1, "memory": 512 * 1024**2, "disk": 2 * 1024**3}
    values = {"format": BUILDER_VERSION, "architecture": architecture(), "environment": {}, "files": files}
    data = canonical_json({**values, "resources": resources, **changes})
    layout.blob(data, "")
    for role in ROLES:
        layout.blob(role.encode(), "")
    document = artifact_of(data, {files[role]: len(role) for role in ROLES})
    kind = "application/vnd.oci.image.manifest.v1+json"
    reference = hub.push(layout.publish(layout.document(document, kind), "bad"), "team/hostile:1")
    with pytest.raises(PullError, match="is refused") as caught:
        there.pull(reference)
    assert (caught.value.reason, why in str(caught.value)) == ("refused", True)
    assert "\x1b" not in str(caught.value)
    assert there.files() == []


# The command line, and registries that want more


@pytest.fixture
def cache(here, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(here.root))
    monkeypatch.chdir(tmp_path)
    return here


def test_push_and_pull_by_the_command_line(cache, there, hub, capsys, monkeypatch):
    image = cache.built()
    assert main(["image", "push", f"sha256:{image.digest}", f"{hub.address}/team/cli"]) == 0
    reference, said = capsys.readouterr().out.split()
    assert (reference.startswith(f"docker://{hub.address}/team/cli@sha256:"), said) == (True, image.digest)
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(there.root))
    assert main(["image", "pull", reference, "--as", "cli"]) == 0
    assert capsys.readouterr().out == f"cli {image.digest}\n"
    assert main(["image", "inspect", "cli", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["manifest"], shown["current"]) == (reference.rpartition("@")[2], True)


def test_failed_pushes_have_a_status_each(cache, hub, capsys, tmp_path, monkeypatch):
    image = f"sha256:{cache.built().digest}"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        silent = f"127.0.0.1:{unused.getsockname()[1]}"
        assert main(["image", "push", image, f"{silent}/team/kit"]) == 75
    assert (
        f"docker://{silent}/team/kit cannot be pushed: its registry does not answer"
        in capsys.readouterr().err
    )
    assert main(["image", "push", image, "team/kit"]) == 4
    assert "invalid name of a pushed image" in capsys.readouterr().err
    (tmp_path / "closed").mkdir()
    with registry(tmp_path / "closed", login=True) as closed:
        monkeypatch.setenv("HOME", str(closed.home))
        monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
        assert main(["image", "push", image, f"{closed.address}/team/kit"]) == 77
        assert "skopeo login" in capsys.readouterr().err
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(closed.home / "auth.json"))
        closed.log_in()
        assert main(["image", "push", image, f"{closed.address}/team/kit"]) == 0
    assert hub.address not in capsys.readouterr().err


def test_registry_that_hangs_while_it_is_pushed_to(cache, capsys):
    image = f"sha256:{cache.built().digest}"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}/team/kit"
        assert main(["image", "push", image, target, "--timeout", "1"]) == 75
    assert "nothing has arrived for 1 s" in capsys.readouterr().err


def test_artifact_is_told_apart_by_other_programs(here, hub):
    """Its kind is the one that registries show."""
    pushed = here.push(here.built(), f"{hub.address}/team/kind:1")
    document = json.loads(hub.blob(pushed.digest).read_text())
    assert document["artifactType"] == ARTIFACT
    assert document["config"]["digest"] == f"sha256:{here.store.list()[0].image.digest}"
