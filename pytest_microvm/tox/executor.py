"""Run tox's commands in a machine: check that they are allowed, and stream their output."""

from __future__ import annotations

import fnmatch
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from tox.execute.api import Execute, ExecuteInstance, ExecuteOptions, ExecuteStatus
from tox.execute.request import ExecuteRequest, StdinSource
from tox.tox_env.errors import Fail

from pytest_microvm.errors import MicroVMError
from pytest_microvm.terminal.raw_mode import raw_terminal
from pytest_microvm.tox.display import TerminalText
from pytest_microvm.tox.status import GuestStatus, NotStartedStatus
from pytest_microvm.tox.terminal import forwarded_input
from pytest_microvm.untrusted.output import safe_text

if TYPE_CHECKING:
    from tox.execute.stream import SyncWrite

    from pytest_microvm.agent.process import GuestProcess
    from pytest_microvm.machine.microvm import MicroVM

_PIECE = 65536
_AFTERWARDS = 5.0  # seconds to read output of a command's background processes
_log = logging.getLogger(__name__)

# The machine's terminal would echo input that this computer's terminal has already shown.
_WITHOUT_ECHO = ["/bin/sh", "-c", 'stty -echo 2>/dev/null; exec "$@"', "sh"]


class HasMachine(Protocol):
    """An environment with a machine for its commands."""

    def running_machine(self) -> MicroVM:
        """Return the environment's machine; start it if necessary."""


class GuestExecutor(Execute):
    """Runs commands in an environment's machine.

    Args:
        colored: Whether tox's output is coloured.
        env: The environment.
    """

    def __init__(self, colored: bool, env: HasMachine) -> None:
        super().__init__(colored)
        self._env = env

    def build_instance(
        self, request: ExecuteRequest, options: ExecuteOptions, out: SyncWrite, err: SyncWrite
    ) -> ExecuteInstance:
        """Return an instance that runs one command."""
        return GuestExecution(request, options, out, err, self._env)


class GuestExecution(ExecuteInstance):
    """The execution of one command.

    Args:
        request: The command.
        options: tox's options, with the timeouts for stopping it.
        out: Receives stdout.
        err: Receives stderr; a terminal has one stream for both.
        env: The environment.
    """

    def __init__(
        self,
        request: ExecuteRequest,
        options: ExecuteOptions,
        out: SyncWrite,
        err: SyncWrite,
        env: HasMachine,
    ) -> None:
        super().__init__(request, options, out, err)
        self._env = env
        self._cmd: Sequence[str] = request.cmd
        self._process: GuestProcess | None = None
        self._readers: list[threading.Thread] = []
        self._around = ExitStack()

    @property
    def cmd(self) -> Sequence[str]:
        """The command line."""
        return self._cmd

    def __enter__(self) -> ExecuteStatus:
        """Start the command.

        Raises:
            Fail: The command is not allowed, or the machine cannot be started.
        """
        try:
            machine = self._env.running_machine()
            self._cmd = allowed_command(self.request, machine)
            self._process = self._start(machine)
        except OSError as error:
            _log.error("Exception running subprocess %s", error)
            return NotStartedStatus(self.options, self._out, self._err, error)
        except MicroVMError as error:
            raise Fail(str(error)) from error
        return GuestStatus(self.options, self._out, self._err, self._process, machine)

    def __exit__(self, *_exc: object) -> None:
        """Read the remaining output and release the command."""
        for reader in self._readers:
            reader.join(_AFTERWARDS)
        self._around.close()

    def _start(self, machine: MicroVM) -> GuestProcess:
        size = shutil.get_terminal_size()
        reads = self.request.stdin is StdinSource.USER
        as_it_is = self.options.no_capture and not self.request.capture and reads and sys.stdin.isatty()
        terminal = sys.stdout.isatty()
        command = list(self._cmd)
        if terminal and reads and not as_it_is:
            command = [*_WITHOUT_ECHO, *command]
        process = self._around.enter_context(
            machine.popen(
                command,
                stdin=reads and not terminal,
                env=self.request.env,
                cwd=str(self.request.cwd),
                text=False,
                pty=(size.lines, size.columns) if terminal else None,
            )
        )
        if terminal and as_it_is:
            self._around.enter_context(raw_terminal())
        if reads:
            self._around.enter_context(forwarded_input(process, terminal=terminal))
        for stream, handler in ((process.stdout, self.out_handler), (process.stderr, self.err_handler)):
            if stream is not None:
                self._read(_pieces(stream), handler, terminal=terminal, as_it_is=terminal and as_it_is)
        return process

    def _read(
        self, pieces: Iterable[bytes], handler: Callable[[bytes], int], *, terminal: bool, as_it_is: bool
    ) -> None:
        def read() -> None:
            with suppress(MicroVMError, ValueError, OSError):  # waiting for the command raises the error
                for data in pieces if as_it_is else _shown(pieces, terminal=terminal):
                    handler(data)

        reader = threading.Thread(target=read, name="microvm-output", daemon=True)
        reader.start()
        self._readers.append(reader)


def allowed_command(request: ExecuteRequest, machine: MicroVM) -> list[str]:
    """Return the command with its program's path in the machine.

    Raises:
        Fail: The program is neither the environment's own nor in ``allowlist_externals``.
    """
    program = request.cmd[0]
    if request.allow is None or any(fnmatch.fnmatch(program, allow) for allow in request.allow):
        return request.cmd
    found = _found(program, request, machine)
    if found is None:
        return request.cmd  # starting it fails with a better message
    if any(fnmatch.fnmatch(found, allow) for allow in request.allow):
        return [found, *request.cmd[1:]]
    where = f"{program} (resolves to {found})" if program == found else program
    raise Fail(f"{where} is not allowed, use allowlist_externals to allow it")


def _found(program: str, request: ExecuteRequest, machine: MicroVM) -> str | None:
    if "/" in program:
        return str(PurePosixPath(str(request.cwd), program))
    for folder in request.env["PATH"].split(":"):
        candidate = PurePosixPath(str(request.cwd), folder, program)
        if machine.path(candidate).is_file():
            return str(candidate)
    return None


def _pieces(stream: Any) -> Iterator[bytes]:
    while data := stream.read1(_PIECE):
        yield data


def _shown(pieces: Iterable[bytes], *, terminal: bool) -> Iterator[bytes]:
    if not terminal:
        yield from (text.encode() for text in safe_text(pieces))
        return
    text = TerminalText()
    for data in pieces:
        yield text.feed(data)
    yield text.feed(b"", final=True)
