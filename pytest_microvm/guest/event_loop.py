"""The event loop of the guest's processes: watched files and timers."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import selectors
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class EventLoop:
    """The files and timers of one thread; the thread itself calls what :meth:`ready` yields."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[list[Any]] = []
        self._numbers = itertools.count()  # heapq must not compare functions

    def watch(self, file: socket.socket | int, events: int, ready: Callable[[int], None]) -> None:
        """Call ``ready`` whenever ``file`` has one of ``events``; 0 stops watching it."""
        number = file if isinstance(file, int) else file.fileno()
        known = self._selector.get_map().get(number) if number >= 0 else None
        if known is None:
            if events:
                self._selector.register(file, events, ready)
        elif not events:
            self._selector.unregister(file)
        elif known.events != events:
            self._selector.modify(file, events, ready)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching a descriptor, if it is watched."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(descriptor)

    def later(self, seconds: float, call: Callable[[], None]) -> list[Any]:
        """Schedule ``call`` in ``seconds``; return a timer for :meth:`never`."""
        timer = [time.monotonic() + seconds, next(self._numbers), call]
        heapq.heappush(self._timers, timer)
        return timer

    def never(self, timer: list[Any] | None) -> None:
        """Cancel a timer of :meth:`later`."""
        if timer is not None:
            timer[2] = None

    def clear_timers(self) -> None:
        """Cancel all timers."""
        self._timers.clear()

    def ready(self) -> Iterator[tuple[Callable[[int], None], int]]:
        """Wait until files are ready or a timer is due; yield each file's function and its events."""
        for key, mask in self._selector.select(self.timeout()):
            # An earlier function may have closed the file, and its descriptor may be in use again.
            if self._selector.get_map().get(key.fd) is key:
                yield key.data, mask

    def timeout(self) -> float | None:
        """Return the seconds until the next timer is due, ``None`` without a timer."""
        while self._timers and self._timers[0][2] is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def run_timers(self) -> None:
        """Call the functions of the timers that are due."""
        while self._timers and self._timers[0][0] <= time.monotonic():
            call = heapq.heappop(self._timers)[2]
            if call is not None:
                call()
