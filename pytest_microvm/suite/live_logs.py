"""Log messages of tests, shown and written as pytest does for tests of its own process."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pytest_microvm.suite import checks

_OURS = "microvm_guest"
_PHASES = frozenset(["start", "setup", "call", "teardown", "finish", "logreport"])
_AFTER_THE_TEST = frozenset(["teardown", "finish"])
_PLACES = frozenset(["shown", "file"])


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
        self._phase: tuple[str, str] = ("", "")
        self._held: list[tuple[str, str | None, str]] = []

    def show(self, nodeid: str, record: dict[str, Any]) -> None:
        """Show or write one message; a teardown's are shown by :meth:`show_held`.

        Args:
            nodeid: The test that runs.
            record: The guest's record.

        Raises:
            ProtocolViolation: It is malformed.
        """
        where = checks.choice(record.get("where"), _PLACES, "place")
        message = checks.text(record.get("text"), "log message")
        phase = record.get("when")
        if phase is not None:
            phase = checks.choice(phase, _PHASES, "phase")
        if where == "shown" and phase in _AFTER_THE_TEST:
            self._held.append((nodeid, phase, message))
        else:
            self._emit(where, nodeid, phase, message)

    def show_held(self) -> None:
        """Show messages of a test's teardown: its outcome has been shown."""
        held, self._held = self._held, []
        for nodeid, phase, message in held:
            self._emit("shown", nodeid, phase, message)

    def _emit(self, where: str, nodeid: str, phase: str | None, message: str) -> None:
        handler = self._handlers.get(where)
        if handler is None:
            return
        if where == "shown" and phase is not None and (nodeid, phase) != self._phase:
            self._phase = (nodeid, phase)
            handler.set_when(phase)
        made = logging.LogRecord("", logging.INFO, "", 0, "%s", (message,), None)
        setattr(made, _OURS, True)
        handler.handle(made)
