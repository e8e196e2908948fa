"""Quotas of running machines: what each has used is compared with what it may, and excess ends it.

The host judges by what it sees itself: CPU time, time, bytes. What only the guest's kernel can tell
(out of memory, too many processes) arrives as a finding on the console
(:mod:`pytest_microvm.machine.console`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from pytest_microvm.errors import QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_microvm.settings.spec import Limits

_Limit = TypeVar("_Limit", int, float)

TICK = 0.25
"""Seconds between two looks at a machine; an excess is noticed at most this much later."""


class Used(Protocol):
    """What the host saw a machine use: seconds and bytes."""

    @property
    def cpu_seconds(self) -> float:
        """CPU time of its VMM's process."""

    @property
    def disk_bytes(self) -> int:
        """What it has written to its disk."""


@dataclass
class Deadline:
    """A limit on how long one thing may take; ``what`` names it, ``end`` is on the monotonic clock."""

    what: str
    begin: float
    end: float


class Guard:
    """Watches one machine from when it is handed out until it ends.

    Args:
        limits: What it may use.
        used: Tells what it has used.
        end: Ends it at once, and is told why; called at most once, by whichever thread notices.
    """

    def __init__(
        self, limits: Limits, used: Callable[[], Used], end: Callable[[QuotaExceeded], None]
    ) -> None:
        self.limits = limits
        self.verdict: QuotaExceeded | None = None
        self._used = used
        self._end = end
        self._lock = threading.Lock()
        self._begin = time.monotonic()
        self._deadlines: list[Deadline] = []

    def tighten(self, *, pids: int | None, cpu_seconds: float | None, lifetime: float | None) -> None:
        """Lower what the machine may use; ``None`` and what is higher change nothing."""
        mine = self.limits
        self.limits = replace(
            mine,
            pids=_least(mine.pids, pids),
            cpu_seconds=_least(mine.cpu_seconds, cpu_seconds),
            lifetime=_least(mine.lifetime, lifetime),
        )

    def exceed(self, quota: str, limit: float, observed: float, details: str = "") -> QuotaExceeded:
        """End the machine because of a quota; the first reason stays."""
        with self._lock:
            first = self.verdict is None
            self.verdict = verdict = self.verdict or QuotaExceeded(quota, limit, observed, details=details)
        if first:
            self._end(verdict)
        return verdict

    def check(self) -> float:
        """Compare with the limits; return the seconds until the next time limit (at most :data:`TICK`)."""
        now = time.monotonic()
        limits, used = self.limits, self._used()
        if limits.cpu_seconds is not None and used.cpu_seconds > limits.cpu_seconds:
            self.exceed("cpu_seconds", limits.cpu_seconds, used.cpu_seconds)
        elif used.disk_bytes > limits.disk:
            self.exceed("disk", limits.disk, used.disk_bytes)
        elif limits.lifetime is not None and now - self._begin > limits.lifetime:
            self.exceed("lifetime", limits.lifetime, now - self._begin)
        with self._lock:
            deadlines = list(self._deadlines)
        for deadline in deadlines:
            if now >= deadline.end:
                limit = deadline.end - deadline.begin
                self.exceed("timeout", limit, now - deadline.begin, f"during: {deadline.what}")
        ends = [deadline.end for deadline in deadlines]
        if limits.lifetime is not None:
            ends.append(self._begin + limits.lifetime)
        return max(0.0, min([TICK, *(end - now for end in ends)]))

    @contextlib.contextmanager
    def limited(self, what: str) -> Iterator[None]:
        """Let what happens inside take no longer than ``limits.timeout``; after that the machine ends."""
        if self.limits.timeout is None:
            yield
            return
        now = time.monotonic()
        deadline = Deadline(what, now, now + self.limits.timeout)
        with self._lock:
            self._deadlines.append(deadline)
        if self.limits.timeout < TICK:
            watchdog().hurry()
        try:
            yield
        finally:
            with self._lock:
                self._deadlines.remove(deadline)


def _least(*limits: _Limit | None) -> _Limit | None:
    return min((limit for limit in limits if limit is not None), default=None)


class Watchdog:
    """One thread that looks after the guards of a process; it ends when there is none left."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._guards: list[Guard] = []
        self._thread: threading.Thread | None = None

    def add(self, guard: Guard) -> None:
        """Look after ``guard`` from now on."""
        with self._changed:
            self._guards.append(guard)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="microvm-quotas", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def remove(self, guard: Guard) -> None:
        """Look after it no longer; a second call does nothing."""
        with self._changed, contextlib.suppress(ValueError):
            self._guards.remove(guard)

    def hurry(self) -> None:
        """Look at all of them now."""
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._guards = [guard for guard in self._guards if guard.verdict is None]
                guards = list(self._guards)
                if not guards:
                    self._thread = None
                    return
            pause = min(guard.check() for guard in guards)
            with self._changed:
                self._changed.wait(pause)


_watchdog = Watchdog()


def watchdog() -> Watchdog:
    """Return this process's watchdog."""
    return _watchdog


def _renew() -> None:
    """Give a fork a watchdog of its own: it has neither its parent's thread nor its machines."""
    global _watchdog  # noqa: PLW0603 - one per process
    _watchdog = Watchdog()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
