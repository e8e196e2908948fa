"""Records for the host while a test runs: output, log messages, outcomes, requests of the debugger."""

from __future__ import annotations

import os
from threading import Lock  # bound here: libraries replace it
from typing import TYPE_CHECKING, Any

from pytest_microvm.guest.runner_debugger import Debugger
from pytest_microvm.guest.runner_logging import LogRelay
from pytest_microvm.guest.runner_output import LiveOutput, OutsideOutput, RelayProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from pytest_microvm.guest.runner_requests import Runner

_getpid = os.getpid  # a test may replace it


class TestRelay:
    """Sends records about the running test to the host.

    Args:
        runner: The connection to the host.
        relay: The process that forwards output.
        outputs: What is written to stdout and stderr outside of capturing.

    Attributes:
        live: What forwards output; ``None`` if the host does not show it.
    """

    __test__ = False

    def __init__(
        self, runner: Runner, relay: RelayProcess, outputs: tuple[OutsideOutput, OutsideOutput]
    ) -> None:
        self.live: LiveOutput | None = None
        self._runner = runner
        self._relay = relay
        self._outputs = outputs
        self._logs: LogRelay | None = None
        self._debugger: Debugger | None = None
        self._tell: Callable[[dict[str, Any]], None] | None = None

    def install(self, config: pytest.Config, debug: dict[str, bool] | None) -> None:
        """Prepare a session, once its tests are collected.

        Args:
            config: pytest's configuration.
            debug: How pytest writes to the host's terminal, for debuggers; ``None``: they do not get it.
        """
        self._config = config
        self._logs = LogRelay(config)
        if debug is not None:
            self._debugger = Debugger(config, debug)
            config.pluginmanager.register(self._debugger, "microvm_debugger")

    @property
    def was_debugged(self) -> bool:
        """True if a debugger was shown during the test."""
        return self._debugger is not None and self._debugger.shown

    def begin_live(self, stream: int, capture: str) -> None:
        """Let the host have what the project's code writes, as it writes it."""
        if self.live is None:
            self.live = LiveOutput(self._runner, self._relay, self._config, self._outputs)
        elif self._debugger is not None:
            self.live.lead()  # it had a terminal in this place
        self.live.begin(stream, capture)

    def begin(self, stream: int) -> None:
        """Start to send records while a test runs; without live output they are sent on ``stream``."""

        def write(record: dict[str, Any]) -> None:
            self._runner.write_lines(stream, [record])

        send = write if self.live is None else self.live.tell
        lock = Lock()

        def tell(record: dict[str, Any]) -> None:
            if _getpid() == self._runner.pid:  # else a test's own fork, which must not write into the port
                with lock:
                    send(record)

        shows = self._logs is not None and self._logs.shows
        self._tell = tell if shows or self.live is not None else None
        if self._logs is not None and (shows or self._logs.writes):
            self._logs.begin(tell)
        if self._debugger is not None:
            self._debugger.begin(tell)

    def end(self) -> None:
        """Stop sending records: the test has ended."""
        if self._debugger is not None:
            self._debugger.end()
        if self._logs is not None:
            self._logs.end()
        if self.live is not None:
            self.live.end()
        self._tell = None

    def reported(self, report: Any) -> None:
        """Send a notice that the outcome of a phase is known, if the host shows it."""
        if self._tell is not None and (not report.passed or report.when == "call"):
            self._tell({"k": "reported"})
