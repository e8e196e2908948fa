"""Forward this process's stdin to a command in a machine."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pytest_microvm.errors import MicroVMError

if TYPE_CHECKING:
    from pytest_microvm.agent.process import GuestProcess

_PIECE = 65536
_END_OF_INPUT = b"\x04"  # the character of Ctrl-D


@contextmanager
def forwarded_input(process: GuestProcess, *, terminal: bool) -> Iterator[None]:
    """Forward stdin to ``process`` until the block ends; later input is left for other readers.

    Args:
        process: The command.
        terminal: Whether it runs on a terminal in the machine.
    """
    leave, done = os.pipe()
    forwarder = threading.Thread(
        target=_forward, args=(process, leave, terminal), name="microvm-input", daemon=True
    )
    forwarder.start()
    try:
        yield
    finally:
        os.close(done)
        forwarder.join()
        os.close(leave)


def _forward(process: GuestProcess, leave: int, terminal: bool) -> None:
    stdin, target = sys.stdin.fileno(), process.stdin
    assert target is not None
    with suppress(OSError, ValueError, MicroVMError):  # the command need not read, and may have ended
        while True:
            ready, _, _ = select.select([stdin, leave], [], [])
            if leave in ready:
                return
            data = os.read(stdin, _PIECE)
            if data:
                target.write(data)
            elif terminal:
                target.write(_END_OF_INPUT)
                return
            else:
                target.close()
                return
