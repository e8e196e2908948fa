"""What a run shows while it goes, with rich's own console; machines and branches say hostile things."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pytest_microvm.ci.definition.job import Job, Step
from pytest_microvm.ci.definition.task import Plan, Source, Task
from pytest_microvm.ci.results.result import Counts, RunResult, TaskResult
from pytest_microvm.ci.running.live import live_watcher, verdict_text

HOSTILE = [
    "::error file=x::stop",
    "  ::set-output name=a::b",
    "##[error]stop",
    "##vso[task.setvariable variable=x]y",
    "#\x1b[0m#[group]",
    "\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[0m",
    "[bold red]markup[/bold red] [/] [link=file:///etc/passwd]x[/link] :smile:",
    "one\r::notice::two\x85::notice::three\u2028::notice::four\n::notice::five",
    "\u202egnp.exe \ud800 \x00",
    "x" * 100 + " ::error::after a wrap",
    "--- Buildkite group",
    "== main / test: passed",
]


def task(branch: str = "main", job: str = "test") -> Task:
    return Task(f"{branch}.{job}", Source(branch, "c" * 40), Job(job, job, (Step("true", "true"),)))


def result(of: Task, **changes) -> TaskResult:
    values = {"verdict": "passed", "seconds": 3.42, **changes}
    return TaskResult(of.id, of.source.branch, of.source.commit, of.job.name, **values)


def run(*results: TaskResult, **changes) -> RunResult:
    return RunResult("r", "/code", "main", 0.0, 12.0, results, **changes)


def plain_log(width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, force_terminal=False), file


def test_plain_log_has_phases_output_and_verdict_in_order():
    console, file = plain_log()
    one = task()
    with live_watcher(console, plain=True, jobs=2) as watcher:
        watcher.began(Plan((one,), "main:pyproject.toml"))
        watcher.phase(one, "restore")
        watcher.line(one, "collected 12 items")
        done = result(one, verdict="failed", reason="step 'unit' ended with 1", tests=Counts(10, 2))
        watcher.done(one, done)
        watcher.ended(run(done))
    assert file.getvalue().splitlines() == [
        "== 1 job, defined in main:pyproject.toml",
        "== main / test: restore",
        "[main / test] collected 12 items",
        "== main / test: failed, 12 tests, 2 failed, 3.4 s: step 'unit' ended with 1",
        "== 1 job in 12 s: 1 failed",
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_output_cannot_start_a_log_line_or_control_it(text):
    console, file = plain_log(width=40)
    one = task("feature/##[group]::x\x1b[31m")
    with live_watcher(console, plain=True, jobs=1) as watcher:
        watcher.line(one, text)
        watcher.done(one, result(one, verdict="infra", reason=text))
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("[feature/")
    assert lines[1].startswith("== feature/")
    for line in lines:
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u202e\ud800-\udfff]", line)
        assert not re.search(r"##(vso|teamcity)?\[", line)


def test_text_is_shown_as_it_is_not_as_markup():
    console, file = plain_log()
    with live_watcher(console, plain=True, jobs=1) as watcher:
        watcher.line(task(), "[bold]assert[/bold] :smile: a[0] == 'x'")
    assert file.getvalue() == "[main / test] [bold]assert[/bold] :smile: a[0] == 'x'\n"


def test_plain_lines_have_no_colours_even_on_a_terminal():
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="truecolor")
    one = task()
    with live_watcher(console, plain=True, jobs=1) as watcher:
        watcher.phase(one, "run")
        watcher.line(one, "\x1b[32m1 passed\x1b[0m 12 'x'")
        watcher.done(one, result(one))
    assert "\x1b" not in file.getvalue()
    assert "[main / test] 1 passed 12 'x'\n" in file.getvalue()


def shown(table, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(table)
    return console.export_text()


def terminal(**options) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=100, height=20, force_terminal=True, **options), file


def test_the_table_has_a_row_per_running_task_and_counts():
    console, file = terminal()
    tasks = [task(f"branch-{number}") for number in range(5)]
    with live_watcher(console, plain=False, jobs=2) as watcher:
        watcher.began(Plan(tuple(tasks)))
        watcher.phase(tasks[0], "restore")
        watcher.done(tasks[0], result(tasks[0]))
        watcher.done(tasks[1], result(tasks[1], verdict="quota", reason="memory: limit 1 GiB"))
        watcher.phase(tasks[2], "restore")
        watcher.phase(tasks[2], "run")
        watcher.line(tasks[2], "tests/test_a.py ....")
        watcher.line(tasks[2], "   ")
        watcher.phase(tasks[3], "queue")
        text = shown(watcher.render())
    assert re.search(r"branch-2 / test +run +\d+ s +tests/test_a.py \.\.\.\.", text)
    assert "branch-0" not in text
    assert "branch-3" not in text
    assert "2 of 5 done, 1 of 2 running, 2 queued, 1 failed" in text
    above = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert "passed    branch-0 / test  3.4 s" in above
    assert "quota     branch-1 / test  3.4 s: memory: limit 1 GiB" in above


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_machine_says_stays_in_its_row(text):
    console, file = terminal(no_color=True)
    one = task("b\x1b[2J[red]")
    with live_watcher(console, plain=False, jobs=1) as watcher:
        watcher.began(Plan((one,)))
        watcher.phase(one, "run")
        watcher.line(one, text)
        lines = shown(watcher.render()).rstrip().splitlines()
        watcher.done(one, result(one, verdict="crashed", reason=text))
    assert len(lines) == 2
    assert all(len(line.rstrip()) <= 100 for line in lines)
    # what rich itself writes to move the cursor and to set styles is all there is
    rest = re.sub(r"\x1b\[(\?25[lh]|2K|1?A|[0-9;]*m)", "", file.getvalue())
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", rest)
    assert "\x1b[2J" not in file.getvalue()


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console, file = terminal(color_system="truecolor")
    one = task()
    with live_watcher(console, plain=False, jobs=1) as watcher:
        watcher.done(one, result(one, verdict="failed"))
    assert "\x1b[31m" not in file.getvalue()
    assert "failed" in file.getvalue()


def test_verdict_names_attempts_and_an_allowed_failure():
    of = result(task(), verdict="infra", allow_failure=True, attempts=2, reason="no machine")
    assert verdict_text(of).plain == "infra     main / test  3.4 s, 2 attempts, allowed: no machine"


def test_an_interrupted_run_says_so():
    console, file = plain_log()
    with live_watcher(console, plain=True, jobs=1) as watcher:
        watcher.ended(run(result(task(), verdict="cancelled"), interrupted=True))
    assert file.getvalue() == "== 1 job in 12 s: 1 cancelled, interrupted\n"
