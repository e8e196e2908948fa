"""The :class:`Hypervisor` protocol and the values that it exchanges."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_microvm.machine.instance import Vmm

PORTS = ("agent", "runner", "network")
"""The virtio-serial ports of every machine: commands and files, the pytest runner, network connections."""


@dataclass(frozen=True)
class Accelerator:
    """The accelerator selected for a guest, with the machine type that suits it.

    Args:
        name: ``kvm``, ``hvf``, ``whpx`` or ``tcg`` (QEMU's software emulation).
        reason: Why it was selected, for display.
        machine: QEMU's machine type: ``microvm``, ``q35`` or ``virt``.
        tsc_khz: The host's TSC rate in kHz if a guest under TCG needs it, else ``None``.
        patience: How many times longer than usual a guest may take to boot, answer and wake up, at least 1:
            where KVM is itself emulated, all takes longer than under plain emulation.
    """

    name: str
    reason: str
    machine: str
    tsc_khz: int | None = None
    patience: float = 1.0


@dataclass(frozen=True)
class Disk:
    """A raw disk image; writes to an ``ephemeral`` disk are discarded when the machine ends."""

    path: Path
    readonly: bool = False
    ephemeral: bool = False


@dataclass(frozen=True)
class Launch:
    """All parameters of one start of a VM.

    Args:
        architecture: Guest architecture: ``x86_64`` or ``aarch64``.
        kernel: Kernel file.
        initramfs: Initramfs file.
        cpus: Virtual CPUs.
        memory: Bytes of RAM.
        ram: The file that backs the guest's RAM.
        share: Whether writes to RAM reach ``ram`` (a machine to checkpoint) or stay private (a clone).
        disks: In the guest's order: root, runtime, scratch, then the layers over root, the lowest first.
        words: Additional parameters for the kernel's command line.
        nested: Whether the guest's CPU has virtualisation, with which it can run guests of its own with KVM.
        loud: Whether firmware and kernel write to the console from their first moment on.
        state: Device state to continue from instead of booting.
        name: Process name, as shown in process lists.
        throttle: CPUs that the process may use in total; ``None``: as many as it has vCPUs.
        cpu_seconds: Seconds of CPU time after which the host's kernel kills the process.
    """

    architecture: str
    kernel: Path
    initramfs: Path
    cpus: int
    memory: int
    ram: Path
    share: bool
    disks: tuple[Disk, ...]
    words: tuple[str, ...] = ()
    nested: bool = False
    loud: bool = False
    state: Path | None = None
    name: str = "microvm"
    ports: tuple[str, ...] = field(default=PORTS)
    throttle: float | None = None
    cpu_seconds: float | None = None


class Hypervisor(Protocol):
    """A program that runs VMs on this computer."""

    name: str

    @property
    def version(self) -> str:
        """The version that the program reports."""

    def accelerator(self, launch: Launch, required: str | None, say: Callable[[str], None]) -> Accelerator:
        """Return a working accelerator for ``launch``'s kernel; the first call probes for it."""

    def fingerprint(self, accelerator: Accelerator) -> tuple[str, ...]:
        """Return the host facts in a template's key: build, machine type, CPU model, host CPU."""

    def start(self, launch: Launch, accelerator: Accelerator) -> Vmm:
        """Start a VM: boot it, or continue it from a template if ``launch.state`` is set."""
