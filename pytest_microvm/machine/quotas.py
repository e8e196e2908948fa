"""Quotas of running machines: the watchdog compares usage with limits, and ends machines that exceed them.

The host measures CPU time, elapsed time and bytes itself. Events that only the guest's kernel can see
(out of memory, too many processes) arrive as findings on the console
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
"""Seconds between two checks of a machine; an excess is noticed at most this much later."""


class Used(Protocol):
    """Usage of a machine as measured by the host: seconds and bytes."""

    @property
    def cpu_seconds(self) -> float:
        """CPU time of its VMM process."""

    @property
    def disk_bytes(self) -> int:
        """Bytes written to its disk."""


@dataclass
class Deadline:
    """A time limit on one operation; ``what`` names it, ``begin`` and ``end`` are on the monotonic clock."""

    what: str
    begin: float
    end: float


class QuotaGuard:
    """Enforces the quotas of one machine from when it is handed out until it ends.

    Args:
        limits: Its quotas.
        used: Returns its usage.
        end: Ends it at once, given the reason; called at most once, in the thread that notices the excess.
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
        """Lower the machine's limits; ``None`` and higher values change nothing."""
        mine = self.limits
        self.limits = replace(
            mine,
            pids=_least(mine.pids, pids),
            cpu_seconds=_least(mine.cpu_seconds, cpu_seconds),
            lifetime=_least(mine.lifetime, lifetime),
        )

    def exceed(self, quota: str, limit: float, observed: float, details: str = "") -> QuotaExceeded:
        """End the machine because of a quota; return the first quota that was exceeded."""
        with self._lock:
            first = self.verdict is None
            self.verdict = verdict = self.verdict or QuotaExceeded(quota, limit, observed, details=details)
        if first:
            self._end(verdict)
        return verdict

    def check(self) -> float:
        """Compare usage with the limits; return seconds until the next time limit (at most :data:`TICK`)."""
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
        """End the machine if the block takes longer than ``limits.timeout``."""
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
    """A thread that checks all guards of this process; it ends when no guard is left."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._guards: list[QuotaGuard] = []
        self._thread: threading.Thread | None = None

    def add(self, guard: QuotaGuard) -> None:
        """Start checking ``guard``."""
        with self._changed:
            self._guards.append(guard)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="microvm-quotas", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def remove(self, guard: QuotaGuard) -> None:
        """Stop checking ``guard``; a second call does nothing."""
        with self._changed, contextlib.suppress(ValueError):
            self._guards.remove(guard)

    def hurry(self) -> None:
        """Check all guards now."""
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
    """Give a forked child its own watchdog: it has neither its parent's thread nor its machines."""
    global _watchdog  # noqa: PLW0603 - one per process
    _watchdog = Watchdog()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
