"""Handle SIGTERM as an interrupt: a run that CI cancels ends its machines and cleans up, as after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable


def interrupt_on_sigterm() -> Callable[[], None]:
    """Make SIGTERM raise KeyboardInterrupt, unless it is already handled; return a function that undoes that.

    Only the main thread can do that; in others nothing changes.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return lambda: None
    signal.signal(signal.SIGTERM, _interrupt)

    def undo() -> None:
        if signal.getsignal(signal.SIGTERM) is _interrupt:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return undo


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt("SIGTERM")
