"""``pytest-microvm ci history`` and ``ci show``: results of earlier runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytest_microvm.ci.results.history import KEPT_DAYS, KEPT_RUNS, CaseResult, Flaky, History
from pytest_microvm.ci.results.result import EXIT_INFRA, VERDICTS, RunResult, TaskResult
from pytest_microvm.images.store import cache_root
from pytest_microvm.untrusted.text import safe_json, sanitize_line

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN_CASES = 20
_STYLES = {
    "ok": "green", "passed": "green", "failed": "red", "quota": "red", "crashed": "red", "infra": "yellow",
    "interrupted": "dim", "skipped": "dim", "cancelled": "dim",
}  # fmt: skip
_ABOUT_HISTORY = f"""List earlier runs of `pytest-microvm ci run`, the newest first; --flaky lists tests that
passed and failed with one commit. The last {KEPT_RUNS} runs of {KEPT_DAYS} days are kept, in the cache."""
_HISTORY_EXAMPLES = """examples:
  pytest-microvm ci history                        the last 20 runs
  pytest-microvm ci history --branch 'feature/*'   what became of these branches
  pytest-microvm ci history --flaky                tests that cannot be relied on, the worst first
  pytest-microvm ci history --json | jq '.[0].id'  for scripts"""
_SHOW_EXAMPLES = """examples:
  pytest-microvm ci show last
  pytest-microvm ci show 20261122 --json           the beginning of an id is enough"""


def add_parsers(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verbs ``history`` and ``show``."""
    raw = argparse.RawDescriptionHelpFormatter
    history = verbs.add_parser(
        "history", help="list earlier runs, or tests that are flaky", formatter_class=raw,
        description=_ABOUT_HISTORY, epilog=_HISTORY_EXAMPLES,
    )  # fmt: skip
    history.add_argument(
        "--branch", action="append", default=[], metavar="GLOB", help="only these branches; may be repeated"
    )
    history.add_argument(
        "--limit", type=_count, default=20, metavar="N", help="maximum number of entries (default: 20)"
    )
    history.add_argument("--flaky", action="store_true", help="list flaky tests instead of runs")
    history.add_argument("--json", action="store_true", help="print JSON for scripts")
    history.set_defaults(run=_history)

    show = verbs.add_parser(
        "show", help="show an earlier run", formatter_class=raw,
        description="Show the results of an earlier run: its jobs, and the tests that failed.",
        epilog=_SHOW_EXAMPLES,
    )  # fmt: skip
    show.add_argument("id", metavar="RUN", help="the beginning of its id, or `last`")
    show.add_argument("--json", action="store_true", help="print JSON for scripts")
    show.set_defaults(run=_show)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"invalid number: expected 1 or more, got {text!r}")
    return int(text)


def _history(arguments: argparse.Namespace) -> int:
    history = History(cache_root())
    if arguments.flaky:
        return _print_flaky(history.flaky()[: arguments.limit], as_json=arguments.json)
    runs = history.runs(arguments.limit, arguments.branch)
    if arguments.json:
        _print_json([_run_json(run) for run in runs])
        return 0
    if not runs:
        print("no runs yet; `pytest-microvm ci run` makes them", file=sys.stderr)
        return 0
    rows = [
        (run.id, _when(run.started), _seconds(run.seconds), _outcome(run), _jobs(run), _branches(run),
         run.repository)
        for run in runs
    ]  # fmt: skip
    _print_table(("RUN", "BEGAN", "TOOK", "OUTCOME", "JOBS", "BRANCHES", "REPOSITORY"), rows)
    return 0


def _print_flaky(found: Sequence[Flaky], *, as_json: bool) -> int:
    if as_json:
        _print_json([asdict(test) for test in found])
    elif not found:
        print("no test passed and failed with the same commit", file=sys.stderr)
    else:
        rows = [
            (str(test.commits), str(test.passed), str(test.failed), str(test.flaky), test.job, test.name,
             test.repository)
            for test in found
        ]  # fmt: skip
        _print_table(("COMMITS", "PASSED", "FAILED", "BOTH", "JOB", "TEST", "REPOSITORY"), rows)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    history = History(cache_root())
    run = history.run(arguments.id)
    cases = history.cases(run.id)
    if arguments.json:
        _print_json({**_run_json(run), "cases": [asdict(case) for case in cases]})
        return 0
    console = _console()
    _say(console, f"run {run.id}: {_outcome(run)}, {_jobs(run)}, {_seconds(run.seconds)}")
    _say(console, f"began {_when(run.started)} in {run.repository}; jobs defined in {run.definition}")
    hosts = any(task.worker for task in run.tasks)
    rows: list[list[str]] = [
        [task.verdict, task.branch, task.commit[:10], task.job, _tests(task), _seconds(task.seconds),
         *([task.worker] if hosts else []), task.reason]
        for task in run.tasks
    ]  # fmt: skip
    host = ["HOST"] if hosts else []
    _print_table(["VERDICT", "BRANCH", "COMMIT", "JOB", "TESTS", "TOOK", *host, "REASON"], rows)
    for task in run.tasks:
        _show_task(console, task, [case for case in cases if case.task == task.id])
    return 0


def _show_task(console: Console, task: TaskResult, cases: Sequence[CaseResult]) -> None:
    """Print a task's failed and flaky tests, and its denied requests."""
    bad = [case for case in cases if case.outcome in ("failed", "error", "flaky")]
    lines = [f"{case.outcome:6}  {case.name}  {case.seconds:.2f} s" for case in bad[:_SHOWN_CASES]]
    if len(bad) > _SHOWN_CASES:
        lines.append(f"... and {len(bad) - _SHOWN_CASES} more")
    lines += [f"denied  {line}" for line in task.denied]
    if lines:
        _say(console, f"\n{task.title}:")
        for line in lines:
            _say(console, f"  {line}")


def _run_json(run: RunResult) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(run.to_json())
    return data


def _outcome(run: RunResult) -> str:
    if run.interrupted:
        return "interrupted"
    return {0: "ok", EXIT_INFRA: "infra"}.get(run.exit_code, "failed")


def _jobs(run: RunResult) -> str:
    count = Counter(task.verdict for task in run.tasks)
    verdicts = (f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict])
    return ", ".join(verdicts) or "none"


def _branches(run: RunResult) -> str:
    names = list(dict.fromkeys(task.branch for task in run.tasks))
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, {len(names) - 3} more"  # noqa: PLR2004 - as many as fit


def _tests(task: TaskResult) -> str:
    if task.tests is None:
        return ""
    bad = task.tests.failed + task.tests.errors
    return f"{task.tests.total}, {bad} failed" if bad else str(task.tests.total)


def _when(began: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(began))


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"  # noqa: PLR2004 - where tenths matter


def _print_json(value: Any) -> None:
    print(safe_json(value, indent=1))


def _console() -> Console:
    from rich.console import Console  # noqa: PLC0415 - every command's parser imports this module

    return Console(highlight=False)


def _say(console: Console, text: str) -> None:
    from rich.text import Text  # noqa: PLC0415

    console.print(Text("\n".join(map(sanitize_line, text.split("\n")))), soft_wrap=True)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a coloured table that fits the terminal; if the output is no terminal, in full length."""
    console = _console()
    rows = [[sanitize_line(cell, 500) for cell in row] for row in rows]
    if console.is_terminal:
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for title in head:
            table.add_column(title, overflow="fold", no_wrap=title in ("RUN", "TOOK", "OUTCOME", "VERDICT"))
        for row in rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        console.print(table)
        return
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
