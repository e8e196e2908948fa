"""``microvm.lock`` and ``--locked`` with a real registry and store: each change is named."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_microvm.ci.github.inputs import Inputs
from pytest_microvm.ci.github.steps import _images
from pytest_microvm.cli import main
from pytest_microvm.errors import LockError, PullError, UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.images.artifacts import Built
from pytest_microvm.images.kits import host_architecture, load_kit
from pytest_microvm.images.lock_file import FILE
from pytest_microvm.images.locked import LockedImages
from pytest_microvm.images.oci.layer import CONVERTER
from pytest_microvm.images.store import ImageStore, _key, platform_name_and_key
from pytest_microvm.settings import trust as project_trust
from support.locks import changed, leaves
from support.oci import ARCHITECTURE, INDEX, OTHER_ARCHITECTURE, LayoutBuilder, archive, member
from support.registry import registry
from support.repositories import commit, git

HERE = host_architecture()
STATUS = "Package: {}\nStatus: install ok installed\nArchitecture: amd64\nVersion: {}\n\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def project(tmp_path, monkeypatch, server):
    """The current folder: a project whose user trusts it, with a small platform in the cache."""
    monkeypatch.setenv("HOME", str(server.home))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv(project_trust.VARIABLE, "1")
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    new_cache(tmp_path / "cache", monkeypatch)
    return tmp_path / "project"


def new_cache(folder, monkeypatch):
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(folder))
    store = ImageStore(folder)

    def build(made):
        for role in ("kernel", "initramfs", "runtime"):
            (made / role).write_text(role)
        return Built({path.name: path for path in made.iterdir()}, {"python": "3.11"})

    store._artifacts.get(*platform_name_and_key(load_kit("base")), build, print)
    return store


def store():
    return ImageStore(Path(os.environ["PYTEST_MICROVM_CACHE"]))


def configure(project, image):
    (project / "pyproject.toml").write_text(f'[tool.pytest-microvm]\nimage = "{image}"\n')


@pytest.fixture
def pushed(server, tmp_path, request):
    """Push another image to the same tag, and return its reference; images are in an index."""
    layout = LayoutBuilder(tmp_path / "oci")

    def push(content):
        layout.entries.clear()
        layers = archive([member("a", content)]), archive([member("b", "b")])
        images = [layout.image(*layers, architecture=each) for each in (OTHER_ARCHITECTURE, ARCHITECTURE)]
        index = layout.document({"schemaVersion": 2, "mediaType": INDEX, "manifests": images}, INDEX)
        return server.push(layout.publish(index), f"team/{request.node.name.partition('[')[0].lower()}:1")

    return push


def read(project):
    return json.loads((project / FILE).read_text())


def write(project, content):
    (project / FILE).write_text(json.dumps(content))


def named(capsys, *words):
    """Return what a check of the lock, which fails, says."""
    capsys.readouterr()
    assert main(["lock", "--check", *words]) != 0
    return capsys.readouterr().err


def each_leaf(project, name):
    """Yield the name of each value of an image's pins, while the lock file has another value there."""
    content = read(project)
    pins = content["images"][name][HERE]
    for field in leaves(pins):
        other = changed(pins, field)
        write(project, {**content, "images": {name: {HERE: other}}})
        yield field
    write(project, content)


# Container images


def test_one_byte_of_any_field_of_a_container_image_is_named(project, pushed, capsys):
    reference = pushed("one")
    configure(project, reference)
    assert main(["lock"]) == 0
    pins = read(project)["images"][reference][HERE]
    assert pins["reference"] == reference
    assert pins["index"] != pins["manifest"]
    assert len(pins["diff_ids"]) == len(pins["file_systems"]) == 2
    assert main(["lock", "--check"]) == 0
    tried = 0
    for field in each_leaf(project, reference):
        said = named(capsys)
        assert field.partition("[")[0] in said, field
        tried += 1
    assert tried == len(leaves(pins)) >= 14
    assert main(["lock", "--check"]) == 0


def test_error_names_image_field_both_values_and_the_next_step(project, pushed):
    reference = pushed("one")
    configure(project, reference)
    assert main(["lock"]) == 0
    content = read(project)
    pins = content["images"][reference][HERE]
    before, pins["configuration"] = pins["configuration"], "sha256:" + "0" * 64
    write(project, content)
    with pytest.raises(LockError) as caught:
        LockedImages(store(), project, "require").get(reference)
    error = caught.value
    assert error.brief == f"image {reference} is not the one that microvm.lock pins"
    assert error.details == f'configuration: locked "sha256:{"0" * 64}", now "{before}"'
    assert "image pull REF --locked" in error.resolution
    assert "pytest-microvm lock" in error.resolution


@pytest.mark.parametrize("role", ["kernel", "initramfs", "runtime", "file_systems[0]", "file_systems[1]"])
def test_one_byte_of_a_stored_file_is_named(project, pushed, capsys, role):
    reference = pushed("one")
    configure(project, reference)
    assert main(["lock"]) == 0
    files = store().get(reference).files()
    path = files[{"file_systems[0]": "rootfs", "file_systems[1]": "layer1"}.get(role, role)]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    said = named(capsys)
    assert f'{role}: locked "sha256:{path.name}", now "sha256:' in said
    assert "without --locked" in said


def test_moved_tag_is_named_and_the_locked_image_can_be_had(project, pushed, capsys):
    reference = pushed("one")
    configure(project, reference)
    assert main(["lock"]) == 0
    first = store().get(reference).digest
    pushed("two")
    assert main(["lock", "--check"]) == 0  # machines use what was pulled last
    assert main(["image", "pull", reference]) == 0  # looks the tag up
    said = named(capsys)
    assert "index: locked" in said
    assert "manifest: locked" in said
    assert main(["image", "pull", reference, "--locked"]) == 0
    assert store().get(reference).digest == first
    assert main(["lock", "--check"]) == 0


def test_missing_image_is_pulled_at_the_locked_digest(project, pushed, tmp_path, monkeypatch):
    reference = pushed("one")
    configure(project, reference)
    assert main(["lock"]) == 0
    digest = store().get(reference).digest
    pushed("two")
    for number, use in enumerate(("follow", "require")):
        other = new_cache(tmp_path / f"other-{number}", monkeypatch)
        assert LockedImages(other, project, use).get(reference).digest == digest
    other = new_cache(tmp_path / "no-lock", monkeypatch)
    assert LockedImages(other, project, "ignore").get(reference).digest != digest


def test_root_folder_of_a_layer_has_its_newest_time(project, tmp_path):
    """Not the time of the conversion: the same layer must become the same file everywhere."""
    layout = LayoutBuilder(tmp_path / "times")
    layer = archive([member("a", "a", mtime=1_000_000_000), member("b", "b", mtime=900_000_000)])
    image = store().get(layout.publish(layout.image(layer), "1"), project=project)
    listed = subprocess.run(
        ["unsquashfs", "-lln", image.rootfs], env={**os.environ, "TZ": "UTC"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    times = {line.split()[-1]: line.split()[3:5] for line in listed.stdout.splitlines()}
    assert times["squashfs-root"] == times["squashfs-root/a"] == ["2001-09-09", "01:46"]
    assert times["squashfs-root/b"] == ["1998-07-09", "16:00"]


def test_lock_again_accepts_what_was_pulled(project, pushed):
    reference = pushed("one")
    configure(project, reference)
    assert main(["lock"]) == 0
    before = read(project)["images"][reference][HERE]
    pushed("two")
    assert main(["lock"]) == 0
    assert read(project)["images"][reference][HERE] == before  # nothing was pulled
    assert main(["image", "pull", reference]) == 0
    assert main(["lock"]) == 0
    after = read(project)["images"][reference][HERE]
    assert {field for field in before if before[field] != after[field]} == {
        "index", "manifest", "configuration", "diff_ids", "file_systems", "digest",
    }  # fmt: skip


def test_lock_cannot_make_this_computer_ask_another_registry(project, pushed, tmp_path, monkeypatch):
    reference = pushed("one")
    configure(project, reference)
    assert main(["lock"]) == 0
    content = read(project)
    pins = content["images"][reference][HERE]
    content["images"][reference][HERE] = {**pins, "reference": "docker://127.0.0.1:9/team/evil:1"}
    write(project, content)
    for use in ("follow", "require"):
        other = new_cache(tmp_path / f"other-{use}", monkeypatch)
        with pytest.raises(LockError, match="is not the one") as caught:
            LockedImages(other, project, use).get(reference)
        assert caught.value.details.startswith("reference: locked")


def test_locked_digest_is_only_asked_of_the_own_repository(project, pushed, server, tmp_path, monkeypatch):
    reference = pushed("one")
    layout = LayoutBuilder(tmp_path / "evil")
    evil = layout.image(archive([member("evil", "x")]))
    server.push(layout.publish(evil), "another/repository:1")
    configure(project, reference)
    assert main(["lock"]) == 0
    content = read(project)
    content["images"][reference][HERE] |= {"index": "", "manifest": evil["digest"]}
    write(project, content)
    other = new_cache(tmp_path / "other", monkeypatch)
    with pytest.raises(PullError, match="has no such image"):
        LockedImages(other, project, "follow").get(reference)


def test_name_of_a_pulled_image_is_locked_with_its_reference(project, pushed, capsys, tmp_path, monkeypatch):
    reference = pushed("one")
    configure(project, "app")
    assert main(["image", "pull", reference, "--as", "app"]) == 0
    assert main(["lock"]) == 0
    assert read(project)["images"]["app"][HERE]["reference"] == reference
    pushed("two")
    assert main(["image", "pull", reference, "--as", "app"]) == 0
    assert "manifest: locked" in named(capsys)
    other = new_cache(tmp_path / "other", monkeypatch)
    assert main(["image", "pull", reference, "--as", "app", "--locked"]) == 0
    assert main(["lock", "--check"]) == 0
    assert other.get("app").name == "app"


def test_changed_folder_is_named(project, tmp_path, capsys):
    layout = LayoutBuilder(project / "image")
    layout.publish(layout.image(archive([member("a", "a")])), "1")
    configure(project, "oci:image:1")
    assert main(["lock"]) == 0
    pins = read(project)["images"]["oci:image:1"][HERE]
    assert (pins["reference"], pins["index"]) == ("oci:image:1", "")
    assert str(tmp_path) not in (project / FILE).read_text()
    layout.entries.clear()
    layout.publish(layout.image(archive([member("a", "b")])), "1")
    assert main(["image", "pull", "oci:image:1"]) == 0
    assert "manifest: locked" in named(capsys)
    assert main(["image", "pull", "oci:image:1", "--locked"]) == 4
    assert "manifest: locked" in capsys.readouterr().err


# Kits


@pytest.fixture
def kit(project):
    """A kit of the project whose image is in the cache, with one file and two packages."""
    folder = project / "microvm" / "kits" / "web"
    folder.mkdir(parents=True)
    (folder / "motd").write_text("hello\n")
    (folder / "kit.toml").write_text(
        'suite = "bookworm"\npackages = ["git", "curl"]\nwheels = ["six==1.16.0"]\nsetup = ["true"]\n'
        'mirror = "deb https://debian.example/debian bookworm main"\nnetwork = ["pip"]\n'
        '[files]\n"/etc/motd" = "motd"\n[environment]\nLANG = "C.UTF-8"\n[resources]\ncpus = 1\n'
    )
    configure(project, "web")
    give_rootfs(project, git="1:2.39.2", curl="7.88")
    return folder


def give_rootfs(project, **versions):
    kit = load_kit("web", project=project)

    def platform(folder):
        for role in ("kernel", "initramfs", "runtime"):
            (folder / role).write_text(f"{role} of the mirror")
        return Built({path.name: path for path in folder.iterdir()}, {"python": "3.11"})

    def rootfs(folder):
        status = folder / "root" / "var" / "lib" / "dpkg" / "status"
        status.parent.mkdir(parents=True)
        status.write_text("".join(STATUS.format(*pair) for pair in versions.items()))
        subprocess.run(["mksquashfs", folder / "root", folder / "fs", "-quiet", "-no-progress"], check=True)
        return Built({"rootfs": folder / "fs"}, {})

    artifacts = store()._artifacts
    artifacts.get(*platform_name_and_key(kit), platform, print)
    artifacts.get("rootfs-web", _key(kit.recipe()), rootfs, print, force=True)


def test_one_byte_of_any_field_of_a_kit_is_named(project, kit, capsys):
    assert kit.is_dir()
    assert main(["lock"]) == 0
    pins = read(project)["images"]["web"][HERE]
    assert pins["installed"] == {"git": "1:2.39.2", "curl": "7.88"}
    assert main(["lock", "--check"]) == 0
    tried = 0
    for field in each_leaf(project, "web"):
        said = named(capsys)
        assert field in said or field.partition("[")[0] in said, field
        tried += 1
    assert tried == len(leaves(pins)) >= 20
    assert main(["lock", "--check"]) == 0


def test_one_byte_of_a_file_of_the_kit_is_named_before_a_build(project, kit, capsys):
    assert main(["lock"]) == 0
    (kit / "motd").write_text("hellO\n")
    said = named(capsys)
    assert "recipe.files./etc/motd: locked" in said
    assert (project / FILE).exists()
    assert "packages" not in said  # nothing was built


def test_one_byte_of_the_recipe_is_named_before_a_build(kit, capsys):
    assert main(["lock"]) == 0
    (kit / "kit.toml").write_text((kit / "kit.toml").read_text().replace('"curl"', '"curk"'))
    assert 'recipe.packages[1]: locked "curl", now "curk"' in named(capsys)


def test_build_with_other_package_versions_is_named(project, kit, capsys):
    assert kit.is_dir()
    assert main(["lock"]) == 0
    give_rootfs(project, git="1:2.39.5", curl="7.88")
    said = named(capsys)
    assert 'installed.git: locked "1:2.39.2", now "1:2.39.5"' in said
    assert "file_systems[0]: locked" in said
    assert "installed.curl" not in said


# What is locked, and what is not


def test_image_that_is_not_locked_is_refused(project, pushed, capsys):
    reference = pushed("one")
    configure(project, reference)
    with pytest.raises(LockError, match="which does not exist"):
        LockedImages(store(), project, "require").get(reference)
    assert store().list() == []  # it was not pulled
    assert main(["lock", "--check"]) == 4
    assert "microvm.lock does not exist" in capsys.readouterr().err
    assert main(["image", "pull", reference, "--locked"]) == 4
    assert "is not locked in" in capsys.readouterr().err
    write(project, {"format": 1, "images": {}})
    assert f"image {reference} for {HERE} is not locked in" in named(capsys)


def test_lock_of_another_architecture_does_not_count_and_is_kept(project, pushed, capsys):
    reference = pushed("one")
    configure(project, reference)
    assert main(["lock"]) == 0
    content = read(project)
    other = "aarch64" if HERE == "x86_64" else "x86_64"
    content["images"][reference] = {other: content["images"][reference].pop(HERE)}
    write(project, content)
    assert f"for {HERE} is not locked" in named(capsys)
    assert main(["lock"]) == 0
    assert set(read(project)["images"][reference]) == {HERE, other}


def test_named_images_are_locked_and_unused_ones_left_out(project, pushed, kit, capsys):
    assert kit.is_dir()
    reference = pushed("one")
    assert main(["lock", reference]) == 0
    assert set(read(project)["images"]) == {"web", reference}
    assert main(["lock", "--check"]) == 0
    assert f"not checked, as the project does not use it: {reference}" in capsys.readouterr().err
    assert main(["lock"]) == 0
    assert set(read(project)["images"]) == {"web"}
    assert f"left out, as the project does not use it: {reference}" in capsys.readouterr().err


def test_image_of_an_untrusted_project_is_not_pulled(project, pushed, capsys, monkeypatch):
    monkeypatch.delenv(project_trust.VARIABLE)
    configure(project, pushed("one"))
    assert main(["lock"]) == 4
    assert "nobody has allowed that" in capsys.readouterr().err
    assert store().list() == []
    assert not (project / FILE).exists()


def test_names_in_a_lock_file_are_not_pulled(project, pushed, kit):
    assert kit.is_dir()
    reference = pushed("one")
    assert main(["lock", reference]) == 0
    store().remove(reference)
    assert main(["lock", "--check"]) == 0
    assert main(["lock"]) == 0
    assert {entry.image.name for entry in store().list()} == {"web"}


# Commands that start machines: they fail before a machine starts


def test_commands_refuse_other_images(project, pushed, capsys):
    reference = pushed("one")
    configure(project, reference)
    assert main(["lock"]) == 0
    content = read(project)
    content["images"][reference][HERE]["converter"] += 1
    write(project, content)
    git(project, "init", "-q", "-b", "main", "--template=")
    commit(project, {"microvm.toml": f'[ci.jobs.test]\nimage = "{reference}"\nsteps = ["true"]\n'})
    (project / FILE).unlink()  # the lock counts as it is on the branch that defines the jobs
    assert main(["ci", "run", "--locked", "--plain"]) == 4
    assert f"converter: locked {CONVERTER + 1}, now {CONVERTER}" in capsys.readouterr().err
    write(project, content)
    for words in (
        ["run", "--image", reference, "--locked", "--", "true"],
        ["image", "pull", reference, "--locked"],
    ):
        assert main(words) == 4, words
        assert f"converter: locked {CONVERTER + 1}, now {CONVERTER}" in capsys.readouterr().err, words


def test_run_without_locked_ignores_the_lock(project, pushed, capsys):
    reference = pushed("one")
    write(project, {"format": 7})
    assert main(["image", "pull", reference]) == 0
    assert main(["image", "pull", reference, "--locked"]) == 4
    assert "invalid lock file" in capsys.readouterr().err


def test_github_action_pulls_what_the_defining_branch_locks(project, pushed, tmp_path, monkeypatch):
    reference = pushed("one")
    configure(project, reference)
    assert main(["lock"]) == 0
    locked = read(project)["images"][reference][HERE]["digest"]
    git(project, "init", "-q", "-b", "main", "--template=")
    commit(project, {"microvm.toml": f'[ci.jobs.test]\nimage = "{reference}"\nsteps = ["true"]\n'})
    git(project, "checkout", "-qb", "other")
    (project / FILE).write_text("a branch's own")
    pushed("two")
    new_cache(tmp_path / "other", monkeypatch)
    inputs = Inputs("ci", (), "", project, project, "generic", (), "", "", False, "", "main")
    host = Host(project=project)
    try:
        (image,) = _images(host, [reference], inputs)
        assert f"sha256:{image.digest}" == locked
        with pytest.raises(UsageError, match="invalid lock file"):
            _images(host, [reference], replace(inputs, mode="pytest"))
    finally:
        host.close()
