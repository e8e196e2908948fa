"""A machine as its own commands and files see it: the link, its limits, and why it ended."""

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
        facts: What is known of it.

    Attributes:
        closed: Whether its user has ended it.
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
        """Whether it still runs."""
        return self._instance.vmm.alive

    @property
    def redactor(self) -> Redactor:
        """What takes its secrets out of text and bytes."""
        return self._instance.redactor

    @property
    def output_limit(self) -> int | None:
        """How many bytes a command may print; ``None``: as many as somebody reads."""
        return self._facts.limits.output

    def check_open(self) -> None:
        """Check that it has not been closed.

        Raises:
            UsageError: It has been.
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
        """Turn "the machine ended" into why it did: the quota, or a crash with the console's tail.

        Secrets are taken out of what is said of a transfer: a machine chose the names in it.
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
        """End the machine if the block takes longer than its timeout."""
        guard = self._instance.guard
        return contextlib.nullcontext() if guard is None else guard.limited(self.redactor.text(what))

    @contextlib.contextmanager
    def operation(self, what: str) -> Iterator[None]:
        """Do both: :meth:`explained` and :meth:`limited`."""
        with self.explained(), self.limited(what):
            yield

    def check_quotas(self) -> None:
        """Raise what the machine has exceeded, if it has.

        Raises:
            QuotaExceeded: Its kernel said so, perhaps only just now.
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
        """Add an event to its log."""
        self._instance.events.add(kind, text)
