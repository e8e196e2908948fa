"""Kits: found, read, merged; every mistake names the file, the key and what is allowed."""

from __future__ import annotations

import pytest

from pytest_microvm.errors import KitError
from pytest_microvm.images.build_keys import kit_key
from pytest_microvm.images.image import Service
from pytest_microvm.images.kits import host_architecture, load_kit, shipped_kits


@pytest.fixture
def project(tmp_path):
    """Return a function that writes a kit of a project and returns its kit.toml."""

    def write(name, text, **files):
        folder = tmp_path / "microvm" / "kits" / name
        folder.mkdir(parents=True)
        for file, content in files.items():
            (folder / file).write_text(content)
        (folder / "kit.toml").write_text(text)
        return folder / "kit.toml"

    write.root = tmp_path
    return write


def test_the_shipped_kits_can_be_read():
    names = {path.name for path in shipped_kits().iterdir() if path.is_dir()}
    assert {"base", "python"} <= names
    for name in names:
        assert load_kit(name).name == name


def test_the_python_kit_stands_on_base():
    python, base = load_kit("python"), load_kit("base")
    assert python.suite == base.suite == "trixie"
    assert set(base.packages) < set(python.packages)
    assert dict(base.environment).items() <= dict(python.environment).items()
    assert any(wheel.startswith("pytest==9.") for wheel in python.wheels)
    assert python.resources == {"cpus": 1, "memory": 512 * 1024**2, "disk": 2 * 1024**3}
    assert python.architecture == host_architecture()


def test_a_child_adds_to_and_replaces_what_its_parent_says(project):
    project(
        "parent",
        """
        suite = "trixie"
        architecture = "aarch64"
        packages = ["a1", "b1"]
        setup = ["echo parent"]
        [files]
        "/etc/kept" = "kept"
        "/etc/replaced" = "kept"
        [environment]
        KEPT = "1"
        REPLACED = "parent"
        [resources]
        cpus = 2
        pids = 64
        memory = "1G"
        """,
        kept="kept",
    )
    project(
        "child",
        """
        parent = "parent"
        packages = ["b1", "c1"]
        wheels = ["Thing[extra]==1.0"]
        setup = ["echo child"]
        [files]
        "/etc/replaced" = {source = "new", mode = "0600"}
        [environment]
        REPLACED = "child"
        [resources]
        memory = 314572800
        """,
        new="new",
    )
    kit = load_kit("child", project=project.root)
    assert (kit.name, kit.suite, kit.architecture) == ("child", "trixie", "aarch64")
    assert kit.packages == ("a1", "b1", "c1")
    assert kit.setup == ("echo parent", "echo child")
    assert {file.target: (file.source.name, file.mode) for file in kit.files} == {
        "/etc/kept": ("kept", 0o644),
        "/etc/replaced": ("new", 0o600),
    }
    assert dict(kit.environment) == {"KEPT": "1", "REPLACED": "child"}
    assert kit.resources == {"cpus": 2, "memory": 300 * 1024**2, "disk": 2 * 1024**3, "pids": 64}


def test_a_projects_kit_cannot_take_the_name_of_a_shipped_one(project):
    """A branch could change what a name means that somebody else chose; its commands run on the host."""
    path = project("python", 'suite = "trixie"')
    project("child", 'parent = "python"')
    for name in ("python", "child"):
        with pytest.raises(KitError, match=f"{path}: a kit that ships is called 'python', too"):
            load_kit(name, project=project.root)
    assert load_kit("python").path != path
    assert load_kit(path).path == path


@pytest.mark.parametrize("how", ["folder", "file", "relative"])
def test_a_kit_is_named_by_its_path(project, how):
    path = project("web", 'suite = "bookworm"')
    given = {"folder": path.parent, "file": str(path), "relative": "microvm/kits/web"}[how]
    assert load_kit(given, project=project.root).path == path


def test_a_parent_may_be_a_path_beside_the_kit(project):
    project("one", 'suite = "bookworm"\npackages = ["procps"]')
    project("two", 'parent = "../one"')
    assert load_kit("two", project=project.root).packages == ("procps",)


def test_an_executable_file_stays_executable(project):
    path = project("web", 'suite = "bookworm"\nfiles = {"/usr/bin/tool" = "tool"}', tool="#!/bin/sh")
    (path.parent / "tool").chmod(0o744)
    assert [file.mode for file in load_kit(path).files] == [0o755]


BAD = {
    "pakages = []": ("pakages", "packages"),
    "[resources]\nram = '1G'": ("resources.ram", "cpu_seconds, cpus, disk, lifetime, memory"),
    "[resources]\nmemory = '1 pound'": ("resources.memory", "512M"),
    "[resources]\nmemory = '1M'": ("resources.memory", "128M"),
    "[resources]\ncpus = 0": ("resources.cpus", "0.05 to 64"),
    "packages = 'procps'": ("packages", "["),
    "packages = ['Bad Name']": ("packages[0]", "Debian package"),
    "packages = ['--option']": ("packages[0]", "Debian package"),
    "wheels = ['pytest']": ("wheels[0]", "pytest==9.2.0"),
    "wheels = ['--index-url==x']": ("wheels[0]", "pytest==9.2.0"),
    "architecture = 'amd64'": ("architecture", "x86_64 or aarch64"),
    "mirror = 7": ("mirror", "quotes"),
    "setup = ['']": ("setup[0]", "quotes"),
    "[environment]\nA = 1": ("environment.A", '"..."'),
    "[environment]\n'A-B' = ''": ("environment.A-B", "letters"),
    "services = ['nginx']": ("services", "start and ready"),
    "[services.'a b']\nstart = 'a'\nready = 'a'": ("services.a b", "small letters"),
    "[services.web]\nstart = 'nginx'": ("services.web.ready", "a shell command"),
    "[services.web]\nstart = ''\nready = 'true'": ("services.web.start", "a shell command"),
    "[services.web]\nstart = 'a'\nready = 'a'\nstop = 'a'": ("services.web.stop", "ready, start"),
    "[files]\n'etc/motd' = 'f'": ("files.etc/motd", "/etc/motd"),
    "[files]\n'/etc/../x' = 'f'": ("files./etc/../x", "/etc/motd"),
    "[files]\n'/x' = 'missing'": ("files./x", "kit's folder"),
    "[files]\n'/x' = '../kit.toml'": ("files./x", "in the kit's folder"),
    "[files]\n'/x' = {source = 'f', owner = 'me'}": ("files./x", "mode"),
    "[files]\n'/x' = {source = 'f', mode = 'rwx'}": ("files./x.mode", "0755"),
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_value_names_file_key_and_what_is_allowed(project, text):
    path = project("web", f'suite = "bookworm"\n{text}', f="content")
    with pytest.raises(KitError) as caught:
        load_kit(path)
    key, allowed = BAD[text]
    assert str(path) in caught.value.brief
    assert key in caught.value.brief
    assert allowed in str(caught.value)
    assert caught.value.resolution


@pytest.mark.parametrize(
    "text",
    [
        "",
        'suite = "bookworm"\nparent = "base"',
        'suite = "bookworm"\nfrom = "oci:image"',
        'parent = "base"\nfrom = "oci:image"',
    ],
)
def test_a_kit_has_one_of_parent_suite_and_from(project, text):
    with pytest.raises(KitError, match="expected one of parent, suite and from"):
        load_kit(project("web", text))


@pytest.mark.parametrize("key", ["mirror = 'http://x/debian'", "architecture = 'x86_64'"])
def test_what_belongs_to_the_suite_is_refused_beside_a_parent(project, key):
    with pytest.raises(KitError, match="only a kit with a suite"):
        load_kit(project("web", f'parent = "base"\n{key}'))


def test_a_suite_that_is_an_option_is_refused(project):
    with pytest.raises(KitError, match="suite"):
        load_kit(project("web", 'suite = "--aptopt=x"'))


def test_parents_in_a_ring(project):
    project("one", 'parent = "two"')
    project("two", 'parent = "one"')
    with pytest.raises(KitError, match="one -> two -> one form a ring"):
        load_kit("one", project=project.root)


def test_an_unknown_kit_lists_the_known_ones(project):
    project("web", 'suite = "bookworm"')
    with pytest.raises(KitError, match="no kit 'wbe'") as caught:
        load_kit("wbe", project=project.root)
    assert {"base", "python", "web"} <= set(caught.value.details.replace(",", "").split())


def test_an_unknown_parent_names_the_child(project):
    path = project("web", 'parent = "bsae"')
    with pytest.raises(KitError, match="no kit 'bsae'") as caught:
        load_kit("web", project=project.root)
    assert str(path) in caught.value.brief


def test_no_kit_at_a_path(tmp_path):
    with pytest.raises(KitError, match="no kit at"):
        load_kit(tmp_path / "nothing")


@pytest.mark.parametrize("content", [b"suite = ", b"\xff\xfe", b"suite = 'a'\nsuite = 'b'"])
def test_a_file_that_is_not_toml(tmp_path, content):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "kit.toml").write_bytes(content)
    with pytest.raises(KitError, match="cannot be read") as caught:
        load_kit(tmp_path / "web")
    assert caught.value.details


def test_a_changed_file_changes_the_recipe(project):
    path = project("web", 'suite = "bookworm"\nfiles = {"/x" = "f"}', f="one")
    before = load_kit(path).recipe()
    assert load_kit(path).recipe() == before
    (path.parent / "f").write_text("two")
    assert load_kit(path).recipe() != before


def test_network_is_inherited_and_replaced(project):
    project("company", 'parent = "base"\nnetwork = ["index.example", "pip"]')
    project("child", 'parent = "company"')
    project("offline", 'parent = "company"\nnetwork = []')
    kits = {name: load_kit(name, project=project.root) for name in ("base", "company", "child", "offline")}
    assert {name: kit.network for name, kit in kits.items()} == {
        "base": (), "company": ("index.example", "pip"), "child": ("index.example", "pip"), "offline": (),
    }  # fmt: skip
    assert kits["child"].recipe() == kits["offline"].recipe()  # what it may reach shapes no image


def test_a_wrong_network_rule_names_file_and_key(project):
    path = project("company", 'parent = "base"\nnetwork = ["http//index"]')
    with pytest.raises(KitError, match="network") as caught:
        load_kit("company", project=project.root)
    assert str(path) in str(caught.value)


# Pins


def test_childs_pin_replaces_its_parents(project):
    kit = project(
        "old",
        'parent = "python"\nwheels = ["Coverage[toml]==7.10", "thing==1"]\npackages = ["less=1", "less"]\n',
    )
    found, python = load_kit(kit), load_kit("python")
    place = python.wheels.index("coverage==7.17.3")
    assert found.wheels == (
        *python.wheels[:place], "Coverage[toml]==7.10", *python.wheels[place + 1 :], "thing==1",
    )  # fmt: skip
    assert found.replaced == ("old pins Coverage[toml]==7.10 in place of python's coverage==7.17.3",)
    assert found.packages == (*python.packages, "less=1", "less")
    assert (python.replaced, load_kit("agent").replaced) == ((), ())


@pytest.mark.parametrize(
    ("text", "both"),
    [
        ('wheels = ["a-b==1", "A_b==2"]', "a-b==1 and A_b==2"),
        ('packages = ["less=1", "less=2"]', "less=1 and less=2"),
        ('sdists = ["a==1", "a==1.0"]', "a==1 and a==1.0"),
    ],
)
def test_two_versions_in_one_kit_are_refused(project, text, both):
    path = project("two", f'parent = "base"\n{text}\n')
    with pytest.raises(KitError, match=rf"{path}: invalid {text.split()[0]}: expected one version .*{both}"):
        load_kit(path)


# What a set-up runs on


def test_set_up_runs_on_the_ancestor_with_the_same_packages(project):
    """So that its root file system, which takes a minute to build, is used again."""
    project("first", 'parent = "base"\npackages = ["less"]\n')
    project("second", 'parent = "first"\nsetup = ["echo two"]\nfiles = {"/etc/f" = "f"}\n', f="f")
    project("third", 'parent = "second"\npackages = ["less"]\nsdists = ["a==1"]\nsetup_network = ["pip"]\n')
    first, second, third = (load_kit(name, project=project.root) for name in ("first", "second", "third"))
    assert (first.ground, first.needs_machine) == (None, False)
    assert second.ground == third.ground == first
    assert second.ground.recipe() == first.recipe()
    assert [file.target for file in third.files_in_machine] == ["/etc/f"]
    assert (third.setup, third.sdists) == (("echo two",), ("a==1",))
    only = load_kit(project("only", 'parent = "base"\nsetup = ["true"]\n'))
    assert only.ground.recipe() == load_kit("base").recipe()


def test_kit_on_a_container_image(project):
    path = project("app", 'from = "oci:../image:1"\nsetup = ["true"]\nfiles = {"/etc/f" = "f"}\n', f="f")
    project("child", 'parent = "app"\nenvironment = {A = "1"}\n')
    kit, child = load_kit(path), load_kit("child", project=project.root)
    assert (kit.source, kit.source_base, kit.suite, kit.ground) == ("oci:../image:1", path.parent, "", None)
    assert (child.source, child.source_base) == (kit.source, path.parent)
    assert child.files_in_machine == child.files
    assert kit.recipe()["from"] == "oci:../image:1"


@pytest.mark.parametrize(("key", "entry"), [("packages", "less"), ("wheels", "a==1")])
def test_container_image_gets_no_packages_of_a_kit(project, key, entry):
    project("app", 'from = "docker://registry.example/app:1"\n')
    path = project("child", f'parent = "app"\n{key} = ["{entry}"]\n')
    with pytest.raises(KitError, match=f"{path}: invalid {key}: kit app is built on a container") as caught:
        load_kit(path, project=project.root)
    assert "`setup`" in caught.value.resolution


def test_bad_reference_names_file_and_key(project):
    path = project("app", 'from = "http://registry.example"\n')
    with pytest.raises(KitError, match=f"{path}: from: invalid image reference"):
        load_kit(path)


def test_services_are_inherited_and_replaced_in_order(project):
    project(
        "parent",
        """
        suite = "bookworm"
        [services.first]
        start = "first"
        ready = "true"
        [services.second]
        start = "second"
        ready = "true"
        """,
    )
    text = """
        parent = "parent"
        [services.third]
        start = "third"
        ready = "true"
        [services.first]
        start = "other"
        ready = "false"
        """
    kit = load_kit(project("child", text), project=project.root)
    assert kit.services == (
        Service("first", "other", "false"),
        Service("second", "second", "true"),
        Service("third", "third", "true"),
    )


def test_services_change_the_images_key_but_not_its_files(project):
    text = 'suite = "bookworm"\n[services.web]\nstart = "nginx"\nready = "true"\n'
    path = project("web", text)
    kit = load_kit(path)
    path.write_text(text.replace("true", "false"))
    changed = load_kit(path)
    assert kit_key(kit) != kit_key(changed)
    assert kit.recipe() == changed.recipe()
