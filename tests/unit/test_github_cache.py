"""What GitHub's cache keeps, and under which keys."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pytest_microvm.ci.github import cache as github_cache
from pytest_microvm.ci.github.cache import images_key, set_aside, take_in, templates_folder, templates_key
from pytest_microvm.ci.github.inputs import read_inputs
from pytest_microvm.ci.github.project import Needs, needs_of
from pytest_microvm.errors import UsageError
from pytest_microvm.hypervisors import Accelerator
from pytest_microvm.templates.store import TemplateStore
from support.repositories import git

NEEDS = Needs((), ("k1", "k2"), "prepared")
IMAGE = SimpleNamespace(digest="d1")
TCG = Accelerator("tcg", "no kvm", "q35")


class Computer:
    """Of a host what keys and folders need: its hypervisor's fingerprint, its stores."""

    def __init__(self, folder, build="QEMU 8.2", cpu="a CPU"):
        self.cache = folder
        self.templates = TemplateStore(folder, cap=1024**3)
        self._facts = (build, cpu)

    def hypervisor(self, _architecture):
        return SimpleNamespace(fingerprint=lambda accelerator: (*self._facts, accelerator.name))


def keys(tmp_path):
    here = Computer(tmp_path)
    other_needs = replace(NEEDS, prepared="others")
    yield templates_key(here, [IMAGE], TCG, NEEDS, "")
    yield templates_key(Computer(tmp_path, build="QEMU 9"), [IMAGE], TCG, NEEDS, "")
    yield templates_key(Computer(tmp_path, cpu="another"), [IMAGE], TCG, NEEDS, "")
    yield templates_key(here, [SimpleNamespace(digest="d2")], TCG, NEEDS, "")
    yield templates_key(here, [IMAGE], replace(TCG, name="kvm"), NEEDS, "")
    yield templates_key(here, [IMAGE], TCG, other_needs, "")
    yield templates_key(here, [IMAGE], TCG, NEEDS, "2026-11")


def test_templates_are_for_the_same_host_images_and_preparation(tmp_path):
    found = list(keys(tmp_path))
    assert len(set(found)) == len(found)
    assert found == list(keys(tmp_path))


def test_another_format_has_other_templates(tmp_path, monkeypatch):
    before = templates_key(Computer(tmp_path), [IMAGE], TCG, NEEDS, "")
    monkeypatch.setattr(github_cache, "FORMAT", -1)
    assert templates_key(Computer(tmp_path), [IMAGE], TCG, NEEDS, "") != before


def test_images_key_depends_on_image_keys_and_the_users_part():
    assert images_key(NEEDS, "") == images_key(replace(NEEDS, keys=("k2", "k1")), "")
    assert images_key(NEEDS, "") != images_key(replace(NEEDS, keys=("k1",)), "")
    assert images_key(NEEDS, "2026-11") != images_key(NEEDS, "")
    assert "," not in images_key(NEEDS, "2026-11")


def publish(store, key, kind):
    with store.draft() as draft:
        for name in ("ram", "scratch", "state"):
            (draft / name).write_bytes(f"{name} of {key}".encode())
        store.publish(key, draft, {"kind": kind, "image": "base"})


def test_templates_go_from_one_job_to_the_next(tmp_path):
    first, second = Computer(tmp_path / "first"), Computer(tmp_path / "second")
    for key, kind in (
        ("a", "boot"),
        ("b", "prepared"),
        ("c", "workspace"),
        ("d", "collected"),
        ("e", "kept"),
    ):
        publish(first.templates, key, kind)
    assert set_aside(first) == 2
    assert set_aside(first) == 2  # what was there before is gone
    publish(second.templates, "a", "boot")
    second.cache.joinpath("github").mkdir()
    templates_folder(first.cache).rename(templates_folder(second.cache))
    assert take_in(second) == 1
    with second.templates.open("b") as template:
        assert template.ram.read_bytes() == b"ram of b"
    assert second.templates.open("c") is None
    assert not templates_folder(second.cache).exists()


def test_a_damaged_one_is_not_used(tmp_path):
    here = Computer(tmp_path)
    publish(here.templates, "a", "boot")
    set_aside(here)
    here.templates.remove("a")
    (templates_folder(here.cache) / "a" / "ram").write_bytes(b"something else")
    take_in(here)
    assert here.templates.open("a") is None


def test_nothing_was_restored(tmp_path):
    assert take_in(Computer(tmp_path)) == 0


# What a project needs


def project(tmp_path, text, **given):
    (tmp_path / "pyproject.toml").write_text(text)
    variables = {f"INPUT_{name.upper()}": value for name, value in given.items()}
    return read_inputs({"INPUT_WORKING_DIRECTORY": str(tmp_path), **variables}, tmp_path)


SETTINGS = '[tool.pytest-microvm]\nimage = "base"\nprepare = ["true"]\nprepare_inputs = ["needed.txt"]\n'


def test_a_suite_needs_its_image_and_what_is_prepared(tmp_path):
    (tmp_path / "needed.txt").write_text("one")
    (tmp_path / "other.txt").write_text("one")
    before = needs_of(project(tmp_path, SETTINGS))
    [kit] = before.kits
    assert kit.parent.name == "base"
    (tmp_path / "other.txt").write_text("two")
    assert needs_of(project(tmp_path, SETTINGS)) == before
    (tmp_path / "needed.txt").write_text("two")
    changed = needs_of(project(tmp_path, SETTINGS))
    assert changed.keys == before.keys
    assert changed.prepared != before.prepared
    other = needs_of(project(tmp_path, SETTINGS, image="python"))
    assert other.keys != before.keys


def test_untrusted_configuration_is_refused_before_any_build(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_MICROVM_TRUST", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    asking = '[tool.pytest-microvm]\nnetwork = ["pip"]\n'
    with pytest.raises(UsageError, match="nobody has allowed that"):
        needs_of(project(tmp_path, asking))
    assert needs_of(project(tmp_path, asking, trust="true")).keys


def jobs(tmp_path, text, **given):
    folder = tmp_path / "code"
    kit = folder / "microvm" / "kits" / "own" / "kit.toml"
    if not folder.exists():
        kit.parent.mkdir(parents=True)
        git(folder, "init", "-q", "-b", "main")
    kit.write_text('parent = "base"\npackages = ["jq"]\n')
    (folder / "microvm.toml").write_text(text)
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    variables = {f"INPUT_{name.upper()}": value for name, value in given.items()}
    variables |= {"INPUT_WORKING_DIRECTORY": str(folder), "INPUT_MODE": "ci"}
    return read_inputs(variables, tmp_path)


JOBS = '[ci.jobs.a]\nimage = "base"\nsteps = ["true"]\n[ci.jobs.b]\nimage = "own"\nsteps = ["true"]\n'


def test_jobs_need_only_kits_of_the_default_branch(tmp_path):
    inputs = jobs(tmp_path, JOBS, trust="true")
    before = needs_of(inputs)
    assert [kit.parent.name for kit in before.kits] == ["base"]  # the other one is built by the run
    assert len(before.keys) == 2
    folder = inputs.project
    git(folder, "checkout", "-q", "-b", "branch")
    (folder / "microvm" / "kits" / "own" / "kit.toml").write_text('parent = "base"\nsetup = ["touch /x"]\n')
    git(folder, "commit", "-qam", "two")
    assert needs_of(inputs) == before


def test_what_jobs_ask_for_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_MICROVM_TRUST", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(UsageError, match="nobody has allowed that"):
        needs_of(jobs(tmp_path, '[ci.jobs.a]\nimage = "base"\nnetwork = ["pip"]\nsteps = ["true"]\n'))


def test_no_other_branch_may_pass_for_the_default_one(tmp_path):
    with pytest.raises(UsageError, match="'main' would be taken for it"):
        needs_of(jobs(tmp_path, JOBS, trust="true", default_branch="trunk"))
