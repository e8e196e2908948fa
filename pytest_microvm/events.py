"""The events of a machine, in order: a bounded list that can be written as JSON lines.

``seen_by`` separates evidence, which the host observed itself, from reports of a guest's kernel, whose root
may lie.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MAX_EVENTS = 1000


@dataclass(frozen=True)
class Event:
    """One event of a machine.

    Args:
        kind: ``started``, ``command``, ``push``, ``pull``, ``mount``, ``copy_back``, ``forward``,
            ``network``, ``finding``, ``quota`` or ``crashed``.
        about: Description, for display.
        at: Time, in seconds since 1970.
        seen_by: ``host`` or ``guest``.
        data: Further details, as JSON values.
    """

    kind: str
    about: str
    at: float
    seen_by: Literal["host", "guest"] = "host"
    data: dict[str, Any] = field(default_factory=dict)


class EventLog:
    """The last 1000 events of a machine; thread-safe.

    Attributes:
        redact: Removes secrets from an event's description.
    """

    def __init__(self) -> None:
        self.redact: Callable[[str], str] = str
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._lock = threading.Lock()

    def add(self, kind: str, about: str, *, seen_by: Literal["host", "guest"] = "host", **data: Any) -> None:
        """Record an event that happens now."""
        event = Event(kind, self.redact(about), time.time(), seen_by, data)
        with self._lock:
            self._events.append(event)

    def list(self) -> list[Event]:
        """Return the events so far, the oldest first."""
        with self._lock:
            return [*self._events]

    def lines(self) -> str:
        """Return the events as JSON, one per line."""
        return "".join(json.dumps(asdict(event)) + "\n" for event in self.list())
