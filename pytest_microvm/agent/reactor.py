"""The process's single I/O thread, which reads every guest's sockets.

The kernel may reuse the number of a closed descriptor for another socket at once. So a socket is read
and written only under its owner's lock, after a check that it is still open.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Reactor:
    """The process's single I/O thread, which runs callbacks when sockets are ready.

    Sockets may be registered and removed while the thread waits: epoll and kqueue need no wake-up for
    that. A callback may run once more just after :meth:`remove`.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._calls: deque[Callable[[], None]] = deque()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._run_calls)
        threading.Thread(target=self._run, name="microvm-io", daemon=True).start()

    def set(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(mask)`` on the I/O thread whenever ``sock`` is ready for one of ``events``."""
        with self._lock:
            if sock in self._selector.get_map():
                self._selector.modify(sock, events, callback)
            else:
                self._selector.register(sock, events, callback)

    def remove(self, sock: socket.socket) -> None:
        """Unregister ``sock``; call this before closing it."""
        with self._lock, contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def soon(self, call: Callable[[], None]) -> None:
        """Run ``call`` on the I/O thread, without taking a lock, so that finalizers may use this method.

        Garbage collection may run in any thread at any allocation, even while the thread holds the lock of
        this object or of a link.
        """
        self._calls.append(call)
        with contextlib.suppress(BlockingIOError):  # wake-ups are already pending
            self._waker.send(b"x")

    def _run(self) -> None:
        while True:
            for key, mask in self._selector.select():
                try:
                    key.data(mask)
                except Exception:  # noqa: BLE001 - one link's failure must not stop the others' I/O
                    self.remove(key.fileobj)  # type: ignore[arg-type]  # else it is ready again at once
                    _report_exception()

    def _run_calls(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(65536)
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception:  # noqa: BLE001 - the remaining calls must still run
                _report_exception()


def _report_exception() -> None:
    threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


_reactor: Reactor | None = None
_reactor_pid = 0
_reactor_lock = threading.Lock()


def reactor() -> Reactor:
    """Return this process's I/O thread; start it at first use and after a fork."""
    global _reactor, _reactor_pid
    with _reactor_lock:
        if _reactor is None or _reactor_pid != os.getpid():
            _reactor, _reactor_pid = Reactor(), os.getpid()
        return _reactor
