"""The process's single thread for machines' connections: an asyncio loop, started at first use."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")

_loop: asyncio.AbstractEventLoop | None = None
_loop_pid = 0
_loop_lock = threading.Lock()


def network_loop() -> asyncio.AbstractEventLoop:
    """Return this process's loop; its thread is started at first use, and again after a fork."""
    global _loop, _loop_pid
    with _loop_lock:
        if _loop is None or _loop_pid != os.getpid():
            _loop, _loop_pid = asyncio.new_event_loop(), os.getpid()
            threading.Thread(target=_loop.run_forever, name="microvm-network", daemon=True).start()
        return _loop


def run(work: Coroutine[Any, Any, _Result], timeout: float | None = None) -> _Result:
    """Run ``work`` on the loop and return its result; must not be called on the loop's own thread.

    Raises:
        TimeoutError: ``work`` took longer than ``timeout`` seconds and was cancelled.
    """
    future = asyncio.run_coroutine_threadsafe(work, network_loop())
    try:
        return future.result(timeout)
    except concurrent.futures.TimeoutError as error:  # differs from the built-in one before Python 3.11
        future.cancel()
        raise TimeoutError(str(error) or f"not done within {timeout:g} s") from error
    except BaseException:
        future.cancel()
        raise
