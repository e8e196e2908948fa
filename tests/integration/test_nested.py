"""A machine that runs a machine of its own, with KVM."""

import shutil
from pathlib import Path

import pytest

from pytest_microvm.images.kits import host_architecture
from support import guards

KIT = Path(__file__).parents[1] / "kvm" / "nested"
QEMU = (
    "qemu-system-x86_64 -machine microvm,rtc=on -accel kvm -cpu host -m 128M -nodefaults -no-user-config "
    "-no-reboot -display none -serial stdio -kernel /root/kernel -initrd /root/initramfs "
    "-append 'console=ttyS0 quiet panic=-1 reboot=t microvm.probe=1'"
)


@pytest.mark.thorough
@pytest.mark.skipif(host_architecture() != "x86_64", reason="other machines cannot have machines")
@pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="the kit cannot be built here")
def test_a_machine_in_a_machine(host):
    base = host.images.get("base", progress=print)
    with host.start(image=str(KIT), nested=True, timeout=guards.MACHINE) as machine:
        machine.push(base.kernel, "/root/kernel")
        machine.push(base.initramfs, "/root/initramfs")
        machine.run("modprobe kvm_amd || modprobe kvm_intel", check=True)
        assert "microvm-probe-ok" in machine.run(QEMU, check=True).stdout
