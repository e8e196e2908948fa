"""Log messages of tests, shown and written as pytest does for tests of its own process."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest

from pytest_microvm.suite import checks

_OURS = "microvm_guest"
_PHASES = frozenset(["start", "setup", "call", "teardown", "finish", "logreport"])
_PLACES = frozenset(["shown", "file"])


@dataclass(frozen=True)
class LogMessage:
    """A message of a test.

    Args:
        place: ``shown`` or ``file``.
        phase: The phase of the test, if known.
        text: The message as the machine has formatted it, safe to show.
    """

    place: str
    phase: str | None
    text: str

    @classmethod
    def parse(cls, record: dict[str, Any]) -> LogMessage:
        """Return the message in a guest's record.

        Raises:
            ProtocolViolation: It is malformed.
        """
        phase = record.get("when")
        return cls(
            checks.choice(record.get("where"), _PLACES, "place"),
            None if phase is None else checks.choice(phase, _PHASES, "phase"),
            checks.text(record.get("text"), "log message"),
        )


class LiveLogs:
    """The host's log handlers of pytest, which get the machines' messages and no others.

    Args:
        config: pytest's configuration.
    """

    def __init__(self, config: pytest.Config) -> None:
        plugin: Any = config.pluginmanager.get_plugin("logging-plugin")
        self._handlers: dict[str, Any] = {}
        if plugin is not None:
            self._handlers = {"shown": plugin.log_cli_handler, "file": plugin.log_file_handler}
        for handler in self._handlers.values():
            handler.setFormatter(logging.Formatter("%(message)s"))  # the machine has formatted it
            handler.addFilter(lambda record: hasattr(record, _OURS))
        self._phase: str | None = None

    def show(self, message: LogMessage) -> None:
        """Show or write a message."""
        handler = self._handlers.get(message.place)
        if handler is None:
            return
        if message.place == "shown" and message.phase not in (None, self._phase):
            self._phase = message.phase
            handler.set_when(message.phase)
        made = logging.LogRecord("", logging.INFO, "", 0, "%s", (message.text,), None)
        setattr(made, _OURS, True)
        handler.handle(made)

    def interrupted(self) -> None:
        """Notice that pytest has shown something else: the next message begins a section."""
        self._phase = None
