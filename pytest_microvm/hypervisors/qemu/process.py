"""One QEMU process: started with its sockets connected, checkpointed, killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pytest_microvm.errors import BootError, HostError
from pytest_microvm.hypervisors.qemu.command import qemu_command
from pytest_microvm.hypervisors.qemu.qmp import Qmp, QmpError
from pytest_microvm.machine import Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_microvm.hypervisors import Accelerator, Launch

_CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}, {"capability": "events", "state": True}]
# The kernel kills a machine when the *thread* that started it ends (PR_SET_PDEATHSIG, prctl(2)), so
# every machine is started from this one thread, which lives as long as the process does.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="microvm-spawn")


def _renew_spawner() -> None:
    """Give a fork a thread of its own: it has none of its parent's."""
    global _spawner  # noqa: PLW0603 - one per process
    _spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="microvm-spawn")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_spawner)


class QemuProcess:
    """A running QEMU (a :class:`pytest_microvm.machine.Vmm`).

    Args:
        program: QEMU's program.
        launch: What to start. With ``state`` the VM runs on from there, else it boots.
        accelerator: What to run it with.

    Raises:
        BootError: QEMU did not start, or refused the state.
        HostError: A program it needs is missing.
    """

    def __init__(self, program: str, launch: Launch, accelerator: Accelerator) -> None:
        names = ("qmp", "console", *launch.ports)
        self.sockets: dict[str, socket.socket] = {}
        self._last_usage = Usage()
        with ExitStack() as theirs, ExitStack() as on_failure:
            fds = {}
            for name in names:
                ours, other = socket.socketpair()
                self.sockets[name] = on_failure.enter_context(ours)
                fds[name] = theirs.enter_context(other).fileno()
            self._stderr = on_failure.enter_context(tempfile.TemporaryFile())
            command = qemu_command(program, launch, accelerator, fds)
            self._process = _spawn(command, tuple(fds.values()), self._stderr)
            on_failure.callback(self._end)
            theirs.close()
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
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether QEMU still runs."""
        return self._process.poll() is None

    def checkpoint(self, state: Path) -> None:
        """Stop the guest and write its device state; its RAM is in its shared RAM file.

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
        """Let a guest that was stopped by :meth:`checkpoint` run on."""
        self.qmp.execute("cont")

    def kill(self) -> None:
        """End the VM at once; a second call does nothing."""
        self._end()
        self.qmp.close()
        self._stderr.close()

    def end_reason(self, timeout: float = 5.0) -> str:
        """Return why a VM whose sockets closed has ended, for people."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return "its sockets closed while QEMU still runs"
        for event in self.qmp.drain_events():
            if event.get("event") == "SHUTDOWN":
                reason = event.get("data", {}).get("reason", "unknown")
                return _SHUTDOWN_WORDS.get(reason, f"QEMU ended: {reason}")
        if status < 0:
            return f"QEMU was killed by signal {-status}"
        return f"QEMU ended with status {status}"

    def usage(self) -> Usage:
        """Return what the process has used (Linux's /proc); the last known figures once it ended."""
        with contextlib.suppress(OSError):  # it has ended
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
            )
            seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            if "VmHWM" in status:  # a zombie has none
                memory, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
                self._last_usage = Usage(seconds, memory, peak)
            else:
                self._last_usage = replace(self._last_usage, cpu_seconds=seconds)
        return self._last_usage

    def stderr(self) -> str:
        """Return the end of what QEMU said on stderr."""
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
        self.resume()  # the state was saved while the machine stood still, so it is loaded standing still

    def _wait_migration(self) -> None:
        data = self.qmp.wait_event("MIGRATION", lambda data: data.get("status") in ("completed", "failed"))
        if data["status"] == "failed":
            raise QmpError("QEMU could not save or load the machine's state")

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()


_SHUTDOWN_WORDS = {
    "guest-shutdown": "the guest powered itself off",
    "guest-reset": "the guest rebooted itself, or its kernel panicked",
    "guest-panic": "the guest's kernel panicked",
}


def _spawn(command: Sequence[str], fds: tuple[int, ...], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise HostError("setpriv is missing", resolution="install util-linux")
    argv = [setpriv, "--pdeathsig", "KILL", "--no-new-privs", *command]
    options: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": stderr,
        "stderr": stderr,
        "pass_fds": fds,
        "env": {"TMPDIR": tempfile.gettempdir(), "PATH": os.environ.get("PATH", os.defpath)},
        "start_new_session": True,  # a Ctrl-C of the terminal is for us; we end the machines
    }
    try:
        return _spawner.submit(lambda: subprocess.Popen(argv, **options)).result()
    except FileNotFoundError as error:
        raise HostError(f"{error.filename} is missing", resolution="run `make setup`") from error
