"""Run each test many times, each time in a fresh machine, and tell how its outcomes differ."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHOWN = 5  # ways to fail, and lines of output, that are shown for one test
_WIDTH = 100
_MAX_LINES = 100_000
_PHASES = ("setup", "call", "teardown")


@dataclass
class Runs:
    """The runs of one test that ended alike.

    Args:
        outcome: ``passed``, ``failed``, ``skipped``...
        reason: The first line of its failure; empty if it did not fail.
        seconds: How long each took.
        machines: The machines' ids.
        always: The lines that all of them printed.
        ever: The lines that any of them printed, up to a limit.
    """

    outcome: str
    reason: str
    seconds: list[float] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)
    always: set[str] | None = None
    ever: set[str] = field(default_factory=set)

    def add(self, reports: list[pytest.TestReport]) -> None:
        """Add a run."""
        self.seconds.append(sum(report.duration for report in reports))
        properties = dict(reports[-1].user_properties)
        self.machines.append(str(properties.get("microvm.id", "")))
        lines = {line for report in reports for _title, text in report.sections for line in text.splitlines()}
        self.always = lines if self.always is None else self.always & lines
        if len(self.ever) < _MAX_LINES:
            self.ever |= lines


class Repeats:
    """The plug-in that repeats each test, and sums its runs up.

    Args:
        count: How often each test runs.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._now: dict[tuple[str, str], list[pytest.TestReport]] = {}
        self._runs: dict[str, dict[tuple[str, str], Runs]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Repeat each test right after itself."""
        items[:] = [item for item in items for _ in range(self._count)]

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a report; the tear-down ends a run. Workers of pytest-xdist run one test side by side."""
        run = report.nodeid, getattr(report, "worker_id", "")
        reports = self._now.setdefault(run, [])
        reports.append(report)
        if report.when == "teardown":
            del self._now[run]
            outcome, reason = _outcome(reports)
            runs = self._runs.setdefault(report.nodeid, {})
            runs.setdefault((outcome, reason), Runs(outcome, reason)).add(reports)

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Tell for each test the share of outcomes, and what differed."""
        for nodeid, runs in self._runs.items():
            for line in _lines(nodeid, list(runs.values())):
                terminalreporter.write_line(sanitize_line(line, 200))


def _outcome(reports: list[pytest.TestReport]) -> tuple[str, str]:
    """Return the outcome of a run, with the first line of its failure."""
    for report in sorted(reports, key=lambda report: _PHASES.index(report.when)):
        if report.failed or report.skipped:
            machine = dict(report.user_properties).get("microvm.outcome")
            trouble = machine if machine in ("infra", "crashed", "quota") else report.outcome
            outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else str(trouble)
            return outcome, _reason(report) if report.failed else ""
    return "passed", ""


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = report.longreprtext if crash is None else f"{crash.message} (line {crash.lineno})"
    return (text.strip().splitlines() or [""])[0][:_WIDTH]


def _lines(nodeid: str, groups: list[Runs]) -> Iterator[str]:
    groups.sort(key=lambda runs: -len(runs.seconds))
    total = sum(len(runs.seconds) for runs in groups)
    shares: dict[str, int] = {}
    for runs in groups:
        shares[runs.outcome] = shares.get(runs.outcome, 0) + len(runs.seconds)
    told = ", ".join(f"{count} {outcome} ({100 * count / total:.3g} %)" for outcome, count in shares.items())
    yield f"microvm: {nodeid}: {total} runs: {told}"
    if len(groups) == 1:
        return
    for runs in groups[:_SHOWN]:
        middle = statistics.median(runs.seconds)
        about = f": {runs.reason}" if runs.reason else ""
        yield f"  {len(runs.seconds)} {runs.outcome} in {middle:.2f} s (median){about}"
        others = set().union(*(other.ever for other in groups if other.outcome != runs.outcome))
        for line in sorted((runs.always or set()) - others)[:_SHOWN]:
            yield f"      only these print: {line[:_WIDTH]}"
    if len(groups) > _SHOWN:
        yield f"  ... and {len(groups) - _SHOWN} other ways to end"
