"""A machine's client: the agent link, limits and error mapping that commands and files use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pytest_microvm.errors import MachineCrashed, QuotaExceeded, TransferError, UsageError

if TYPE_CHECKING:
    from pytest_microvm.agent.link import Link
    from pytest_microvm.machine.instance import Instance, MachineFacts
    from pytest_microvm.untrusted.redaction import Redactor


class MachineClient:
    """The :class:`pytest_microvm.agent.client.AgentClient` of a running machine.

    Args:
        instance: The machine.
        facts: Facts known from its start.

    Attributes:
        closed: Whether the user has ended it.
    """

    def __init__(self, instance: Instance, facts: MachineFacts) -> None:
        self.closed = False
        self._instance = instance
        self._facts = facts

    @property
    def id(self) -> str:
        """Its name, unique on this host."""
        return self._facts.id

    @property
    def alive(self) -> bool:
        """True while the machine runs."""
        return self._instance.vmm.alive

    @property
    def redactor(self) -> Redactor:
        """The redactor that removes its secrets from text and bytes."""
        return self._instance.redactor

    @property
    def output_limit(self) -> int | None:
        """Maximum number of bytes a command may print; ``None``: no limit for a reader."""
        return self._facts.limits.output

    def check_open(self) -> None:
        """Check that the machine has not been closed.

        Raises:
            UsageError: It has been closed.
        """
        if self.closed:
            raise UsageError(f"machine {self.id} has been closed", resolution="start another one")

    def link(self) -> Link:
        """Return the link to its agent.

        Raises:
            UsageError: It has been closed.
        """
        self.check_open()
        return self._instance.link("agent")

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Replace a plain crash error by its cause: the exceeded quota, or a crash with the console's tail.

        Transfer errors are redacted: the machine chose the names in them.
        """
        try:
            yield
        except TransferError as error:
            error.brief, error.details = map(self.redactor.text, (error.brief, error.details))
            error.args = (error.brief,)
            raise
        except MachineCrashed as error:
            if self.closed or error.details:
                raise
            raise self._instance.end_error(self.id) from error

    def limited(self, what: str) -> AbstractContextManager[None]:
        """End the machine if the block takes longer than the machine's timeout."""
        guard = self._instance.guard
        return contextlib.nullcontext() if guard is None else guard.limited(self.redactor.text(what))

    @contextlib.contextmanager
    def operation(self, what: str) -> Iterator[None]:
        """Combine :meth:`explained` and :meth:`limited`."""
        with self.explained(), self.limited(what):
            yield

    def check_quotas(self) -> None:
        """Check that the machine has not exceeded a quota, reading unread console output first.

        Raises:
            QuotaExceeded: It has exceeded one.
        """
        exceeded = self._instance.exceeded()
        if exceeded is not None:
            raise exceeded

    def output_exceeded(self, observed: int, limit: int) -> QuotaExceeded:
        """End the machine because a command printed too much; return the error to raise."""
        if self._instance.guard is None:
            return QuotaExceeded("output", limit, observed)
        return self._instance.guard.exceed("output", limit, observed)

    def record(self, kind: str, text: str) -> None:
        """Add an event to the machine's log."""
        self._instance.events.add(kind, text)
