"""``pytest-microvm doctor`` on computers that lack things."""

import json
import os
import shutil
from pathlib import Path

import pytest

from pytest_microvm.cli import doctor, main
from pytest_microvm.hypervisors.cgroups import FOLDERS, Cgroups, Controller
from pytest_microvm.hypervisors.containment import Walls
from pytest_microvm.hypervisors.qemu import hypervisor
from pytest_microvm.hypervisors.qemu.command import PROGRAMS
from pytest_microvm.images.kits import host_architecture


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("PYTEST_MICROVM_BUDGET", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def report(capsys):
    def run():
        status = main(["doctor", "--json"])
        found = json.loads(capsys.readouterr().out)
        found["status"] = status
        found["by_name"] = {check["name"]: check for check in found["checks"]}
        return found

    return run


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """A PATH with these programs alone."""

    def only(*names):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in names:
            (folder / name).write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.22 (Debian)'\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return only


def test_without_an_image_nothing_is_tried_and_nothing_is_built(report, programs, empty_cache):
    programs(PROGRAMS[host_architecture()], "setpriv")
    found = report()
    assert found["accelerator"] is None
    assert found["reason"] == "not tried yet: build an image"
    assert found["by_name"]["accelerator"] == {
        "name": "accelerator",
        "status": "warn",
        "detail": "not tried yet: build an image",
        "fix": "pytest-microvm image build python",
    }
    assert found["hypervisor"] == "qemu 7.2.22"
    assert found["by_name"]["setpriv"]["status"] == "ok"
    assert not (empty_cache / "accelerator.json").exists()
    assert list(empty_cache.iterdir()) == []


def test_every_check_has_its_keys_and_every_problem_a_next_step(report):
    found = report()
    assert {"accelerator", "reason", "hypervisor", "checks"} <= set(found)
    for check in found["checks"]:
        assert set(check) == {"name", "status", "detail", "fix"}
        assert check["status"] in ("ok", "warn", "fail")
        assert check["detail"]
        assert check["status"] == "ok" or check["fix"]


def test_what_is_missing_fails_with_the_command_that_installs_it(report, programs):
    programs()
    found = report()
    assert found["status"] == 1
    assert found["hypervisor"] is None
    failed = {check["name"]: check for check in found["checks"] if check["status"] == "fail"}
    for name, program in (("hypervisor", PROGRAMS[host_architecture()]), ("setpriv", "setpriv")):
        assert program in failed[name]["detail"]
        assert failed[name]["fix"] == "pytest-microvm setup"


def test_containment_check_reports_each_wall_and_its_fix(report, monkeypatch):
    walls = Walls(
        "/usr/bin/setpriv", "/usr/bin/prlimit", reason="it may not change to another user", unlocked="too old"
    )
    monkeypatch.setattr(hypervisor, "find_walls", lambda _program: walls)
    monkeypatch.setattr(hypervisor, "find_cgroups", lambda: Cgroups(reason="read-only"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check = report()["by_name"]["containment"]
    assert check["status"] == "warn"
    for part in (
        "user: machines run as root, with all capabilities: it may not change to another user",
        "landlock: too old, so a guest that breaks out can use the files of this user",
        "no_new_privs: set", "seccomp: on", "network namespace: root may not make one here", "rlimits: set",
        "bubblewrap: not asked for",
        "cgroup: no cgroup, so neither a memory ceiling nor a throttle holds (read-only)",
    ):  # fmt: skip
        assert part in check["detail"]
    assert "run as an ordinary user" in check["fix"]
    assert "a kernel with Landlock" in check["fix"]
    assert "PYTEST_MICROVM_CGROUP" in check["fix"]


def test_walls_that_all_stand(report, monkeypatch):
    walls = Walls("/s", "/p", ("/u", "--net", "--"), range(70, 99), 69, capabilities=True, landlock=7)
    monkeypatch.setattr(hypervisor, "find_walls", lambda _program: walls)
    controller = Controller(2, Path("/sys/fs/cgroup"))
    found = Cgroups(FOLDERS, {"memory": controller, "cpu": controller})
    monkeypatch.setattr(hypervisor, "find_cgroups", lambda: found)
    check = report()["by_name"]["containment"]
    assert (check["status"], check["fix"]) == ("ok", "")
    assert "user: each machine has a user of its own" in check["detail"]
    assert "landlock: version 7: no files but programs, libraries and the machine's own;" in check["detail"]
    assert "cgroup: cgroup v2 (cpu, memory)" in check["detail"]


def test_an_old_landlock_does_not_deny_signals(report, monkeypatch):
    monkeypatch.setattr(hypervisor, "find_walls", lambda _program: Walls("/s", "/p", landlock=5))
    detail = report()["by_name"]["containment"]["detail"]
    assert "landlock: version 5: " in detail
    assert "signals to this user's processes are not denied" in detail


def test_an_old_qemu_fails(report, programs):
    folder = programs(PROGRAMS[host_architecture()], "setpriv")
    qemu = folder / PROGRAMS[host_architecture()]
    qemu.write_text("#!/bin/sh\necho 'QEMU emulator version 5.0.1'\n")
    found = report()
    assert found["by_name"]["hypervisor"]["status"] == "fail"
    assert "5.0.1" in found["by_name"]["hypervisor"]["detail"]


def test_invalid_budget_fails_the_memory_check(report, monkeypatch):
    monkeypatch.setenv("PYTEST_MICROVM_BUDGET", "cpus=lots")
    found = report()
    assert found["by_name"]["memory"]["status"] == "fail"
    assert "PYTEST_MICROVM_BUDGET" in found["by_name"]["memory"]["detail"]
    assert found["status"] == 1


@pytest.mark.parametrize(("free", "status"), [(2**20, "fail"), (2**30, "warn"), (2**40, "ok")])
def test_disk(report, monkeypatch, free, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**41, 0, free))
    assert report()["by_name"]["disk"]["status"] == status


def test_kvm_that_this_user_may_not_use(report, monkeypatch, tmp_path):
    device = tmp_path / "kvm"
    device.touch(0o600)
    monkeypatch.setattr(doctor, "KVM_DEVICE", device)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: path != device)
    check = report()["by_name"]["kvm"]
    assert check["status"] == "warn"
    assert 'KERNEL=="kvm", GROUP="kvm", MODE="0660"' in check["fix"]
    monkeypatch.setattr(doctor, "KVM_DEVICE", tmp_path / "missing")
    assert report()["by_name"]["kvm"]["detail"] == f"there is no {tmp_path / 'missing'}"


def test_kvm_fix_is_joining_its_group_if_that_gives_access():
    assert doctor.kvm_fix(4711, 0o20660) == "sudo usermod -aG 4711 $USER, then log in again"
    assert "udevadm" in doctor.kvm_fix(0, 0o20660)
    assert "udevadm" in doctor.kvm_fix(4711, 0o20600)


def test_as_text(capsys):
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pytest-microvm ")
    assert [line for line in lines if line.startswith("warn  accelerator  not tried yet: build an image")]
    assert [line for line in lines if "next step: pytest-microvm image build python" in line]
    assert not [line for line in lines if "\x1b" in line]
