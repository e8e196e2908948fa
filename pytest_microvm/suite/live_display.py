"""Output and log messages of tests, shown while they run and in their place among the outcomes.

An outcome is certain only when the machine has ended. So what a machine sends after a report, such as the
output of a tear-down, waits until the host has shown that report.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, cast

import pytest

from pytest_microvm.suite.live_logs import LiveLogs, LogMessage
from pytest_microvm.untrusted.output import LiveText
from pytest_microvm.untrusted.redaction import RedactedStream, Redactor
from pytest_microvm.untrusted.text import MAX_TEXT


class LiveDisplay:
    """The display of one run, which shows one test at a time.

    Args:
        config: pytest's configuration.

    Attributes:
        capture: pytest's ``--capture`` if it lets output of tests be seen at once; ``None`` if it does not.
    """

    def __init__(self, config: pytest.Config) -> None:
        capture = getattr(config.option, "capture", None)
        is_worker = hasattr(config, "workerinput")  # of pytest-xdist: nobody sees what it writes
        self.capture: str | None = capture if capture in {"no", "tee-sys"} and not is_worker else None
        self._logs = LiveLogs(config)
        self._waits = False
        self._waiting: deque[tuple[int, str | LogMessage]] = deque()  # with the number of reports before
        self._size = self._cut = 0
        self._sent = self._shown = 0  # reports

    def of(self, redactor: Redactor) -> MachineOutput:
        """Return what shows the live records of a machine.

        Args:
            redactor: Removes the machine's secrets.
        """
        return MachineOutput(self, redactor)

    def begin(self) -> None:
        """Show what comes from now on at once: a test begins."""
        self.forget()
        self._shown = 0

    def wait(self) -> None:
        """Let what comes from now on wait: it may turn out that the test begins again."""
        self._waits = True

    def forget(self) -> None:
        """Forget what waits: the test begins again."""
        self._waiting.clear()
        self._waits = False
        self._size = self._cut = self._sent = 0

    def sent(self) -> None:
        """Notice that the guest has made a report."""
        self._sent += 1
        self._waits = True

    def ran(self) -> None:
        """Let what comes from now on wait for an outcome: it is the tear-down of wider fixtures."""
        self._sent = max(self._sent, 1)
        self._waits = True

    def show(self, what: str | LogMessage) -> None:
        """Show output or a message, unless it has to wait; too much of it is cut then."""
        if not self._waits:
            self._show(what)
            return
        size = len(what if isinstance(what, str) else what.text)
        if self._size + size > MAX_TEXT and not (isinstance(what, LogMessage) and what.place == "file"):
            self._cut += size
            return
        self._size += size
        self._waiting.append((self._sent, what))

    def reported(self, report: pytest.TestReport | None = None) -> None:
        """Show what has waited for a report, which pytest has just shown; without one, what preceded all."""
        if report is not None:
            self._logs.interrupted()
            self._shown += not report.passed or report.when == "call"
        while self._waiting and self._waiting[0][0] <= self._shown:
            self._show(self._waiting.popleft()[1])

    def end(self) -> None:
        """Show all that still waits: the test has ended."""
        for _sent, what in self._waiting:
            self._show(what)
        if self._cut:
            self.write(f"\n[{self._cut} more characters were cut]\n")
        self.forget()
        self._logs.interrupted()

    def write(self, text: str) -> None:
        """Write safe text where tests of this process would write it."""
        if text:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()

    def _show(self, what: str | LogMessage) -> None:
        if isinstance(what, str):
            self.write(what)
        else:
            self._logs.show(what)


class MachineOutput:
    """The live records of one machine, on their way to the display.

    Args:
        display: The display.
        redactor: Removes the machine's secrets.
    """

    def __init__(self, display: LiveDisplay, redactor: Redactor) -> None:
        self._display = display
        self._redactor = redactor
        self._bytes = RedactedStream(redactor)
        self._text = LiveText()

    def others(self, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Show the output and the log messages among ``records``; yield the others.

        Raises:
            ProtocolViolation: A log message is malformed.
        """
        try:
            for record in records:
                if record.get("k") == "out":
                    self._show(self._text.feed(self._bytes.feed(record["data"])))
                    continue
                self._flush()
                if record.get("k") == "reported":
                    self._display.sent()
                elif record.get("k") == "log":
                    safe = cast("dict[str, Any]", self._redactor.tree(record))
                    self._display.show(LogMessage.parse(safe))
                else:
                    yield record
        finally:
            self._flush()

    def _flush(self) -> None:
        """Show what could have been the first part of a character, a colour, a command or a secret."""
        self._show(self._text.feed(self._bytes.end()) + self._text.end())

    def _show(self, text: str) -> None:
        if text:
            self._display.show(text)
