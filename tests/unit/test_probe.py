"""Which accelerator is chosen, and when that is found out again."""

import json
import os
import platform

import pytest

from pytest_microvm.errors import HostError
from pytest_microvm.hypervisors.probe import Verdict, check_required, probe
from pytest_microvm.hypervisors.trial import Trial
from pytest_microvm.hypervisors.tsc import measure_tsc_khz

HERE = platform.machine().replace("arm64", "aarch64")
pytestmark = pytest.mark.skipif(not os.path.exists("/proc"), reason="KVM is Linux's")  # noqa: PTH110


@pytest.fixture
def device(tmp_path):
    path = tmp_path / "kvm"
    path.touch(0o600)
    return path


@pytest.fixture
def look(tmp_path, device):
    """Probe with a guest that boots or not; ``look.asked`` tells what was tried."""

    def run(*, works=True, trial=None, build="qemu 1", architecture=HERE, device=device):
        def boot(candidate):
            run.asked.append(candidate)
            return trial or (Trial("booted", 0.61) if works else Trial("hung", 5.0))

        return probe(boot, build, tmp_path / "cache" / "accelerator.json", architecture, device)

    run.asked = []
    return run


def test_a_guest_that_boots(look):
    verdict = look()
    assert verdict == Verdict("kvm", "kvm boots a guest here, in 0.6 s", 0.61)
    assert look.asked == ["kvm"]


def test_a_guest_that_boots_slowly(look):
    verdict = look(trial=Trial("booted", 17.0))
    assert verdict == Verdict("kvm", "kvm boots a guest here, slowly, in 17.0 s", 17.0)


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        (Trial("hung", 5.04, "Probing EDD... ok"), "a guest on it hung for 5 s after 'Probing EDD... ok'"),
        (Trial("hung", 5.0), "a guest on it hung for 5 s without any output"),
        (Trial("slow", 120.0, "[ 1.0] x"), "a guest on it was still booting after 120 s"),
        (Trial("died", 0.2, "Kernel panic"), "a guest on it ended after 'Kernel panic'"),
        (Trial("died", 0.2), "a guest on it ended without any output"),
    ],
)
def test_a_device_that_opens_proves_nothing(look, device, trial, reason):
    assert look(trial=trial) == Verdict("tcg", f"{device} opens, but {reason}")


@pytest.mark.parametrize("works", [True, False])
def test_the_verdict_is_remembered(look, works):
    first = look(works=works)
    again = look(works=not works)
    assert again == first
    assert len(look.asked) == 1


def test_another_build_is_tried_again(look):
    assert look(works=False).name == "tcg"
    assert look(build="qemu 2").name == "kvm"


def test_a_device_that_changed_is_tried_again(look, device):
    assert look(works=False).name == "tcg"
    device.chmod(0o660)
    assert look().name == "kvm"


def test_another_kernel_is_tried_again(look, monkeypatch):
    assert look(works=False).name == "tcg"
    monkeypatch.setattr(platform, "release", lambda: "99.0")
    assert look().name == "kvm"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"[1]", b"null", b"\xff", b'{"KEY": {}}', b'{"KEY": 7}', b'{"KEY": null}',
     b'{"KEY": {"name": "warp", "reason": "x", "boot_seconds": 0}}',
     b'{"KEY": {"name": "kvm", "reason": 7, "boot_seconds": 0}}',
     b'{"KEY": {"name": "tcg", "reason": "of an older version"}}',
     b'{"KEY": {"name": "tcg", "reason": "x", "boot_seconds": "long"}}',
     b'{"KEY": {"name": "tcg", "reason": "x", "boot_seconds": -1}}',
     b'{"KEY": {"name": "tcg", "reason": "x", "boot_seconds": NaN}}',
     b'{"KEY": {"name": "tcg", "reason": "x", "boot_seconds": Infinity}}'],
)  # fmt: skip
def test_a_damaged_memory_is_as_good_as_none(look, tmp_path, content):
    look(works=False)
    memory = tmp_path / "cache" / "accelerator.json"
    (key,) = json.loads(memory.read_text())
    memory.write_bytes(content.replace(b"KEY", key.encode()))
    assert look().name == "kvm"


def test_a_verdict_that_cannot_be_remembered_is_found_out_again(look, tmp_path):
    (tmp_path / "cache").touch()  # nothing can be written below it
    assert look().name == look().name == "kvm"
    assert len(look.asked) == 2


def test_no_device(look, tmp_path):
    verdict = look(device=tmp_path / "missing")
    assert verdict.name == "tcg"
    assert verdict.reason.startswith(f"there is no {tmp_path / 'missing'}")
    assert look.asked == []


def test_no_permission(look, device, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may open every file
    assert look() == Verdict("tcg", f"no permission to use {device}")
    assert look.asked == []


def test_a_foreign_architecture_is_emulated(look):
    verdict = look(architecture="aarch64" if HERE == "x86_64" else "x86_64")
    assert verdict.name == "tcg"
    assert "not this computer's architecture" in verdict.reason
    assert look.asked == []


def test_what_is_required():
    check_required(None, Verdict("tcg", "no kvm"))
    check_required("tcg", Verdict("tcg", "no kvm"))
    with pytest.raises(HostError, match="kvm is required, but only tcg works here: no permission") as caught:
        check_required("kvm", Verdict("tcg", "no permission"))
    assert "doctor" in caught.value.resolution


def test_the_counter_is_measured_only_where_it_is_constant(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    assert measure_tsc_khz(cpuinfo) is None
    cpuinfo.write_text("flags : tsc\n")
    assert measure_tsc_khz(cpuinfo) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other computers have no TSC")
def test_two_measurements_agree(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : tsc constant_tsc\n")
    first = measure_tsc_khz(cpuinfo)
    second = measure_tsc_khz(cpuinfo)
    assert first is not None
    assert second is not None
    assert 100_000 < first < 10_000_000
    assert abs(first - second) / first < 0.002  # the kernel takes 1 % for unstable
