"""One QEMU process: continue, checkpoint and kill it, and tell its usage and the reason of its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import IO

from pytest_microvm.hypervisors.cgroups import Cgroup
from pytest_microvm.hypervisors.qemu.files import WrittenFile
from pytest_microvm.hypervisors.qemu.qmp import Qmp, QmpError
from pytest_microvm.hypervisors.qemu.spawned import SpawnedProcess
from pytest_microvm.hypervisors.usage import process_usage
from pytest_microvm.machine.instance import Usage
from pytest_microvm.untrusted.text import sanitize_line

_CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}, {"capability": "events", "state": True}]
_FILE_MIGRATION = (8, 2)


class QemuProcess:
    """A running QEMU (a :class:`pytest_microvm.machine.instance.Vmm`).

    Args:
        process: The process.
        qmp: The connection to its control socket.
        sockets: Our ends of its console and ports.
        stderr: The file that holds its stderr.
        group: Its cgroup.
        written: The file that receives the machine's disk writes.
        not_enforced: Requested limits that this host does not enforce, one line each.
    """

    def __init__(
        self,
        process: SpawnedProcess,
        qmp: Qmp,
        *,
        sockets: dict[str, socket.socket],
        stderr: IO[bytes],
        group: Cgroup,
        written: WrittenFile,
        not_enforced: tuple[str, ...],
    ) -> None:
        self.qmp = qmp
        self.sockets = sockets
        self.not_enforced = not_enforced
        self._process = process
        self._stderr = stderr
        self._group = group
        self._written = written
        self._last_usage = Usage()
        self._lock = threading.Lock()  # a watchdog reads the usage while other threads end the machine
        self._ceiling_hit: int | None = None

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while QEMU runs."""
        return self._process.child.poll() is None

    def load(self, state: Path) -> None:
        """Continue a guest from the state that :meth:`checkpoint` wrote.

        Raises:
            QmpError: QEMU refused the state.
        """
        self.qmp.execute("migrate-set-capabilities", {"capabilities": _CAPABILITIES})
        descriptor = os.open(state, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._migrate("migrate-incoming", descriptor)
        finally:
            os.close(descriptor)
        self.resume()  # the state was saved from a stopped machine, so the loaded one is stopped

    def checkpoint(self, state: Path) -> None:
        """Stop the guest and write its device state; its RAM is already in the shared RAM file.

        Raises:
            QmpError: QEMU could not save it.
        """
        self.qmp.execute("stop")
        self.qmp.execute("migrate-set-capabilities", {"capabilities": _CAPABILITIES})
        self.qmp.events.clear()
        descriptor = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self._migrate("migrate", descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def resume(self) -> None:
        """Resume a guest that :meth:`checkpoint` stopped."""
        self.qmp.execute("cont")

    def kill(self) -> None:
        """End the VM at once; a second call does nothing."""
        with self._lock:  # before QEMU ends: the last process to close the file waits for its deletion
            self._written.close()
        self._process.kill()
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
        if status < 0:
            return f"QEMU was killed by signal {-status}" + _SIGNAL_WORDS.get(-status, "")
        return f"QEMU ended with status {status}"

    def ceiling_hit(self) -> int | None:
        """Return the memory limit in bytes if the host's kernel killed the process for exceeding it."""
        return self._ceiling_hit or self._group.ceiling_hit()

    def cpu_limit_hit(self) -> bool:
        """Return True if the host's kernel ended the process at RLIMIT_CPU, before a watchdog noticed."""
        return self._process.reaped and self._process.wait(0) == -signal.SIGXCPU

    def usage(self) -> Usage:
        """Return the process's resource usage (Linux's /proc); once it has ended, the last known figures."""
        with self._lock:
            used = None if self._process.reaped else process_usage(self.pid)
            if used is not None:
                peak = max(used.peak_memory_bytes, self._last_usage.peak_memory_bytes)  # a zombie has none
                self._last_usage = replace(used, peak_memory_bytes=peak)
            return replace(self._last_usage, disk_bytes=self._written.growth())

    def stderr(self) -> str:
        """Return the end of QEMU's stderr."""
        self._stderr.seek(0)
        return self._stderr.read()[-4000:].decode(errors="replace").strip()

    def _migrate(self, command: str, descriptor: int) -> None:
        """Save to an open file, or load from it.

        ``fd:`` with a file is deprecated since QEMU 9.1 and refused by QEMU 11.1; ``file:`` came with 8.2.
        """
        if self.qmp.version < _FILE_MIGRATION:
            self.qmp.execute("getfd", {"fdname": "state"}, fd=descriptor)
            self.qmp.execute(command, {"uri": "fd:state"})
            self._wait_migration()
            return
        number = self.qmp.execute("add-fd", fd=descriptor)["fdset-id"]
        self.qmp.execute(command, {"uri": f"file:/dev/fdset/{number}"})
        self._wait_migration()
        self.qmp.execute("remove-fd", {"fdset-id": number})

    def _wait_migration(self) -> None:
        data = self.qmp.wait_event("MIGRATION", lambda data: data.get("status") in ("completed", "failed"))
        if data["status"] == "failed":
            raise QmpError("QEMU could not save or load the machine's state")


_SIGNAL_WORDS: dict[int, str] = {
    signal.SIGBUS: ": its memory file was cut off, or the disk under it is full"
}  # mmap(2)
_SHUTDOWN_WORDS = {
    "guest-shutdown": "the guest powered itself off",
    "guest-reset": "the guest rebooted itself, or its kernel panicked",
    "guest-panic": "the guest's kernel panicked",
}
