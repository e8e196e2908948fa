"""Pulled images in the image store: how they are found, listed, renewed and removed."""

from __future__ import annotations

import json

import pytest

from pytest_microvm.cli import main
from pytest_microvm.errors import ImageError, KitError, UsageError
from pytest_microvm.images.artifacts import Built
from pytest_microvm.images.build_keys import platform_name_and_key
from pytest_microvm.images.kits import load_kit
from pytest_microvm.images.store import ImageStore
from support.oci import OTHER_ARCHITECTURE, LayoutBuilder, archive, member

CONFIG = {
    "Env": ["PATH=/opt/bin", "A=b"],
    "Entrypoint": ["/app"],
    "Cmd": ["-v"],
    "WorkingDir": "/srv",
    "User": "7",
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store(root):
    """A store with a small platform: no machine boots from it."""
    store = ImageStore(root)
    give_platform(store, "one")
    return store


def give_platform(store, content):
    def build(folder):
        for role in ("kernel", "initramfs", "runtime"):
            (folder / role).write_text(f"{role} {content}")
        return Built({path.name: path for path in folder.iterdir()}, {"python": "3.11"})

    store._artifacts.get(*platform_name_and_key(load_kit("base")), build, print, force=True)


@pytest.fixture
def layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return LayoutBuilder(tmp_path / "oci")


@pytest.fixture
def reference(layout):
    return layout.publish(
        layout.image(archive([member("a", "a")]), archive([member("b", "b")]), config=CONFIG), "v1"
    )


def test_image_has_the_configuration_of_the_container(store, reference, tmp_path):
    image = store.pull(reference, base=tmp_path)
    assert dict(image.environment) == {"PATH": "/opt/bin", "A": "b"}
    assert (image.start.entrypoint, image.start.arguments) == (("/app",), ("-v",))
    assert (image.start.workdir, image.start.user) == ("/srv", "7")
    assert len(image.layers) == 1
    assert image.name == reference


def test_image_is_found_by_reference_name_and_digest(store, reference, tmp_path):
    image = store.pull(reference, base=tmp_path, name="app")
    assert store.get(reference).digest == image.digest
    assert store.get("oci:oci:v1", project=tmp_path).digest == image.digest
    assert (store.get("app").digest, store.get("app").name) == (image.digest, "app")
    assert store.get(f"sha256:{image.digest}").layers == image.layers
    assert {entry.image.name for entry in store.list()} == {"app", reference}
    assert store.inspect("app").reference == store.inspect(reference).reference == reference
    assert all(entry.current for entry in store.list())


def test_missing_image_is_pulled_when_it_is_needed(store, reference):
    said = []
    image = store.get(reference, progress=said.append)
    assert any("converting layer 1 of 2" in line for line in said)
    said.clear()
    assert (store.get(reference, progress=said.append).digest, said) == (image.digest, [])


def test_machines_use_what_was_pulled_last(store, layout, reference, tmp_path):
    first = store.pull(reference, base=tmp_path, name="app")
    layout.entries.clear()
    layout.publish(layout.image(archive([member("c", "c")])), "v1")
    assert store.get(reference).digest == store.get("app").digest == first.digest
    second = store.pull(reference, base=tmp_path)
    assert store.get(reference).digest == second.digest != first.digest
    assert store.get("app").digest == first.digest  # that name was not pulled again
    store.pull(reference, base=tmp_path, name="app")
    assert store.get("app").digest == second.digest
    before = set(store._artifacts.blobs.digests())
    store.prune()
    assert set(store._artifacts.blobs.digests()) < before
    assert store.get("app").digest == second.digest


def test_new_kernel_needs_no_pull(store, layout, reference, tmp_path):
    image = store.pull(reference, base=tmp_path, name="app")
    give_platform(store, "two")
    (layout.path / "index.json").unlink()
    for name in (reference, "app"):
        renewed = store.get(name)
        assert renewed.kernel.read_text() == "kernel two"
        assert (renewed.file_systems, renewed.start) == (image.file_systems, image.start)
    assert {entry.image.digest for entry in store.list()} == {renewed.digest}


def test_damaged_layer_is_pulled_again(store, reference, tmp_path):
    image = store.pull(reference, base=tmp_path, name="app")
    image.layers[0].unlink()
    with pytest.raises(ImageError, match="the pulled image 'app' is damaged"):
        store.get("app")
    assert store.intact(store.get(reference))


def test_removed_image_is_gone_with_its_layers(store, layout, reference, tmp_path):
    image = store.pull(reference, base=tmp_path, name="app")
    other = layout.publish(layout.image(archive([member("a", "a")])), "v2")
    kept = store.pull(other, base=tmp_path)
    assert kept.rootfs == image.rootfs  # they share a layer
    assert store.remove("app") > 0
    assert store.intact(kept)
    assert not image.layers[0].exists()
    with pytest.raises(ImageError, match="there is no image"):
        store.inspect(reference)
    with pytest.raises(KitError, match="there is no kit 'app'"):
        store.get("app")


def test_folder_behind_a_link_of_the_project_is_refused(store, reference, tmp_path):
    (tmp_path / "link").symlink_to("oci")
    for pulls in (
        lambda: store.pull("oci:link:v1", base=tmp_path),
        lambda: store.get("oci:link:v1", project=tmp_path),
    ):
        with pytest.raises(UsageError, match="is a link of the project"):
            pulls()
    assert store.get(reference)


@pytest.mark.parametrize("name", ["App", "../x", "a b", "x" * 100, "docker://x"])
def test_impossible_names_are_refused(store, reference, tmp_path, name):
    with pytest.raises(UsageError, match="invalid name of an image"):
        store.pull(reference, base=tmp_path, name=name)
    assert store.list() == []


def test_names_of_kits_are_not_given_away(store, reference, tmp_path):
    with pytest.raises(UsageError, match="a kit is called 'python', too"):
        store.pull(reference, base=tmp_path, name="python")
    store.pull(reference, base=tmp_path, name="app")
    kit = tmp_path / "microvm" / "kits" / "app" / "kit.toml"
    kit.parent.mkdir(parents=True)
    kit.write_text('parent = "base"\n')
    with pytest.raises(KitError, match="'app' is the name of a kit, and of a pulled image"):
        store.get("app", project=tmp_path)
    assert store.get("app").name == "app"


# The command line


@pytest.mark.usefixtures("store")
def test_pull_list_inspect_and_remove(layout, reference, capsys):
    assert main(["image", "pull", "oci:oci:v1", "--as", "app"]) == 0
    out, err = capsys.readouterr()
    digest = out.split()[1]
    assert out == f"app {digest}\n"
    assert f"{reference}: converting layer 2 of 2" in err
    assert main(["image", "list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["app", digest[:12]] == rows[1][:2]
    assert rows[1][-1] == reference
    assert main(["image", "inspect", "oci:oci:v1"]) == 0
    shown = capsys.readouterr().out
    assert f"reference     {reference}\n" in shown
    assert f"manifest      {layout.entries[0]['digest']}\n" in shown
    assert "entrypoint    /app\narguments     -v\nworkdir       /srv\nuser          7\n" in shown
    assert main(["image", "inspect", "app", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["reference"], answer["kit"], answer["start"]["user"]) == (reference, "", "7")
    assert main(["image", "remove", "app"]) == 0
    assert capsys.readouterr().out.startswith("removed app, freed")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["docker://"], 4, "invalid image reference"),
        (["oci:oci:v1", "--platform", "linux/riscv64"], 4, "invalid platform"),
        (["oci:oci:v1", "--platform", f"linux/{OTHER_ARCHITECTURE}"], 66, "has no image for"),
        (["oci:oci:v1", "--timeout", "0"], 4, "invalid time"),
        (["oci:oci:v1", "--as", "base"], 4, "a kit is called 'base'"),
        (["oci:nowhere"], 66, "cannot be read"),
        (["oci:oci:v2"], 66, "no image with the tag v2"),
        (["oci:oci:bad"], 1, "leads out of the image"),
    ],
)
@pytest.mark.usefixtures("store", "reference")
def test_failed_pulls_have_a_status_each(layout, capsys, words, status, said):
    layout.publish(layout.image(archive([member("../x", "x")])), "bad")
    assert main(["image", "pull", *words]) == status
    out, err = capsys.readouterr()
    assert (out, said in err) == ("", True), err
