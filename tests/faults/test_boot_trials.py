"""Guests that boot, hang, die or are slow, each told apart by a real hypervisor's console."""

from pathlib import Path

import pytest

from pytest_microvm.hypervisors import Launch
from pytest_microvm.hypervisors.qemu.hypervisor import Qemu
from pytest_microvm.hypervisors.trial import BootLimits
from pytest_microvm.images.cpio import CpioEntry, cpio_archive
from pytest_microvm.images.kits import host_architecture
from pytest_microvm.images.store import ImageStore, cache_root
from support import guards

pytestmark = pytest.mark.skipif(host_architecture() != "x86_64", reason="changes an x86 kernel's code")
LONG = guards.MACHINE


@pytest.fixture(scope="module")
def base():
    return ImageStore(cache_root()).get("base", progress=print)


@pytest.fixture
def attempt(base, tmp_path):
    """Return a function that boots a tiny guest, with another kernel or first program if given."""
    qemu = Qemu("x86_64", cache_root())

    def run(*, kernel=None, init=None, limits):
        changed = tmp_path / "kernel", tmp_path / "initramfs"
        changed[0].write_bytes(kernel or base.kernel.read_bytes())
        more = cpio_archive([CpioEntry.file("init", init, 0o755)]) if init is not None else b""
        changed[1].write_bytes(base.initramfs.read_bytes() + more)
        launch = Launch("x86_64", *changed, cpus=1, memory=2**27, ram=Path(), share=False, disks=())
        return qemu.boot_tiny(launch, qemu.accelerator(launch), print, limits)

    return run


def test_it_boots(attempt):
    trial = attempt(limits=BootLimits(LONG, LONG, LONG))
    assert (trial.end, trial.last) == ("booted", "")
    assert 0 < trial.seconds < LONG


def test_a_kernel_that_never_says_a_word(attempt, base):
    """Where a computer's KVM is broken, it stops at the same place: after the firmware's own words."""
    kernel = bytearray(base.kernel.read_bytes())
    protected = 512 * (kernel[0x1F1] + 1)  # setup_sects, of the x86 boot protocol
    kernel[protected : protected + 2] = b"\xeb\xfe"  # a jump to itself
    trial = attempt(kernel=bytes(kernel), limits=BootLimits(10.0, LONG, LONG))
    assert trial.end == "hung"
    assert "EDD" in trial.last


@pytest.mark.thorough
def test_a_kernel_that_falls_silent(attempt):
    init = b"#!/bin/busybox sh\nwhile :; do :; done\n"
    trial = attempt(init=init, limits=BootLimits(LONG, 10.0, LONG))
    assert trial.end == "hung"


def test_a_kernel_that_panics(attempt):
    trial = attempt(init=b"#!/missing\n", limits=BootLimits(LONG, LONG, LONG))
    assert trial.end == "died"
    assert "Kernel panic - not syncing: " in trial.last


@pytest.mark.thorough
def test_a_guest_that_goes_on_booting(attempt, capsys):
    init = b"#!/bin/busybox sh\nwhile :; do echo still; busybox sleep 1; done >/dev/console\n"
    trial = attempt(init=init, limits=BootLimits(LONG, LONG, 20.0))
    assert trial.end == "slow"
    assert "the guest is booting, slowly (" in capsys.readouterr().out
