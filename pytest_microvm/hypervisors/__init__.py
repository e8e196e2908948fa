"""Hypervisors: the seam (:class:`Hypervisor`) and the values that cross it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_microvm.machine.instance import Vmm

PORTS = ("agent", "runner", "network")
"""The virtio-serial ports of every machine: commands and files; the pytest runner; connections."""


@dataclass(frozen=True)
class Accelerator:
    """What runs the guest's instructions, and how that was found out.

    Args:
        name: ``kvm``, ``hvf``, ``whpx`` or ``tcg`` (QEMU's software emulation).
        reason: Why this one, for people.
        machine: QEMU's machine type: ``microvm``, ``q35`` or ``virt``.
        tsc_khz: The host's TSC rate in kHz where a guest under TCG must be told, else ``None``.
    """

    name: str
    reason: str
    machine: str
    tsc_khz: int | None = None


@dataclass(frozen=True)
class Disk:
    """A raw disk of a machine. ``ephemeral``: writes are dropped when the machine ends."""

    path: Path
    readonly: bool = False
    ephemeral: bool = False


@dataclass(frozen=True)
class Launch:
    """Everything that shapes one start of a VM.

    Args:
        architecture: The guest's: ``x86_64`` or ``aarch64``.
        kernel: The kernel's file.
        initramfs: The initramfs' file.
        cpus: Virtual CPUs.
        memory: Bytes of RAM.
        ram: The file that is the guest's RAM.
        share: Whether writes to RAM reach ``ram`` (a machine to checkpoint) or stay private (a clone).
        disks: In the guest's order: root, runtime, scratch.
        words: More words for the kernel's command line.
        state: Device state to continue from instead of booting.
        name: What the process is called in process lists.
        throttle: How many CPUs the process may use together; ``None``: as many as it has vCPUs.
        cpu_seconds: Seconds of CPU time after which the host's kernel ends it.
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
        """What the program says of itself."""

    def accelerator(self, launch: Launch, required: str | None, say: Callable[[str], None]) -> Accelerator:
        """Return the accelerator that really runs ``launch``'s kernel here, probing it at first use."""

    def fingerprint(self, accelerator: Accelerator) -> tuple[str, ...]:
        """Return what a template depends on besides its launch: build, machine, CPU model, host CPU."""

    def start(self, launch: Launch, accelerator: Accelerator) -> Vmm:
        """Start a VM: a boot, or with ``launch.state`` the continuation of a template."""
