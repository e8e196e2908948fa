"""Log of a machine's network requests: each request with its decision and its outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from pytest_microvm.events import EventLog
from pytest_microvm.network.policy.hosts import as_address
from pytest_microvm.untrusted.text import sanitize_line

MAX_REQUESTS = 1000
"""Number of allowed requests kept, and of denied ones; counted apart so that neither evicts the other."""

MAX_EVENTS = 500
"""Number of requests also logged as events; limited so that they do not evict the machine's other events."""

_TEXT = 1000  # characters of a path or a reason
_NAME = 300  # characters of a host; a name has 253
_WORD = 40  # characters of a method


@dataclass(frozen=True)
class NetworkRequest:
    """One request of a guest, or one attempt to bypass the proxy.

    Args:
        at: The time, in seconds since 1970.
        allowed: The decision.
        method: ``GET``, ...; ``CONNECT`` for a tunnel that is not inspected; for direct packets ``TCP``,
            ``UDP``, ``ICMP`` or ``DNS``.
        host: The requested name or address.
        port: The requested port; 0 if there is none.
        path: The path without its query; empty for tunnels and packets.
        rule: The rule that decided; ``None`` if there was none.
        reason: The reason for the decision, for people.
        status: The response's status, once there is one.
        sent_bytes: Bytes sent from the guest to the server.
        received_bytes: Bytes received from the server.
        seen_by: ``host``, or ``guest`` for packets reported by the guest's kernel, which root in the guest
            can forge.
    """

    at: float
    allowed: bool
    method: str
    host: str
    port: int
    path: str
    rule: str | None
    reason: str
    status: int | None = None
    sent_bytes: int = 0
    received_bytes: int = 0
    seen_by: Literal["host", "guest"] = "host"

    def __str__(self) -> str:
        verdict = "allowed" if self.allowed else "denied"
        return f"{verdict} {self.method} {self.host}:{self.port}{self.path} ({self.reason})"


class NetworkLog:
    """The last 1000 allowed and the last 1000 denied requests of a machine, and their total numbers.

    The log is thread-safe.

    Args:
        events: The log that also gets the first 500 requests, as events of kind ``network``.
        redact: Removes secrets from a text.
    """

    def __init__(self, events: EventLog | None = None, redact: Callable[[str], str] = str) -> None:
        self._events = events
        self._redact = redact
        self._lock = threading.Lock()
        self._requests: dict[bool, dict[int, NetworkRequest]] = {True: {}, False: {}}
        self._added = 0
        self._denied = 0

    def add(self, request: NetworkRequest) -> int:
        """Add a request with its decision; return its number, for :meth:`update`."""
        request = replace(
            request,
            method=self._safe(request.method, _WORD),
            host=request.host if _is_address(request.host) else self._safe(request.host, _NAME),
            path=self._safe(request.path, _TEXT),
            rule=None if request.rule is None else self._safe(request.rule, _TEXT),
            reason=self._safe(request.reason, _TEXT),
        )
        with self._lock:
            number = self._added
            self._added += 1
            self._denied += not request.allowed
            kept = self._requests[request.allowed]
            kept[number] = request
            if len(kept) > MAX_REQUESTS:
                del kept[next(iter(kept))]
        if self._events is not None and number < MAX_EVENTS:
            shown = {"allowed": request.allowed, "method": request.method, "host": request.host}
            shown |= {"port": request.port, "path": request.path, "rule": request.rule}
            self._events.add("network", str(request), seen_by=request.seen_by, **shown)
        return number

    def update(
        self, number: int, *, status: int | None = None, sent_bytes: int = 0, received_bytes: int = 0
    ) -> None:
        """Update a request with its outcome; do nothing if the request was evicted.

        Args:
            number: The number that :meth:`add` returned.
            status: The response's status.
            sent_bytes: Bytes sent to the server since the last update.
            received_bytes: Bytes received from it since the last update.
        """
        with self._lock:
            kept = self._requests[number in self._requests[True]]
            known = kept.get(number)
            if known is not None:
                kept[number] = replace(
                    known,
                    status=known.status if status is None else status,
                    sent_bytes=known.sent_bytes + sent_bytes,
                    received_bytes=known.received_bytes + received_bytes,
                )

    @property
    def added(self) -> int:
        """Total number of requests."""
        with self._lock:
            return self._added

    def since(self, number: int) -> list[NetworkRequest]:
        """Return the logged requests after the first ``number`` of all requests, oldest first."""
        with self._lock:
            kept = sorted((self._requests[True] | self._requests[False]).items())
        return [request for key, request in kept if key >= number]

    def list(self) -> list[NetworkRequest]:
        """Return the logged requests, oldest first."""
        return self.since(0)

    @property
    def allowed(self) -> int:
        """Total number of allowed requests, including evicted ones."""
        with self._lock:
            return self._added - self._denied

    @property
    def denied(self) -> int:
        """Total number of denied requests, including evicted ones."""
        with self._lock:
            return self._denied

    def _safe(self, text: str, limit: int) -> str:
        return sanitize_line(self._redact(text), limit)


def _is_address(host: str) -> bool:
    """Return True if a host is a canonical address, which needs no sanitizing (``::1`` is no CI command)."""
    return str(as_address(host)) == host
