"""QEMU's command line, as a pure function.

Options as in qemu(1) of QEMU 7.2 and later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_microvm.hypervisors import Accelerator, Disk, Launch

_MACHINES = {"microvm": "microvm,rtc=on", "q35": "q35", "virt": "virt"}
"""Machine types with their options.

Under KVM ``microvm`` has no clock unless asked, and the kernel looks for one: 4 of 16 s of a boot where
KVM is emulated. Under TCG it always has one."""

PROGRAMS = {"x86_64": "qemu-system-x86_64", "aarch64": "qemu-system-aarch64"}
CONSOLES = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}
_EARLY = {"x86_64": "earlyprintk=serial,ttyS0,115200", "aarch64": "earlycon"}
TRANSLATIONS = 256 * 1024**2
"""Bytes for translated guest code under TCG; QEMU would take up to 1 GiB of a large host."""

OPENED_AGAIN = ("kernel", "initramfs", "ram")
"""The files that QEMU opens as ``/proc/self/fd/N``: their options take paths only."""

_OVERHEAD = 192 * 1024**2
"""Bytes for the rest: the program, device queues, the overlay's tables, the kernel's page tables and sockets.

Measured: see ADR 0008."""

_BLOCK_DISKS = 21
"""Disks with a virtio-blk device each if there are more than fit: the rest share a SCSI controller.

Of QEMU's machine type ``microvm``, 23 virtio devices work, one of them for the ports: with a 24th the guest's
kernel hangs, and there is no bus for a 25th (tried with QEMU 7.2)."""

# auto-read-only=off: by default QEMU opens a file read-only and reopens it when a device needs to write,
# which fails with a descriptor that was opened for both.
# werror=report: a full disk is an error that the guest sees; by default QEMU stops the guest, and tests hang.
_WRITTEN = "cache=unsafe,auto-read-only=off,werror=report"

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def memory_ceiling(launch: Launch, accelerator: Accelerator) -> int:
    """Return the maximum bytes of memory of QEMU's process: guest RAM, translated code, overhead."""
    return launch.memory + (TRANSLATIONS if accelerator.name == "tcg" else 0) + _OVERHEAD


def qemu_command(
    program: str,
    launch: Launch,
    accelerator: Accelerator,
    fds: Mapping[str, int],
    *,
    readonly_ram: bool = False,
) -> list[str]:
    """Return the argv that starts ``launch``; the program is the only path in it.

    Args:
        program: QEMU's program.
        launch: The VM to start.
        accelerator: The accelerator to use.
        fds: Inherited descriptors. Connected stream sockets: ``qmp``, ``console`` and one for each port.
            Opened files: ``kernel``, ``initramfs``, ``ram``, ``disk0`` and so on, and ``overlay2`` for
            the writes to an ephemeral disk 2 (an empty qcow2 file).
        readonly_ram: Whether this QEMU (8.2 or later) can map RAM privately from a read-only file.
    """
    bus = "pci" if accelerator.machine == "q35" else "device"
    command = [
        program,
        "-name", f"{launch.name},process={launch.name}",
        "-machine", f"{_MACHINES[accelerator.machine]},memory-backend=mem",
        "-accel", _accel(accelerator),
        "-cpu", _cpu(launch, accelerator),
        "-smp", str(launch.cpus),
        "-m", f"{launch.memory}B",
        "-object", _memory(launch, fds["ram"], readonly_ram=readonly_ram),
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
    scsi = _scsi_disks(launch)
    if scsi:
        command += ["-device", f"virtio-scsi-{bus},id=scsi"]
    for number, disk in _plug_order(launch.disks, accelerator):
        for name in (f"disk{number}", f"overlay{number}"):
            if name in fds:
                command += ["-add-fd", f"fd={fds[name]},set={fds[name]}"]
        unit = number - len(launch.disks) + scsi
        device = f"virtio-blk-{bus}" if unit < 0 else f"scsi-hd,bus=scsi.0,channel=0,scsi-id=0,lun={unit}"
        command += ["-drive", _drive(number, disk, fds), "-device", f"{device},drive=disk{number}"]
    command += ["-kernel", _again(fds["kernel"]), "-initrd", _again(fds["initramfs"])]
    command += ["-append", " ".join(_words(launch, accelerator))]
    if launch.state is not None:
        command += ["-incoming", "defer"]
    return command


def _scsi_disks(launch: Launch) -> int:
    """Return the number of disks, the last ones, that are units of a SCSI controller."""
    count = len(launch.disks)
    return count - _BLOCK_DISKS if count > _BLOCK_DISKS + 1 else 0


def _accel(accelerator: Accelerator) -> str:
    return f"tcg,tb-size={TRANSLATIONS // 1024**2}" if accelerator.name == "tcg" else accelerator.name


def _cpu(launch: Launch, accelerator: Accelerator) -> str:
    """Return the CPU model.

    An emulated x86 CPU does not promise fast string instructions, with which Linux would clear and copy its
    pages: TCG runs ``rep movsb`` a byte at a time. See ADR 0038. Virtualisation (Intel's vmx, AMD's svm)
    opens more of the host's kernel to the guest, so it is off unless asked for. An emulated CPU always has
    AMD's: that is QEMU's own code, and without it programs of Debian 13's C library end with an error.
    """
    if launch.architecture != "x86_64":
        return "max" if accelerator.name == "tcg" else "host"
    if accelerator.name == "tcg":
        return "max,erms=off,fsrm=off"
    return "host" if launch.nested else "host,vmx=off,svm=off"


def _memory(launch: Launch, fd: int, *, readonly_ram: bool) -> str:
    options = f"memory-backend-file,id=mem,size={launch.memory},mem-path={_again(fd)}"
    if launch.share:
        return options + ",share=on"
    return options + (",share=off,readonly=on,rom=off" if readonly_ram else ",share=off")


def _again(fd: int) -> str:
    """Return the path with which QEMU reopens an inherited file, for options that take only paths."""
    return f"/proc/self/fd/{fd}"


def _plug_order(disks: tuple[Disk, ...], accelerator: Accelerator) -> list[tuple[int, Disk]]:
    """Return the disks in the order that makes the first one vda: ``virt`` guests find slots backwards."""
    numbered = list(enumerate(disks))
    return numbered[::-1] if accelerator.machine == "virt" else numbered


def _drive(number: int, disk: Disk, fds: Mapping[str, int]) -> str:
    file = f"/dev/fdset/{fds[f'disk{number}']}"
    if disk.readonly:
        return f"if=none,id=disk{number},format=raw,file={file},readonly=on"
    if disk.ephemeral:
        overlay = f"/dev/fdset/{fds[f'overlay{number}']}"
        return (
            f"if=none,id=disk{number},format=qcow2,file={overlay},{_WRITTEN},"
            f"backing.driver=raw,backing.file.driver=file,backing.file.filename={file}"
        )
    return f"if=none,id=disk{number},format=raw,file={file},{_WRITTEN}"


def _words(launch: Launch, accelerator: Accelerator) -> tuple[str, ...]:
    console = CONSOLES[launch.architecture]
    words: tuple[str, ...] = (
        f"console={console}",
        *((_EARLY[launch.architecture], "loglevel=6") if launch.loud else ("quiet",)),
        "panic=-1",
        "random.trust_cpu=on",
        "mitigations=off",
    )
    if launch.architecture == "x86_64":
        words += ("reboot=t",)
    if accelerator.tsc_khz is not None:
        words += (f"tsc_early_khz={accelerator.tsc_khz}",)
    if scsi := _scsi_disks(launch):
        words += (f"microvm.scsi={scsi}",)
    return words + launch.words
