"""Connections of a guest on which nothing happens for too long are ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from pytest_microvm.network.proxy.relaying import GuestStream

HEAD = 60.0
"""Seconds from the first byte of a request to the end of its head."""

IDLE = 600.0
"""Seconds without a byte either way: models of today think for minutes before they answer."""

_AGAIN = 1.0  # seconds; a cancellation can get lost, see the proxy's


class Patience:
    """Cancels the work on a connection when it waits for too long.

    Args:
        guest: The connection.
        work: What is done for it.
        idle: Seconds without a byte.
        head: Seconds for the head of a request.
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
        """Let what happens inside take no longer than a head may."""
        late = self._loop.call_later(self._head, self._work.cancel)
        try:
            yield
        finally:
            late.cancel()

    def end(self) -> None:
        """Look no longer."""
        self._timer.cancel()

    def _look(self) -> None:
        end = self._guest.touched + self._idle
        if self._loop.time() >= end:
            self._work.cancel()
            end = self._loop.time() + _AGAIN
        self._timer = self._loop.call_at(end, self._look)
