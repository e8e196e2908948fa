"""What plug-ins and the project's hooks write at the end of a pytest session, and where pytest shows it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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


def stop_as_told(session: Any, terminal: Any, request: dict[str, Any]) -> None:
    """Let the session stop as the host's did, which says so itself.

    Args:
        session: The session.
        terminal: pytest's plug-in for the terminal; ``None`` if it is switched off.
        request: How the run has gone: the host's request to end it.

    Raises:
        pytest.Session.Interrupted: The run was interrupted.
        pytest.Session.Failed: A limit of failures stopped it, or a hook of the project.
    """
    if request["stopped"]:
        session.shouldfail = request["stopped"]
        _write_no_line_of(terminal, request["stopped"])
    if request["interrupted"]:
        if terminal is not None:
            terminal._report_keyboardinterrupt = lambda: None
        raise session.Interrupted("errors during collection")
    if session.shouldfail:
        raise session.Failed(session.shouldfail)


def forget_later_errors(session: Any, terminal: Any, request: dict[str, Any]) -> None:
    """Forget errors of a collection that went on after the host's had stopped."""
    if request["errors"] is None:
        return
    session.testscollected, session.testsfailed = request["tests"], request["errors"]
    if terminal is not None:
        del terminal.stats.get("error", [])[request["errors"] :]


def until_stopped(reports: Iterable[Any], errors: int | None) -> Iterator[Any]:
    """Yield serialized collect reports, up to the last error that the host has reported."""
    for report in reports:
        if errors is not None and errors <= 0:
            return
        yield report
        if errors is not None and report["outcome"] == "failed":
            errors -= 1


def _write_no_line_of(terminal: Any, unwanted: str) -> None:
    if terminal is None:
        return
    write = terminal.write_sep

    def write_others(sep: str, title: str | None = None, *options: Any, **markup: Any) -> None:
        if title != unwanted:
            write(sep, title, *options, **markup)

    terminal.write_sep = write_others
