"""A run's summary as Markdown that fits GitHub's job summary and is safe with untrusted names and output.

All text that a branch can choose is in code spans and code blocks. Their content is neither Markdown nor
HTML, and no renderer turns it into links, mentions or references to issues.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pytest_microvm.ci.results.overview import (
    FailedTests,
    duration,
    headline,
    local_command,
    matrix,
    next_step,
    phases,
    tests_line,
    worth_telling,
)
from pytest_microvm.ci.results.result import PHASES, RunResult, TaskResult, Verdict
from pytest_microvm.reports.text import safe_name, safe_text
from pytest_microvm.reports.values import Case

LIMIT = 1_000_000
"""Maximum number of bytes of a summary; GitHub rejects more than 1 MiB."""

_MOST_ROWS = 300
_MOST_TESTS = 20  # of one task
_TEXT_LIMIT = 3000
_NAME_LIMIT = 200
_MOST_DENIED = 20

_SIGNS: dict[Verdict, str] = {
    "passed": "✅",
    "failed": "❌",
    "quota": "⛔",
    "crashed": "💥",
    "infra": "⚠️",
    "skipped": "⏭️",
    "cancelled": "🚫",
}


def summary_markdown(run: RunResult, failed: Mapping[str, FailedTests]) -> str:
    """Return a run's summary in Markdown.

    Args:
        run: The run's result.
        failed: The tests that failed, by their tasks' ids.
    """
    parts, size = [], 0
    sections = [*_top(run), *(_task(task, failed[task.id]) for task in worth_telling(run)), _times(run)]
    for number, section in enumerate(sections):
        size += len(section.encode())
        if size > LIMIT - 500:
            parts.append(f"[... {len(sections) - number:,} sections left out: see `summary.html`]\n")
            break
        parts.append(section)
    return "\n".join(parts)


def code(text: str, *, cell: bool = False) -> str:
    """Return untrusted text as a code span.

    Args:
        text: The text, which is reduced to one line.
        cell: Whether it is in a table, where a bar would start another cell.
    """
    line = safe_name(text, _NAME_LIMIT) or " "
    if cell:
        line = line.replace("|", "¦")
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def block(text: str, limit: int = _TEXT_LIMIT) -> str:
    """Return untrusted text as a code block of at most ``limit`` characters."""
    plain = safe_text(text, limit)
    fence = "`" * max(3, max(map(len, re.findall("`+", plain)), default=0) + 1)
    return f"{fence}text\n{plain}\n{fence}\n"


def _top(run: RunResult) -> Iterator[str]:
    yield f"# {headline(run)}\n"
    about = [f"Jobs from {code(run.definition)}"] if run.definition else []
    yield ", ".join([*about, f"{duration(run.seconds)}, exit status {run.exit_code}."]) + "\n"
    table = matrix(run)
    lines = [
        _row(["branch", *(code(job, cell=True) for job in table.jobs)]),
        "|---" * (len(table.jobs) + 1) + "|",
    ]
    for branch, tasks in table.rows[:_MOST_ROWS]:
        lines.append(_row([code(branch, cell=True), *map(_cell, tasks)]))
    if len(table.rows) > _MOST_ROWS:
        lines.append(
            _row([f"[... {len(table.rows) - _MOST_ROWS:,} branches left out]", *("" for _ in table.jobs)])
        )
    yield "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(task: TaskResult | None) -> str:
    if task is None:
        return ""
    allowed = " (allowed)" if task.allow_failure and task.verdict != "passed" else ""
    about = ", ".join(filter(None, (tests_line(task), duration(task.seconds) if task.attempts else "")))
    return f"{_SIGNS[task.verdict]} {task.verdict}{allowed}" + (f"<br>{about}" if about else "")


def _task(task: TaskResult, failed: FailedTests) -> str:
    lines = [f"## {_SIGNS[task.verdict]} {code(task.title)}: {task.verdict}\n"]
    if task.reason:
        lines.append(f"{code(task.reason)}\n")
    lines.append(next_step(task))
    if task.verdict not in ("passed", "skipped", "cancelled"):
        lines.append(f"\n```sh\n{safe_name(local_command(task))}\n```\n")
    if task.denied:
        lines.append(f"Denied ({len(task.denied):,}):\n")
        lines += [f"- {code(line)}" for line in task.denied[:_MOST_DENIED]]
        if len(task.denied) > _MOST_DENIED:
            lines.append(f"- [... {len(task.denied) - _MOST_DENIED:,} left out]")
        lines.append("")
    lines += [_test(case) for case in failed.cases[:_MOST_TESTS]]
    if failed.total > _MOST_TESTS:
        left = failed.total - _MOST_TESTS
        lines.append(f"[... {left:,} failed tests left out: see `summary.html` and `junit.xml`]\n")
    return "\n".join(lines) + "\n"


def _test(case: Case) -> str:
    place = f" {code(f'{case.file}:{case.line}' if case.line else case.file)}" if case.file else ""
    messages = [code(problem.message) for problem in case.problems if problem.message]
    text = "\n\n".join(problem.text for problem in case.problems if problem.text)
    lines = [
        f"**{code(f'{case.classname} :: {case.name}')}**{place}\n",
        *(f"{message}\n" for message in messages[:1]),
    ]
    if text:
        lines += ["<details><summary>All it says</summary>\n", block(text), "</details>\n"]
    return "\n".join(lines)


def _times(run: RunResult) -> str:
    told = [task for task in run.tasks if task.phases][:_MOST_ROWS]
    if not told:
        return ""
    lines = [
        "## Where the time went\n",
        _row(["job", *PHASES, "machines"]),
        "|---" + "|--:" * (len(PHASES) + 1) + "|",
    ]
    for task in told:
        known = dict(phases(task))
        cells = [f"{known[phase]:.1f} s" if phase in known else "" for phase in PHASES]
        lines.append(_row([code(task.title, cell=True), *cells, str(task.attempts)]))
    return "\n".join(lines) + "\n"
