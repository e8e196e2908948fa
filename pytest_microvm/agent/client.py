"""The interface between a machine and the commands, files and paths that use its agent."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from pytest_microvm.errors import QuotaExceeded
from pytest_microvm.untrusted.redaction import Redactor

if TYPE_CHECKING:
    from pytest_microvm.agent.link import Link


class AgentClient(Protocol):
    """A machine's link with the rules for its use: time and output limits, and why the machine ended."""

    @property
    def id(self) -> str:
        """The machine's name, unique on this host."""

    @property
    def alive(self) -> bool:
        """True while the machine is running."""

    @property
    def redactor(self) -> Redactor:
        """Redactor that removes the machine's secrets from text and bytes."""

    @property
    def output_limit(self) -> int | None:
        """Maximum bytes a command may print; ``None`` for as many as are read."""

    def link(self) -> Link:
        """Return the link to the agent.

        Raises:
            UsageError: The machine has been closed.
        """

    def explained(self) -> AbstractContextManager[None]:
        """Raise the reason the machine ended (a quota, a crash) if it ends inside the block."""

    def limited(self, what: str) -> AbstractContextManager[None]:
        """End the machine if the block exceeds its timeout; ``what`` names the block in the error message."""

    def operation(self, what: str) -> AbstractContextManager[None]:
        """Combine :meth:`explained` and :meth:`limited`."""

    def check_quotas(self) -> None:
        """Raise an error if the machine has exceeded a quota.

        Raises:
            QuotaExceeded: The machine's kernel has reported it, possibly only just now.
        """

    def output_exceeded(self, observed: int, limit: int) -> QuotaExceeded:
        """End the machine because a command printed too much; return the error to raise."""

    def record(self, kind: str, text: str) -> None:
        """Add an event to the machine's log."""


class UnlimitedClient:
    """A link without rules: no limits, no secrets, and no explanation if the machine ends.

    Args:
        link: The link to the agent.
        name: The machine's name.
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
        """Return a context that leaves errors unchanged."""
        return contextlib.nullcontext()

    def limited(self, _what: str) -> AbstractContextManager[None]:
        """Return a context without a time limit."""
        return contextlib.nullcontext()

    def operation(self, _what: str) -> AbstractContextManager[None]:
        """Return a context that neither explains errors nor limits time."""
        return contextlib.nullcontext()

    def check_quotas(self) -> None:
        """Do nothing: there are no quotas."""

    def output_exceeded(self, observed: int, limit: int) -> QuotaExceeded:
        """Return the error to raise; the machine is not ended."""
        return QuotaExceeded("output", limit, observed)

    def record(self, kind: str, text: str) -> None:
        """Do nothing: there is no log."""
