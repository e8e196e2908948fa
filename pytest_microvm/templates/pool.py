"""A pool of machines started ahead of use."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from pytest_microvm.errors import MicroVMError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Pool(Generic[T]):
    """Keeps up to ``size`` items ready, each made on a thread of its own.

    Args:
        size: How many to keep ready; 0: none.
        make: Makes an item; returns ``None`` if there is no room for it now.
        discard: Ends an item that is no longer needed.
        usable: Returns whether an item that waited is still usable.
    """

    def __init__(
        self,
        size: int,
        make: Callable[[], T | None],
        discard: Callable[[T], None],
        usable: Callable[[T], bool] = lambda _item: True,
    ) -> None:
        self._make = make
        self._discard = discard
        self._usable = usable
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._wanted = size
        self._making = 0
        self._asked = 0
        self._stalled = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"microvm-pool-{number}", daemon=True)
            for number in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def take(self) -> T | None:
        """Return a ready item, or the next that becomes ready; ``None`` if none is being made."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or not self._making or self._closed)
                self._asked += 1  # threads that found no room may retry
                self._changed.notify_all()
                if not self._ready:
                    return None
                item = self._ready.popleft()
            if self._usable(item):
                return item
            self._discard(item)

    def wait_full(self) -> None:
        """Wait until the pool is full, or there was no room for more."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) >= self._wanted or self._stalled or self._closed)

    def give_up_one(self) -> bool:
        """Discard a ready item to make room; return whether there was one."""
        with self._changed:
            if not self._ready:
                return False
            item = self._ready.pop()
        self._discard(item)
        return True

    def close(self) -> None:
        """Stop making items, wait for the unfinished ones, and discard the ready ones."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        while self._ready:
            self._discard(self._ready.popleft())

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) + self._making < self._wanted)
                if self._closed:
                    return
                self._making += 1
                asked = self._asked
            item: T | None = None
            try:
                item = self._make()
            except MicroVMError:
                item = None  # a caller without an item makes one itself, and gets the error
            finally:  # a bug ends this thread, but must not leave others waiting
                with self._changed:
                    self._making -= 1
                    if item is not None:
                        self._ready.append(item)
                    self._changed.notify_all()
            if item is None:
                self._wait_until_asked(asked)

    def _wait_until_asked(self, seen: int) -> None:
        """Wait, after a failed attempt, until an item is taken or requested."""
        with self._changed:
            self._stalled += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._asked != seen)
            self._stalled -= 1
