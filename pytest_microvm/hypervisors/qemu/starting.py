"""Start QEMU: within its walls and limits, with opened files and connected sockets."""

from __future__ import annotations

import math
import os
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_microvm.errors import BootError
from pytest_microvm.hypervisors.cgroups import Cgroup, CgroupLimits, find_cgroups
from pytest_microvm.hypervisors.containment import Walls, find_walls, prefer_for_ending
from pytest_microvm.hypervisors.probe import KVM_DEVICE
from pytest_microvm.hypervisors.qemu.command import OPENED_AGAIN, memory_ceiling, qemu_command
from pytest_microvm.hypervisors.qemu.files import WrittenFile, largest_file, open_files
from pytest_microvm.hypervisors.qemu.process import QemuProcess
from pytest_microvm.hypervisors.qemu.qmp import Qmp, QmpError
from pytest_microvm.hypervisors.qemu.spawned import spawn
from pytest_microvm.hypervisors.rlimits import Rlimits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_microvm.hypervisors import Accelerator, Launch

_FILES = 256  # descriptors, without those of disks
_FILES_OF_DISK = 3  # inherited, in its set of descriptors, and as QEMU opens it again
_THREADS = 160  # QEMU keeps at most 64 for its disks, and one for each vCPU
_STACKS = 1024**3  # bytes of private memory that threads reserve and hardly touch (8 MiB each)
_ADDRESSES = 16 * 1024**3  # bytes of address space for libraries, arenas and stacks
_DOCTOR = "run `pytest-microvm doctor`"


def start_qemu(
    program: str, launch: Launch, accelerator: Accelerator, *, readonly_ram: bool = False
) -> QemuProcess:
    """Start a VM, and leave nothing behind if that fails.

    Args:
        program: QEMU's program.
        launch: The VM to start: continued from ``state`` if set, else booted.
        accelerator: The accelerator to use.
        readonly_ram: Whether QEMU can map a copy's RAM from a file that it may only read.

    Raises:
        BootError: QEMU did not start, or refused the state.
        HostError: A program it needs is missing.
    """
    with ExitStack() as on_failure:
        process = _spawned(program, launch, accelerator, on_failure, readonly_ram=readonly_ram)
        try:
            process.qmp.greet()
            if launch.state is not None:
                process.load(launch.state)
        except QmpError as error:
            brief = f"QEMU did not start: {error.brief}"
            raise BootError(brief, details=process.stderr(), resolution=_DOCTOR) from error
        on_failure.pop_all()
    return process


def accelerator_devices(accelerator: Accelerator) -> list[Path]:
    """Return the devices that QEMU's process must be able to open."""
    return [KVM_DEVICE] if accelerator.name == "kvm" else []


def _spawned(
    program: str, launch: Launch, accelerator: Accelerator, on_failure: ExitStack, *, readonly_ram: bool
) -> QemuProcess:
    """Return a process that may not have greeted yet; ``on_failure`` kills it and releases what it has."""
    walls, cgroups = find_walls(program), find_cgroups()
    devices = accelerator_devices(accelerator)
    identity = walls.identity(devices)
    limits = CgroupLimits(memory_ceiling(launch, accelerator), launch.throttle)
    with ExitStack() as theirs:
        try:
            fds = open_files(launch, identity, readonly_ram=readonly_ram, stack=theirs)
            rlimits = _rlimits(launch, limits, own_user=identity is not None and walls.own_users)
            group = cgroups.group(limits)
            on_failure.callback(group.remove)
            written = WrittenFile(launch, fds)
        except OSError as error:
            raise BootError(f"QEMU cannot be started: {error}", resolution=_DOCTOR) from error
        on_failure.callback(written.close)
        sockets = {}
        for name in ("qmp", "console", *launch.ports):
            ours, other = socket.socketpair()
            sockets[name] = on_failure.enter_context(ours)
            fds[name] = theirs.enter_context(other).fileno()
        stderr = on_failure.enter_context(tempfile.TemporaryFile())
        command = qemu_command(program, launch, accelerator, fds, readonly_ram=readonly_ram)
        told: IO[bytes] | None = None
        if walls.bubblewrap:
            told, fds["told"] = _pipe(on_failure, theirs)
        ruleset = _ruleset(walls, program, devices, fds, theirs)
        chain = walls.command(identity, rlimits, devices, fds.get("told"), ruleset)
        argv = [*cgroups.prefix(limits), *chain, *command]
        spawned = spawn(argv, tuple(fds.values()), stderr, cgroups.environment())
        on_failure.callback(spawned.kill)
    if told is not None:
        spawned.find_command(told)
    _confine(spawned.pid, group)
    qmp = Qmp(sockets.pop("qmp"))
    return QemuProcess(
        spawned,
        qmp,
        sockets=sockets,
        stderr=stderr,
        group=group,
        written=written,
        not_enforced=cgroups.not_enforced(limits),
    )


def _confine(pid: int, group: Cgroup) -> None:
    """Add a process to its cgroup before QEMU has allocated much."""
    prefer_for_ending(pid)
    try:
        group.add(pid)
    except ProcessLookupError:  # it has ended: the greeting that follows reports why
        return
    except OSError as error:
        raise BootError(f"QEMU could not be put into its cgroup: {error}", resolution=_DOCTOR) from error


def _pipe(ours: ExitStack, theirs: ExitStack) -> tuple[IO[bytes], int]:
    """Create a pipe; return our reading end and the descriptor for the process to write to."""
    reading, writing = os.pipe()
    theirs.callback(os.close, writing)
    return ours.enter_context(os.fdopen(reading, "rb", buffering=0)), writing


def _ruleset(
    walls: Walls, program: str, devices: Sequence[Path], fds: dict[str, int], stack: ExitStack
) -> int | None:
    """Return a ruleset for QEMU's files, inherited as ``ruleset``; ``None`` without Landlock."""
    try:
        ruleset = walls.ruleset(program, devices, [fds[name] for name in OPENED_AGAIN])
    except OSError as error:
        raise BootError(f"QEMU's files cannot be limited: {error}", resolution=_DOCTOR) from error
    if ruleset is not None:
        stack.callback(os.close, ruleset)
        fds["ruleset"] = ruleset
    return ruleset


def _rlimits(launch: Launch, limits: CgroupLimits, *, own_user: bool) -> Rlimits:
    """Return resource limits for QEMU, set far above its normal use."""
    return Rlimits(
        files=_FILES + _FILES_OF_DISK * len(launch.disks),
        file_bytes=largest_file(launch),
        address_bytes=limits.memory + _ADDRESSES,
        data_bytes=limits.memory + _STACKS,
        cpu_seconds=None if launch.cpu_seconds is None else math.ceil(launch.cpu_seconds) + 2,
        threads=_THREADS if own_user else None,
    )
