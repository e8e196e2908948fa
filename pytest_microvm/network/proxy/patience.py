"""Time limits for a guest's connections: end those that are idle or send a request's head too slowly."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from pytest_microvm.network.proxy.relaying import GuestStream

HEAD = 60.0
"""Seconds from the first byte of a request to the end of its head."""

IDLE = 600.0
"""Seconds without a byte in either direction; today's language models think for minutes before responding."""

_AGAIN = 1.0  # seconds before another try; a cancellation can get lost, see _AGAIN in server.py


class Patience:
    """Timer that cancels the task of a connection when it waits for too long.

    Args:
        guest: The connection.
        work: The task that serves the connection.
        idle: Maximum seconds without a byte.
        head: Maximum seconds for the head of a request.
    """

    def __init__(self, guest: GuestStream, work: asyncio.Task[Any], *, idle: float, head: float) -> None:
        self._guest = guest
        self._work = work
        self._idle = idle
        self._head = head
        self._loop = asyncio.get_running_loop()
        guest.touched = self._loop.time()
        self._timer = self._loop.call_later(idle, self._look)

    @contextlib.contextmanager
    def for_a_head(self) -> Iterator[None]:
        """Cancel the task if the block exceeds the time limit for a head."""
        late = self._loop.call_later(self._head, self._work.cancel)
        try:
            yield
        finally:
            late.cancel()

    def end(self) -> None:
        """Stop the timer."""
        self._timer.cancel()

    def _look(self) -> None:
        end = self._guest.touched + self._idle
        if self._loop.time() >= end:
            self._work.cancel()
            end = self._loop.time() + _AGAIN
        self._timer = self._loop.call_at(end, self._look)
