"""Log messages as they come: pytest's handlers for the terminal and the log file, led to the host."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

_getpid = os.getpid  # a test may replace it

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

_MOST = 20_000  # messages of one test; the host limits their size, too


class LogRelay:
    """Sends what pytest's live logging and log file would show while a test runs.

    Threads may log at any time. What child processes log is not sent: they would write into the port.

    Args:
        config: pytest's configuration.
    """

    def __init__(self, config: Any) -> None:
        self._lock = threading.Lock()
        self._send: Callable[[dict[str, Any]], None] | None = None
        self._left = 0
        self._pid = _getpid()
        plugin = config.pluginmanager.get_plugin("logging-plugin")
        self.shows = plugin is not None and plugin._log_cli_enabled()
        self.writes = plugin is not None and plugin.log_file_handler.baseFilename != os.devnull
        if self.shows:
            plugin.log_cli_handler.emit = lambda record: self._relay(plugin.log_cli_handler, record, "shown")
        if self.writes:
            plugin.log_file_handler.emit = lambda record: self._relay(plugin.log_file_handler, record, "file")

    def begin(self, send: Callable[[dict[str, Any]], None]) -> None:
        """Send each message with ``send`` from now on."""
        with self._lock:
            self._send, self._left, self._pid = send, _MOST, _getpid()

    def end(self) -> None:
        """Send no more."""
        with self._lock:
            self._send = None

    def _relay(self, handler: Any, record: logging.LogRecord, where: str) -> None:
        text = handler.format(record)
        with self._lock:
            if self._send is None or _getpid() != self._pid or self._left <= 0:
                return
            self._left -= 1
            if not self._left:
                text = f"more than {_MOST} messages: the others are not shown"
            when = getattr(handler, "_when", None)
            self._send({"k": "log", "where": where, "when": when, "text": text})
