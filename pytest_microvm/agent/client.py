"""What commands, files and paths need of the machine whose agent they ask."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from pytest_microvm.errors import QuotaExceeded
from pytest_microvm.untrusted.redaction import Redactor

if TYPE_CHECKING:
    from pytest_microvm.agent.link import Link


class AgentClient(Protocol):
    """A machine's link with the rules for using it: limits of time and output, and why the machine ended."""

    @property
    def id(self) -> str:
        """The machine's name, unique on this host."""

    @property
    def alive(self) -> bool:
        """Whether the machine still runs."""

    @property
    def redactor(self) -> Redactor:
        """What takes the machine's secrets out of text and bytes."""

    @property
    def output_limit(self) -> int | None:
        """How many bytes a command may print; ``None``: as many as somebody reads."""

    def link(self) -> Link:
        """Return the link to the agent.

        Raises:
            UsageError: The machine has been closed.
        """

    def explained(self) -> AbstractContextManager[None]:
        """Raise why the machine ended (a quota, a crash) if it ends inside the block."""

    def limited(self, what: str) -> AbstractContextManager[None]:
        """End the machine if the block takes longer than its timeout; ``what`` is for the message."""

    def operation(self, what: str) -> AbstractContextManager[None]:
        """Do both: :meth:`explained` and :meth:`limited`."""

    def check_quotas(self) -> None:
        """Raise what the machine has exceeded, if it has.

        Raises:
            QuotaExceeded: Its kernel said so, perhaps only just now.
        """

    def output_exceeded(self, observed: int, limit: int) -> QuotaExceeded:
        """End the machine because a command printed too much; return the error to raise."""

    def record(self, kind: str, text: str) -> None:
        """Add an event to the machine's log."""


class UnlimitedClient:
    """A link without rules: no limit, no secret, nobody who knows why the machine ended.

    Args:
        link: The link to the agent.
        name: What the machine is called.
    """

    alive = True
    output_limit: int | None = None
    redactor = Redactor()

    def __init__(self, link: Link, name: str = "") -> None:
        self.id = name
        self._link = link

    def link(self) -> Link:
        """Return the link."""
        return self._link

    def explained(self) -> AbstractContextManager[None]:
        """Leave errors as they are."""
        return contextlib.nullcontext()

    def limited(self, _what: str) -> AbstractContextManager[None]:
        """Set no limit."""
        return contextlib.nullcontext()

    def operation(self, _what: str) -> AbstractContextManager[None]:
        """Do neither."""
        return contextlib.nullcontext()

    def check_quotas(self) -> None:
        """Know of none."""

    def output_exceeded(self, observed: int, limit: int) -> QuotaExceeded:
        """Return the error."""
        return QuotaExceeded("output", limit, observed)

    def record(self, kind: str, text: str) -> None:
        """Keep no log."""
