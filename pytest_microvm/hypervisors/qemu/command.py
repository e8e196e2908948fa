"""QEMU's command line, as a pure function.

Options as in qemu(1) of QEMU 7.2 and later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_microvm.hypervisors import Accelerator, Disk, Launch

PROGRAMS = {"x86_64": "qemu-system-x86_64", "aarch64": "qemu-system-aarch64"}
CONSOLES = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def qemu_command(program: str, launch: Launch, accelerator: Accelerator, fds: Mapping[str, int]) -> list[str]:
    """Return the argv that starts ``launch``.

    Args:
        program: QEMU's program.
        launch: What to start.
        accelerator: What to run it with.
        fds: Inherited, connected stream sockets: ``qmp``, ``console`` and one for each port.
    """
    bus = "pci" if accelerator.machine == "q35" else "device"
    command = [
        program,
        "-name", f"{launch.name},process={launch.name}",
        "-machine", f"{accelerator.machine},memory-backend=mem",
        "-accel", accelerator.name,
        "-cpu", "max" if accelerator.name == "tcg" else "host",
        "-smp", str(launch.cpus),
        "-m", f"{launch.memory}B",
        "-object", _memory(launch),
        "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none",
        "-sandbox", SANDBOX,
        "-chardev", f"socket,id=qmp,fd={fds['qmp']}",
        "-mon", "chardev=qmp,mode=control",
        "-chardev", f"socket,id=console,fd={fds['console']}",
        "-serial", "chardev:console",
        "-device", f"virtio-serial-{bus}",
    ]  # fmt: skip
    for port in launch.ports:
        command += ["-chardev", f"socket,id={port},fd={fds[port]}"]
        command += ["-device", f"virtserialport,chardev={port},name={port}"]
    for number, disk in _plug_order(launch.disks, accelerator):
        command += ["-drive", _drive(number, disk), "-device", f"virtio-blk-{bus},drive=disk{number}"]
    command += ["-kernel", str(launch.kernel), "-initrd", str(launch.initramfs)]
    command += ["-append", " ".join(_words(launch, accelerator))]
    if launch.state is not None:
        command += ["-incoming", "defer"]
    return command


def _memory(launch: Launch) -> str:
    share = "on" if launch.share else "off"
    return f"memory-backend-file,id=mem,size={launch.memory},mem-path={_escape(launch.ram)},share={share}"


def _plug_order(disks: tuple[Disk, ...], accelerator: Accelerator) -> list[tuple[int, Disk]]:
    """Return the disks so that the guest names the first one vda: its kernel finds mmio slots backwards."""
    numbered = list(enumerate(disks))
    return numbered[::-1] if accelerator.machine == "virt" else numbered


def _drive(number: int, disk: Disk) -> str:
    options = f"if=none,id=disk{number},format=raw,file={_escape(disk.path)}"
    if disk.readonly:
        return options + ",readonly=on"
    return options + (",snapshot=on" if disk.ephemeral else ",cache=unsafe")


def _words(launch: Launch, accelerator: Accelerator) -> tuple[str, ...]:
    console = CONSOLES[launch.architecture]
    words: tuple[str, ...] = (
        f"console={console}",
        "quiet",
        "panic=-1",
        "random.trust_cpu=on",
        "mitigations=off",
    )
    if launch.architecture == "x86_64":
        words += ("reboot=t",)
    if accelerator.tsc_khz is not None:
        words += (f"tsc_early_khz={accelerator.tsc_khz}",)
    return words + launch.words


def _escape(path: object) -> str:
    """Return ``path`` as an option's value: QEMU reads a doubled comma as one."""
    return str(path).replace(",", ",,")
