"""SIGTERM as an interrupt: a run that CI cancels ends its machines and tidies up, as after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable


def interrupt_on_sigterm() -> Callable[[], None]:
    """Let SIGTERM raise KeyboardInterrupt, unless somebody handles it already; return what undoes that.

    Only the main thread can; elsewhere nothing changes.
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
