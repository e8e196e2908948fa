"""A command of tox in a machine while it runs, its end, and what Ctrl-C does to it."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
from typing import TYPE_CHECKING, Any

from tox.execute.api import ExecuteOptions, ExecuteStatus
from tox.tox_env.errors import Fail

from pytest_microvm.errors import MicroVMError

if TYPE_CHECKING:
    from tox.execute.stream import SyncWrite

    from pytest_microvm.agent.process import GuestProcess
    from pytest_microvm.machine.microvm import MicroVM

_DEAD = 10.0  # seconds after SIGKILL; only a machine that hangs takes longer
_log = logging.getLogger(__name__)


class GuestStatus(ExecuteStatus):
    """How a command is doing.

    Args:
        options: How it is stopped.
        out: Has its output.
        err: Has its errors.
        process: The command.
        machine: Where it runs.
    """

    def __init__(
        self,
        options: ExecuteOptions,
        out: SyncWrite,
        err: SyncWrite,
        process: GuestProcess,
        machine: MicroVM,
    ) -> None:
        super().__init__(options, out, err)
        self._process = process
        self._machine = machine
        self._stopping = threading.Lock()

    @property
    def exit_code(self) -> int | None:
        """Its exit status (negative: the signal that ended it), ``None`` while it runs."""
        return self._process.returncode

    @property
    def metadata(self) -> dict[str, Any]:
        """Where it runs."""
        return {"machine": self._machine.id, "pid": self._process.pid}

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end, ``timeout`` seconds at most.

        Raises:
            Fail: Its machine ended, or exceeded a quota.
        """
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        except MicroVMError as error:
            raise Fail(str(error)) from error

    def write_stdin(self, content: str) -> None:
        """Write to what it reads."""
        if self._process.stdin is not None:
            self._process.stdin.write(content.encode())

    def interrupt(self) -> None:
        """Stop it as tox stops programs: SIGINT, SIGTERM, SIGKILL, with the configured time between.

        For one Ctrl-C tox asks from two threads; a program must not get a second SIGINT while it ends.
        """
        with self._stopping:
            self._stop()

    def _stop(self) -> None:
        steps = (
            (self.options.suicide_timeout, signal.SIGINT),
            (self.options.interrupt_timeout, signal.SIGTERM),
            (self.options.terminate_timeout, signal.SIGKILL),
        )
        try:
            for seconds, number in steps:
                if self.wait(max(seconds, 0.0)) is not None:
                    return
                _log.warning("send signal %s to %d in %s", number.name, self._process.pid, self._machine.id)
                self._process.send_signal(number)
            if self.wait(_DEAD) is None:
                self._machine.instance.vmm.kill()
        except TimeoutError:  # its agent does not answer
            self._machine.instance.vmm.kill()
        except (MicroVMError, Fail):  # it is gone: nothing runs any more
            pass


class NotStarted(ExecuteStatus):
    """A command that could not be started.

    Args:
        options: How it would have been stopped.
        out: Has nothing.
        err: Has nothing.
        error: Why.
    """

    def __init__(self, options: ExecuteOptions, out: SyncWrite, err: SyncWrite, error: OSError) -> None:
        super().__init__(options, out, err)
        self._error = error

    @property
    def exit_code(self) -> int:
        """The system's number of the error, as tox has it."""
        return self._error.errno or 1

    @property
    def start_error(self) -> BaseException:
        """Why it did not start."""
        return self._error

    def wait(self, timeout: float | None = None) -> int:  # noqa: ARG002 - tox's signature
        """Return at once."""
        return self.exit_code

    def write_stdin(self, content: str) -> None:
        """Write nowhere."""

    def interrupt(self) -> None:
        """Stop nothing."""
