"""One QEMU process: start it with connected sockets, checkpoint it, kill it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pytest_microvm.errors import BootError, HostError
from pytest_microvm.hypervisors.cgroups import CgroupLimits, find_cgroups
from pytest_microvm.hypervisors.containment import Walls, find_walls, prefer_for_ending
from pytest_microvm.hypervisors.probe import KVM_DEVICE
from pytest_microvm.hypervisors.qemu.command import OPENED_AGAIN, memory_ceiling, qemu_command
from pytest_microvm.hypervisors.qemu.files import largest_file, open_files, written_file
from pytest_microvm.hypervisors.qemu.qmp import Qmp, QmpError
from pytest_microvm.hypervisors.rlimits import Rlimits
from pytest_microvm.hypervisors.usage import process_usage
from pytest_microvm.machine.instance import Usage
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_microvm.hypervisors import Accelerator, Launch

_CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}, {"capability": "events", "state": True}]
_SIGNALLED = 128
_FILES = 256  # descriptors
_THREADS = 160  # QEMU keeps at most 64 for its disks, and one for each vCPU
_STACKS = 1024**3  # bytes of private memory that threads reserve and hardly touch (8 MiB each)
_ADDRESSES = 16 * 1024**3  # bytes of address space for libraries, arenas and stacks
# The kernel kills a machine when the *thread* that started it ends (PR_SET_PDEATHSIG, prctl(2)), so
# every machine is started from this one thread, which lives as long as the process does.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="microvm-spawn")


def _renew_spawner() -> None:
    """Replace the spawner thread in a forked child, which does not inherit its parent's."""
    global _spawner  # noqa: PLW0603 - one per process
    _spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="microvm-spawn")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_spawner)


class QemuProcess:
    """A running QEMU (a :class:`pytest_microvm.machine.instance.Vmm`).

    Attributes:
        pid: QEMU's process id.
        sockets: Our ends of its console and ports.
        not_enforced: Requested limits that this host does not enforce, one line each.

    Args:
        program: QEMU's program.
        launch: The VM to start: continued from ``state`` if set, else booted.
        accelerator: The accelerator to use.

    Raises:
        BootError: QEMU did not start, or refused the state.
        HostError: A program it needs is missing.
    """

    def __init__(
        self, program: str, launch: Launch, accelerator: Accelerator, *, readonly_ram: bool = False
    ) -> None:
        self.sockets: dict[str, socket.socket] = {}
        self._last_usage = Usage()
        self._lock = threading.Lock()  # a watchdog reads the usage while other threads end the machine
        self._written: int | None = None
        self._ceiling_hit: int | None = None
        self._inner: int | None = None  # a descriptor of QEMU's process where bubblewrap is its parent
        walls, cgroups = find_walls(program), find_cgroups()
        devices = accelerator_devices(accelerator)
        identity = walls.identity(devices)
        limits = CgroupLimits(memory_ceiling(launch, accelerator), launch.throttle)
        self.not_enforced = cgroups.not_enforced(limits)
        with ExitStack() as theirs, ExitStack() as on_failure:
            try:
                fds = open_files(launch, identity, readonly_ram=readonly_ram, stack=theirs)
                rlimits = _rlimits(launch, limits, own_user=identity is not None and walls.own_users)
                self._group = cgroups.group(limits)
                on_failure.callback(self._group.remove)
                self._written = written_file(launch, fds)
            except OSError as error:
                raise BootError(
                    f"QEMU cannot be started: {error}", resolution="run `pytest-microvm doctor`"
                ) from error
            on_failure.callback(self._forget_written)
            self._written_before = self._written_bytes()
            for name in ("qmp", "console", *launch.ports):
                ours, other = socket.socketpair()
                self.sockets[name] = on_failure.enter_context(ours)
                fds[name] = theirs.enter_context(other).fileno()
            self._stderr = on_failure.enter_context(tempfile.TemporaryFile())
            command = qemu_command(program, launch, accelerator, fds, readonly_ram=readonly_ram)
            told: IO[bytes] | None = None
            if walls.bubblewrap:
                told, fds["told"] = _pipe(on_failure, theirs)
            ruleset = _ruleset(walls, program, devices, fds, theirs)
            chain = walls.command(identity, rlimits, devices, fds.get("told"), ruleset)
            argv = cgroups.prefix(limits) + chain
            self._process = _spawn(
                [*argv, *command], tuple(fds.values()), self._stderr, cgroups.environment()
            )
            on_failure.callback(self._end)
            theirs.close()
            self.pid = self._process.pid if told is None else self._inner_pid(told)
            self._confine()
            self.qmp = Qmp(self.sockets.pop("qmp"))
            try:
                self.qmp.greet()
                if launch.state is not None:
                    self._continue(launch.state)
            except QmpError as error:
                raise BootError(
                    f"QEMU did not start: {error.brief}",
                    details=self.stderr(),
                    resolution="run `pytest-microvm doctor`",
                ) from error
            on_failure.pop_all()

    @property
    def alive(self) -> bool:
        """True while QEMU runs."""
        return self._process.poll() is None

    def checkpoint(self, state: Path) -> None:
        """Stop the guest and write its device state; its RAM is already in the shared RAM file.

        Raises:
            QmpError: QEMU could not save it.
        """
        self.qmp.execute("stop")
        self.qmp.execute("migrate-set-capabilities", {"capabilities": _CAPABILITIES})
        self.qmp.events.clear()
        descriptor = os.open(state, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self.qmp.execute("getfd", {"fdname": "state"}, fd=descriptor)
            self.qmp.execute("migrate", {"uri": "fd:state"})
            self._wait_migration()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def resume(self) -> None:
        """Resume a guest that :meth:`checkpoint` stopped."""
        self.qmp.execute("cont")

    def kill(self) -> None:
        """End the VM at once; a second call does nothing."""
        self._forget_written()  # before QEMU ends: the last process to close the file waits for its deletion
        self._end()
        self._ceiling_hit = self._group.ceiling_hit() or self._ceiling_hit
        self._group.remove()
        self.qmp.close()
        self._stderr.close()

    def end_reason(self, timeout: float = 5.0) -> str:
        """Return, for display, the reason that a VM whose sockets closed has ended."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return "its sockets closed while QEMU still runs"
        for event in self.qmp.drain_events():
            if event.get("event") == "SHUTDOWN":
                reason = sanitize_line(str(event["data"].get("reason", "unknown")))
                return _SHUTDOWN_WORDS.get(reason, f"QEMU ended: {reason}")
        if self.pid != self._process.pid and status > _SIGNALLED:  # bubblewrap reports signals like a shell
            status = _SIGNALLED - status
        if status < 0:
            return f"QEMU was killed by signal {-status}" + _SIGNAL_WORDS.get(-status, "")
        return f"QEMU ended with status {status}"

    def ceiling_hit(self) -> int | None:
        """Return the memory limit in bytes if the host's kernel killed the process for exceeding it."""
        return self._ceiling_hit or self._group.ceiling_hit()

    def usage(self) -> Usage:
        """Return the process's resource usage (Linux's /proc); once it has ended, the last known figures."""
        with self._lock:
            if self._process.returncode is None:  # else its id may have been reused
                used = process_usage(self.pid)
                if used is not None:
                    last = self._last_usage
                    disk = last.disk_bytes if self._written is None else self._disk_bytes()
                    peak = max(used.peak_memory_bytes, last.peak_memory_bytes)  # a zombie has none
                    self._last_usage = replace(used, peak_memory_bytes=peak, disk_bytes=disk)
        return self._last_usage

    def stderr(self) -> str:
        """Return the end of QEMU's stderr."""
        self._stderr.seek(0)
        return self._stderr.read()[-4000:].decode(errors="replace").strip()

    def _continue(self, state: Path) -> None:
        self.qmp.execute("migrate-set-capabilities", {"capabilities": _CAPABILITIES})
        descriptor = os.open(state, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.qmp.execute("getfd", {"fdname": "state"}, fd=descriptor)
        finally:
            os.close(descriptor)
        self.qmp.execute("migrate-incoming", {"uri": "fd:state"})
        self._wait_migration()
        self.resume()  # the state was saved from a stopped machine, so the loaded one is stopped

    def _wait_migration(self) -> None:
        data = self.qmp.wait_event("MIGRATION", lambda data: data.get("status") in ("completed", "failed"))
        if data["status"] == "failed":
            raise QmpError("QEMU could not save or load the machine's state")

    def _confine(self) -> None:
        """Add the process to its cgroup before QEMU has allocated much."""
        prefer_for_ending(self.pid)
        try:
            self._group.add(self.pid)
        except ProcessLookupError:  # it has ended: the greeting that follows reports why
            return
        except OSError as error:
            raise BootError(
                f"QEMU could not be put into its cgroup: {error}", resolution="run `pytest-microvm doctor`"
            ) from error

    def _written_bytes(self) -> int:
        return 0 if self._written is None else os.fstat(self._written).st_blocks * 512

    def _disk_bytes(self) -> int:
        return max(0, self._written_bytes() - self._written_before)

    def _forget_written(self) -> None:
        with self._lock:
            if self._written is not None:
                self._last_usage = replace(self._last_usage, disk_bytes=self._disk_bytes())
                os.close(self._written)
                self._written = None

    def _inner_pid(self, told: IO[bytes]) -> int:
        """Return QEMU's process id as bubblewrap reports it; bubblewrap's own if it could not start QEMU."""
        with told, contextlib.suppress(ValueError, KeyError, ProcessLookupError):
            said = b""
            while b"}" not in said and (data := os.read(told.fileno(), 4096)):
                said += data
            pid = int(json.loads(said)["child-pid"])
            self._inner = os.pidfd_open(pid)
            return pid
        return self._process.pid

    def _end(self) -> None:
        with self._lock:
            if self._inner is not None:  # QEMU first: bubblewrap's end does not wait for it
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._inner, signal.SIGKILL)
                select.select([self._inner], [], [])
                os.close(self._inner)
                self._inner = None
                self._process.wait()
        self._process.kill()
        self._process.wait()


_SIGNAL_WORDS: dict[int, str] = {
    signal.SIGBUS: ": its memory file was cut off, or the disk under it is full"
}  # mmap(2)
_SHUTDOWN_WORDS = {
    "guest-shutdown": "the guest powered itself off",
    "guest-reset": "the guest rebooted itself, or its kernel panicked",
    "guest-panic": "the guest's kernel panicked",
}


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
        raise BootError(
            f"QEMU's files cannot be limited: {error}", resolution="run `pytest-microvm doctor`"
        ) from error
    if ruleset is not None:
        stack.callback(os.close, ruleset)
        fds["ruleset"] = ruleset
    return ruleset


def accelerator_devices(accelerator: Accelerator) -> list[Path]:
    """Return the devices that QEMU's process must be able to open."""
    return [KVM_DEVICE] if accelerator.name == "kvm" else []


def _rlimits(launch: Launch, limits: CgroupLimits, *, own_user: bool) -> Rlimits:
    """Return resource limits for QEMU, set far above its normal use."""
    return Rlimits(
        files=_FILES,
        file_bytes=largest_file(launch),
        address_bytes=limits.memory + _ADDRESSES,
        data_bytes=limits.memory + _STACKS,
        cpu_seconds=None if launch.cpu_seconds is None else math.ceil(launch.cpu_seconds) + 2,
        threads=_THREADS if own_user else None,
    )


def _spawn(
    argv: Sequence[str], fds: tuple[int, ...], stderr: IO[bytes], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    options: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": stderr,
        "stderr": stderr,
        "pass_fds": fds,
        "cwd": "/",
        "env": environment,
        "start_new_session": True,  # the terminal's Ctrl-C reaches only us; we end the machines
    }
    try:
        return _spawner.submit(lambda: subprocess.Popen(argv, **options)).result()
    except FileNotFoundError as error:
        raise HostError(f"{error.filename} is missing", resolution="run `make setup`") from error
