"""The status of tox's command in a machine: its exit code, its input, and its reaction to Ctrl-C."""

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
    """The status of a started command.

    Args:
        options: tox's options, with the timeouts for stopping it.
        out: Its stdout.
        err: Its stderr.
        process: The command.
        machine: The machine that runs it.
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
        """The exit status (negative: the signal that ended the command), ``None`` while it runs."""
        return self._process.returncode

    @property
    def metadata(self) -> dict[str, Any]:
        """The ids of the machine and of the process."""
        return {"machine": self._machine.id, "pid": self._process.pid}

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the command to end, at most ``timeout`` seconds.

        Raises:
            Fail: The machine ended, or exceeded a quota.
        """
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        except MicroVMError as error:
            raise Fail(str(error)) from error

    def write_stdin(self, content: str) -> None:
        """Write to the command's stdin."""
        if self._process.stdin is not None:
            self._process.stdin.write(content.encode())

    def interrupt(self) -> None:
        """Stop the command as tox does: SIGINT, SIGTERM, SIGKILL, with the configured timeouts in between.

        On one Ctrl-C tox calls this from two threads; a program must not get a second SIGINT while it exits.
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
        except TimeoutError:  # the agent does not respond
            self._machine.instance.vmm.kill()
        except (MicroVMError, Fail):  # the machine is gone: nothing is left to stop
            pass


class NotStartedStatus(ExecuteStatus):
    """A command that could not be started.

    Args:
        options: tox's options.
        out: Its stdout, which stays empty.
        err: Its stderr, which stays empty.
        error: The error on starting it.
    """

    def __init__(self, options: ExecuteOptions, out: SyncWrite, err: SyncWrite, error: OSError) -> None:
        super().__init__(options, out, err)
        self._error = error

    @property
    def exit_code(self) -> int:
        """The system's error number, as in tox."""
        return self._error.errno or 1

    @property
    def start_error(self) -> BaseException:
        """The error that prevented the start."""
        return self._error

    def wait(self, timeout: float | None = None) -> int:  # noqa: ARG002 - tox's signature
        """Return the exit code at once."""
        return self.exit_code

    def write_stdin(self, content: str) -> None:
        """Discard the content."""

    def interrupt(self) -> None:
        """Do nothing."""
