"""What plug-ins and the project's hooks write at the end of a pytest session, and where pytest shows it."""

from __future__ import annotations

import io
from typing import Any

import pytest

_SILENT = (
    "summary_errors", "summary_failures", "summary_warnings", "summary_passes", "summary_xfailures",
    "summary_xpasses", "short_test_summary", "summary_stats", "_write_progress_information_filling_space",
)  # fmt: skip


class EndOfSession:
    """A plug-in that notes what is written after the test loop, at the session's finish, and in the summary.

    Attributes:
        out: What has been written; standard output and pytest's terminal have to lead here.
    """

    def __init__(self) -> None:
        self.out = io.StringIO()
        self._marks: list[int] = []  # positions in the output: end of the loop, begin of finish and summary

    def begin(self, terminal: Any) -> None:
        """Begin the end; the host prints what pytest itself says in its summary.

        Args:
            terminal: pytest's plug-in for the terminal; ``None`` if it is switched off.
        """
        if terminal is not None:
            for name in _SILENT:
                setattr(terminal, name, _nothing)
        self._marks.append(self.out.tell())

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Note the begin of the session's finish."""
        self._marks.append(self.out.tell())

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self) -> None:
        """Note the begin of the summary."""
        self._marks.append(self.out.tell())

    def said(self) -> dict[str, str] | None:
        """Return what was written in each part; ``None`` if the session did not get so far."""
        text = self.out.getvalue()
        if len(self._marks) < 2:  # noqa: PLR2004 - the loop has ended, and the session has finished
            return None
        loop, finish, *rest = self._marks
        summary = rest[0] if rest else len(text) + 1  # there is none with --no-summary
        return {"loop": text[loop:finish], "finish": text[finish : summary - 1], "summary": text[summary:]}


def _nothing(*_args: object, **_options: object) -> None:
    """Print nothing: the host's terminal has printed it."""


def say_nothing_of_interrupts(terminal: Any) -> None:
    """Keep pytest's plug-in for the terminal from saying that the session was interrupted: the host does."""
    if terminal is not None:
        terminal._report_keyboardinterrupt = lambda: None
