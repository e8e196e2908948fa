"""Connect a command in a machine to this process's terminal, or to its stdin, stdout and stderr."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from pytest_microvm.errors import MachineError
from pytest_microvm.terminal.raw_mode import raw_terminal
from pytest_microvm.untrusted.output import safe_text

if TYPE_CHECKING:
    from pytest_microvm.agent.process import GuestProcess
    from pytest_microvm.machine.microvm import MicroVM

_PIECE = 65536
_STOPPED = 10.0  # seconds; a write to a machine that has just ended may take a moment to fail


def on_terminal(machine: MicroVM, command: list[str], **options: Any) -> int:
    """Run ``command`` on this process's terminal, and return its exit status.

    The machine's output reaches the terminal unfiltered: the user has entered the machine.
    """
    size = shutil.get_terminal_size()
    environment = {"TERM": os.environ.get("TERM", "dumb"), **options.pop("env", {})}
    with (
        machine.client.limited("the command"),
        machine.popen(
            command, pty=(size.lines, size.columns), env=environment, text=False, **options
        ) as process,
    ):
        return _on_terminal(process)


def plainly(
    machine: MicroVM, command: list[str], *, raw: bool, raw_stderr: bool | None = None, **options: Any
) -> int:
    """Run ``command`` with this process's stdin, stdout and stderr, and return its exit status.

    The first Ctrl-C is sent to the command, the second one interrupts this process.

    Args:
        machine: The machine.
        command: The command line.
        raw: Whether to pass its output on byte by byte. Otherwise it is printed line by line as text without
            control sequences for a terminal or a CI system.
        raw_stderr: Likewise for its stderr; defaults to ``raw``.
        **options: Options of :meth:`MicroVM.popen`.
    """
    with (
        machine.client.limited("the command"),
        machine.popen(command, stdin=True, text=False, **options) as process,
        _interrupts_go_to(process),
    ):
        assert process.stderr is not None
        as_it_is = raw if raw_stderr is None else raw_stderr
        errors = threading.Thread(
            target=_pass_on, args=(process.stderr, sys.stderr.buffer, as_it_is), daemon=True
        )
        with _stdin_sent(process, ends=True):
            errors.start()
            _pass_on(process.stdout, sys.stdout.buffer, raw)
            errors.join()
            return process.wait()


def shell_status(returncode: int) -> int:
    """Return an exit status in the shell's form: 128 plus the signal's number for a killed command."""
    return returncode if returncode >= 0 else 128 - returncode


def _on_terminal(process: GuestProcess) -> int:
    stdout = process.stdout
    assert stdout is not None

    def resize(_number: int, _frame: object) -> None:
        # In a thread of its own: the handler may have interrupted a thread that holds the link's lock.
        threading.Thread(target=send_size, daemon=True).start()

    def send_size() -> None:
        size = shutil.get_terminal_size()
        with suppress(MachineError, TimeoutError):
            process.resize(size.lines, size.columns)

    previous = signal.signal(signal.SIGWINCH, resize)
    try:
        with raw_terminal(), _stdin_sent(process, ends=False):
            while data := stdout.read1(_PIECE):  # type: ignore[attr-defined]
                os.write(sys.stdout.fileno(), data)
        return process.wait()
    finally:
        signal.signal(signal.SIGWINCH, previous)


@contextmanager
def _stdin_sent(process: GuestProcess, *, ends: bool) -> Iterator[None]:
    """Send this process's stdin to a command during the ``with`` block, and not a byte afterwards.

    Args:
        process: The command.
        ends: Whether its stdin ends where this process's does.
    """
    stopped, stop = os.pipe()
    sender = threading.Thread(target=_send, args=(process, stopped, ends), daemon=True)
    sender.start()
    try:
        yield
    finally:
        os.close(stop)
        sender.join(_STOPPED)
        os.close(stopped)


def _send(process: GuestProcess, stopped: int, ends: bool) -> None:
    assert process.stdin is not None
    with suppress(OSError, ValueError, MachineError):  # the command need not read, and may have ended
        source = sys.stdin.fileno()
        while stopped not in (ready := select.select([source, stopped], [], [])[0]) and ready:
            data = os.read(source, _PIECE)
            if not data:
                break
            process.stdin.write(data)
        if ends:
            process.stdin.close()


def _pass_on(source: IO[bytes] | None, target: IO[bytes], raw: bool) -> None:
    assert source is not None
    try:
        pieces = _pieces(source)
        for data in pieces if raw else map(str.encode, safe_text(pieces)):
            target.write(data)
            target.flush()
    except MachineError:
        if threading.current_thread() is threading.main_thread():
            raise  # in other threads: waiting for the command raises the same error


def _pieces(source: Any) -> Iterator[bytes]:
    while data := source.read1(_PIECE):
        yield data


@contextmanager
def _interrupts_go_to(process: GuestProcess) -> Iterator[None]:
    """Send the first Ctrl-C to the command; a second one interrupts this process."""

    def interrupt(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # In a thread of its own: the handler may have interrupted a thread that holds the link's lock.
        threading.Thread(target=forward, daemon=True).start()

    def forward() -> None:
        with suppress(MachineError, TimeoutError):
            process.send_signal(signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
