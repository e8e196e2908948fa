"""Spawn a contained command and end it, also where bubblewrap stays as its parent."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any

from pytest_microvm.errors import HostError
from pytest_microvm.programs.needed import INSTALL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SIGNALLED = 128
# The kernel kills a machine when the *thread* that started it ends (PR_SET_PDEATHSIG, prctl(2)), so
# every machine is started from this one thread, which lives as long as the process does.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="microvm-spawn")


def _renew_spawner() -> None:
    """Replace the spawner thread in a forked child, which does not inherit its parent's."""
    global _spawner  # noqa: PLW0603 - one per process
    _spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="microvm-spawn")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_spawner)


class SpawnedProcess:
    """A child process; within bubblewrap, bubblewrap is the child and the command is *its* child.

    Attributes:
        child: The child.
        pid: The command's process id; until :meth:`find_command` was called, the child's.

    Args:
        child: The child.
    """

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self.child = child
        self.pid = child.pid
        self._command: int | None = None  # a descriptor of the command's process, if bubblewrap is its parent
        self._lock = threading.Lock()

    @property
    def reaped(self) -> bool:
        """True once the process ids may have been reused."""
        return self.child.returncode is not None

    def find_command(self, told: IO[bytes]) -> None:
        """Read the command's process id from bubblewrap, which writes none if the command did not start."""
        with told, contextlib.suppress(ValueError, KeyError, ProcessLookupError):
            said = b""
            while b"}" not in said and (data := os.read(told.fileno(), 4096)):
                said += data
            pid = int(json.loads(said)["child-pid"])
            self._command = os.pidfd_open(pid)
            self.pid = pid

    def wait(self, timeout: float) -> int:
        """Return the exit status; negative: the signal that ended the command.

        Raises:
            TimeoutExpired: It still runs.
        """
        status = self.child.wait(timeout)
        if self.pid != self.child.pid and status > _SIGNALLED:  # bubblewrap reports signals like a shell
            return _SIGNALLED - status
        return status

    def kill(self) -> None:
        """Kill the command and its parent, and reap them; a second call does nothing."""
        with self._lock:
            if self._command is not None:  # first: bubblewrap's end does not wait for it
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._command, signal.SIGKILL)
                select.select([self._command], [], [])
                os.close(self._command)
                self._command = None
                self.child.wait()
        self.child.kill()
        self.child.wait()


def spawn(
    argv: Sequence[str], fds: tuple[int, ...], stderr: IO[bytes], environment: Mapping[str, str]
) -> SpawnedProcess:
    """Start a command that inherits ``fds``, and whose output goes to ``stderr``.

    Raises:
        HostError: The program is missing.
    """
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
        return SpawnedProcess(_spawner.submit(lambda: subprocess.Popen(argv, **options)).result())
    except FileNotFoundError as error:
        raise HostError(f"{error.filename} is missing", resolution=INSTALL) from error
