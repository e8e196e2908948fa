"""Run a shell command in a machine: stream its lines, and stop it at a deadline or on cancellation."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from pytest_microvm.errors import MicroVMError
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.untrusted.output import safe_text

Why = Literal["cancelled", "timeout"]

_LOOK = 0.2  # seconds between two checks whether to stop
_AFTERWARDS = 5.0  # seconds for the rest of a command's output
_PIECE = 65536


class Stopped(Exception):
    """A command was stopped on request.

    Args:
        why: ``cancelled``: the run was cancelled; ``timeout``: the deadline passed.
    """

    def __init__(self, why: Why) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True)
class Stop:
    """The conditions for stopping.

    Args:
        cancelled: Set when the run is cancelled.
        deadline: The deadline by :func:`time.monotonic`; ``None``: no limit.
    """

    cancelled: threading.Event = field(default_factory=threading.Event)
    deadline: float | None = None

    def check(self) -> None:
        """Raise an exception if a condition for stopping is met.

        Raises:
            Stopped: The run was cancelled, or the deadline passed.
        """
        if self.cancelled.is_set():
            raise Stopped("cancelled")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise Stopped("timeout")


def run_command(
    machine: MicroVM,
    command: str,
    *,
    cwd: PurePosixPath,
    env: Mapping[str, str],
    say: Callable[[str], None],
    stop: Stop,
) -> int:
    """Run a command with ``/bin/sh -e`` and return its status (negative: the signal that ended it).

    Args:
        machine: The machine.
        command: The command; stdout and stderr are merged.
        cwd: The working directory.
        env: The environment variables.
        say: Called with each line of output, made safe to display.
        stop: The conditions for stopping it.

    Raises:
        Stopped: The command was stopped early.
        QuotaExceeded: The machine was ended, because it exceeded a quota.
        MachineCrashed: The machine ended by itself.
    """
    stop.check()
    argv = ["/bin/sh", "-c", 'exec /bin/sh -e -c "$1" 2>&1', "sh", command]
    with machine.popen(argv, cwd=cwd, env=env, text=False) as process:
        reader = threading.Thread(target=_read, args=(process.stdout, say), daemon=True)
        reader.start()
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(_LOOK)
                    break
                stop.check()
        except Stopped:
            with suppress(MicroVMError, TimeoutError):
                process.kill()
            raise
        finally:
            reader.join(_AFTERWARDS)
    return status


def _read(stdout: Any, say: Callable[[str], None]) -> None:
    with suppress(MicroVMError, ValueError, OSError):  # waiting for the command raises the error
        for text in safe_text(_pieces(stdout)):
            for line in text.splitlines():
                say(line)


def _pieces(stdout: Any) -> Iterator[bytes]:
    while data := stdout.read1(_PIECE):
        yield data
