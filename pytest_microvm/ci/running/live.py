"""Display a run's progress: a live table on a terminal, prefixed lines in a log."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pytest_microvm.ci.definition.task import Plan, Task
from pytest_microvm.ci.results.result import VERDICTS, RunResult, TaskResult, Verdict
from pytest_microvm.ci.running.watching import Watcher
from pytest_microvm.untrusted.text import sanitize_line

_COLOUR = re.compile(r"\x1b\[[0-9;]{0,30}m")
_REFRESHES = 4  # per second; each takes a few milliseconds of CPU time from the machines
_LINE = 4096  # characters of a line in a log
_SHOWN = 400  # characters of a line in the table; more than the width of terminals
_TITLE = 60
_WAITING = "queue"
_STYLES: dict[Verdict, str] = {
    "passed": "green",
    "failed": "red",
    "quota": "red",
    "crashed": "red",
    "infra": "yellow",
    "skipped": "dim",
    "cancelled": "dim",
}


@contextmanager
def live_watcher(console: Console, *, plain: bool, jobs: int) -> Iterator[Watcher]:
    """Display a run on ``console`` for the duration of the ``with`` block.

    Args:
        console: The output.
        plain: Whether to write lines only: for logs, and wherever a live table is impossible.
        jobs: How many tasks run at the same time.
    """
    if plain:
        yield _Lines(console)
        return
    table = _MovingTable(console, jobs)
    with Live(console=console, get_renderable=table.render, refresh_per_second=_REFRESHES, transient=True):
        yield table


def verdict_text(result: TaskResult) -> Text:
    """Return a finished task in one line: verdict, title, tests, seconds and reason."""
    text = Text().append(f"{result.verdict:9}", style=_STYLES[result.verdict])
    return text.append(_clean(f" {result.title}  {_amounts(result)}", _LINE))


class _Lines:
    """A watcher that writes lines without control characters.

    A machine's output is prefixed with ``[branch / job]``, so it cannot start a line itself: neither a CI
    system's command nor a line of this watcher, which starts with ``==``.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def began(self, plan: Plan) -> None:
        self._say(f"== {_beginning(plan)}")

    def phase(self, task: Task, phase: str) -> None:
        self._say(f"== {task.title}: {phase}")

    def line(self, task: Task, text: str) -> None:
        self._say(f"[{task.title}] {_COLOUR.sub('', text)}".rstrip())

    def done(self, task: Task, result: TaskResult) -> None:
        self._say(f"== {task.title}: {result.verdict}, {_amounts(result)}")

    def ended(self, run: RunResult) -> None:
        self._say(f"== {_ending(run)}")

    def _say(self, text: str) -> None:
        # Never wrapped: the rest of a wrapped line would start a line without prefix. Not by print() of rich,
        # which takes more than a minute of CPU time for the million lines that a job prints in a moment.
        self._console.file.write(f"{_clean(text, _LINE)}\n")
        self._console.file.flush()


@dataclass
class _Row:
    """A running task: its phase, the start of that phase, and its last line of output."""

    title: str
    phase: str
    since: float = field(default_factory=time.monotonic)
    said: str = ""


class _MovingTable:
    """A watcher that shows a live table of running tasks, and prints finished ones above it."""

    def __init__(self, console: Console, jobs: int) -> None:
        self._console = console
        self._jobs = jobs
        self._total = 0
        self._rows: dict[str, _Row] = {}
        self._verdicts: Counter[str] = Counter()
        self._lock = threading.Lock()  # rich renders in a separate thread

    def began(self, plan: Plan) -> None:
        self._total = len(plan.tasks)
        self._console.print(Text(_clean(_beginning(plan), _LINE)))

    def phase(self, task: Task, phase: str) -> None:
        with self._lock:
            if phase == _WAITING:
                self._rows.pop(task.id, None)
            else:
                said = self._rows[task.id].said if task.id in self._rows else ""
                self._rows[task.id] = _Row(_clean(task.title, _TITLE), phase, said=said)

    def line(self, task: Task, text: str) -> None:
        with self._lock:
            if task.id in self._rows and text.strip():
                self._rows[task.id].said = text[:_SHOWN]

    def done(self, task: Task, result: TaskResult) -> None:
        with self._lock:
            self._rows.pop(task.id, None)
            self._verdicts[result.verdict] += 1
        self._console.print(verdict_text(result))

    def ended(self, run: RunResult) -> None:
        self._console.print(Text(_ending(run), style="bold"))

    def render(self) -> Table:
        """Return the current table."""
        with self._lock:
            table = Table(box=None, padding=(0, 1), expand=True, show_header=False, caption=self._counts())
            table.caption_justify = "left"
            for column, ratio in (("title", None), ("phase", None), ("time", None), ("said", 1)):
                justify = "right" if column == "time" else "left"
                table.add_column(column, ratio=ratio, no_wrap=True, overflow="ellipsis", justify=justify)  # type: ignore[arg-type]
            for row in self._rows.values():
                seconds = f"{time.monotonic() - row.since:.0f} s"
                cells = (Text(row.title, style="bold"), Text(row.phase, style="cyan"), Text(seconds))
                table.add_row(*cells, Text(_clean(row.said, _SHOWN), style="dim"))
            return table

    def _counts(self) -> Text:
        done = self._verdicts.total()
        bad = done - sum(self._verdicts[verdict] for verdict in ("passed", "skipped", "cancelled"))
        running = len(self._rows)
        parts = [f"{done} of {self._total} done", f"{running} of {self._jobs} running"]
        if queued := self._total - done - running:
            parts.append(f"{queued} queued")
        text = Text(", ".join(parts))
        return text.append(f", {bad} failed", style="red") if bad else text


def _beginning(plan: Plan) -> str:
    jobs = _number(len(plan.tasks), "job")
    return f"{jobs}, defined in {plan.definition}" if plan.definition else jobs


def _ending(run: RunResult) -> str:
    count = Counter(task.verdict for task in run.tasks)
    verdicts = ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict])
    early = ", interrupted" if run.interrupted else ""
    return f"{_number(len(run.tasks), 'job')} in {run.seconds:.0f} s: {verdicts or 'nothing'}{early}"


def _amounts(result: TaskResult) -> str:
    """Return a result's summary: ``12 tests, 2 failed, 3.4 s: reason``."""
    parts = [f"{result.seconds:.1f} s"]
    if (tests := result.tests) is not None:
        counts = {"failed": tests.failed, "errors": tests.errors, "skipped": tests.skipped}
        counts["flaky"] = tests.flaky
        parts = [_number(tests.total, "test"), *(f"{n} {name}" for name, n in counts.items() if n), *parts]
    if result.attempts > 1:
        parts.append(f"{result.attempts} attempts")
    if result.verdict != "passed" and result.allow_failure:
        parts.append("allowed")
    return ", ".join(parts) + (f": {result.reason}" if result.reason else "")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _clean(text: str, limit: int) -> str:
    """Return text on one line, with colours removed and other control characters made visible."""
    return sanitize_line(_COLOUR.sub("", text[: 2 * limit]).expandtabs(4), limit)
