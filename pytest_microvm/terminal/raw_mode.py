"""Raw mode of this process's terminal, for a command in a machine."""

from __future__ import annotations

import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def raw_terminal() -> Iterator[None]:
    """Pass every key through unchanged, including Ctrl-C, inside the ``with`` block."""
    before = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
