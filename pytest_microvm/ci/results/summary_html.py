"""A run's summary as one HTML file without scripts or external resources, for light and dark displays."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

from pytest_microvm.ci.results.overview import (
    TEXT_LIMIT,
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

_LIMIT = 20 * 1024 * 1024  # characters; browsers handle more, readers do not
_MOST_DENIED = 100
_EVIDENCE = ("log.txt", "console.txt", "network.jsonl", "events.jsonl", "machine.json", "junit.xml")

_STYLE = """
:root { color-scheme: light dark; --text: #1c2128; --quiet: #57606a; --back: #ffffff; --panel: #f6f8fa;
  --line: #d0d7de; --good: #116329; --bad: #b31d28; --warn: #7d4e00; --link: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --quiet: #9ba7b4; --back: #0d1117;
  --panel: #161b22; --line: #3d444d; --good: #56d364; --bad: #ff8a80; --warn: #e3b341; --link: #79c0ff; } }
body { margin: 0; background: var(--back); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; } a { color: var(--link); } .quiet { color: var(--quiet); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; min-width: 40%; }
caption { text-align: left; color: var(--quiet); padding-bottom: .4rem; }
th, td { border: 1px solid var(--line); padding: .4rem .7rem; text-align: left; vertical-align: top; }
thead th { background: var(--panel); } td.number { text-align: right; font-variant-numeric: tabular-nums; }
code, pre { font-family: ui-monospace, monospace; font-size: .875rem; overflow-wrap: anywhere; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem;
  overflow-x: auto; white-space: pre-wrap; margin: .5rem 0; }
section.task { background: var(--panel); border: 1px solid var(--line); border-left: .35rem solid var(--line);
  border-radius: .4rem; padding: 1rem; margin: 1rem 0; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
section.bad { border-left-color: var(--bad); color: inherit; }
section.warn { border-left-color: var(--warn); color: inherit; }
.verdict { font-weight: 600; white-space: nowrap; } details { margin: .4rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); }
svg.sign { width: 1em; height: 1em; vertical-align: -.12em; fill: none; stroke: currentColor;
  stroke-width: 1.75; stroke-linecap: round; stroke-linejoin: round; }
svg.times { display: block; width: 12rem; height: .8rem; }
.phase-queue { fill: #8c959f; } .phase-restore { fill: #bf8700; }
.phase-prepare { fill: #8250df; } .phase-sync { fill: #1b7c83; }
.phase-run { fill: #2da44e; } .phase-collect { fill: #218bff; }
"""

_CIRCLE = "M8 2a6 6 0 1 0 0 12a6 6 0 1 0 0-12"
_SIGNS: dict[Verdict, str] = {
    "passed": "M2.5 8.5l3.5 3.5L13.5 4",
    "failed": "M3.5 3.5l9 9m0-9l-9 9",
    "quota": f"{_CIRCLE}M5 8h6",
    "crashed": "M9.5 1.5L4 9h4l-1.5 5.5L12 7H8z",
    "infra": "M8 2l6.5 12h-13zM8 6.5V10m0 1.8v.2",
    "skipped": "M3 4l4 4-4 4m5-8l4 4-4 4",
    "cancelled": f"{_CIRCLE}M4 4l8 8",
}
"""Paths in a square of 16 units, one for each verdict: an emoji is an empty box where its font is missing."""

_TONES = {"passed": "good", "failed": "bad", "quota": "bad", "crashed": "bad", "infra": "warn"}


def summary_html(output: Path, run: RunResult, failed: Mapping[str, FailedTests]) -> str:
    """Return a run's summary in HTML.

    Args:
        output: The run's folder, with the tasks' files.
        run: The run's result.
        failed: The tests that failed, by their tasks' ids.
    """
    parts = [_head(run)]
    size = 0
    troubled = worth_telling(run)
    if troubled:
        parts.append("<h2>Needs attention</h2>")
    for number, task in enumerate(troubled):
        section = "".join(_task(output, task, failed[task.id]))
        size += len(section)
        if size > _LIMIT:
            parts.append(f"<p>[... {len(troubled) - number:,} jobs left out: see junit.xml]</p>")
            break
        parts.append(section)
    parts += [_times(run), "</main></body></html>\n"]
    return "\n".join(filter(None, parts))


def _head(run: RunResult) -> str:
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = escape(headline(run))
    definition = f"Jobs from {_code(run.definition)}, run {_code(run.id)}, " if run.definition else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head>
<body><main><h1>{title}</h1>
<p class="quiet">{definition}{duration(run.seconds)}, exit status {run.exit_code}</p>
{_matrix(run)}"""


def _matrix(run: RunResult) -> str:
    table = matrix(run)
    heads = "".join(f'<th scope="col">{_code(job)}</th>' for job in table.jobs)
    rows = "".join(
        f'<tr><th scope="row">{_code(branch)}</th>{"".join(map(_cell, tasks))}</tr>\n'
        for branch, tasks in table.rows
    )
    return (
        '<div class="scroll"><table><caption>Branches and jobs</caption>'
        f'<thead><tr><th scope="col">branch</th>{heads}</tr></thead><tbody>\n{rows}</tbody></table></div>'
    )


def _cell(task: TaskResult | None) -> str:
    if task is None:
        return '<td class="quiet">not for it</td>'
    about = ", ".join(filter(None, (tests_line(task), duration(task.seconds) if task.attempts else "")))
    verdict = _verdict(task)
    if task.verdict != "passed" or task.denied:
        verdict = f'<a href="#{_anchor(task)}">{verdict}</a>'
    return f'<td>{verdict}<br><span class="quiet">{escape(about)}</span></td>'


def _verdict(task: TaskResult) -> str:
    allowed = " (allowed)" if task.allow_failure and task.verdict != "passed" else ""
    sign = (
        f'<svg class="sign" viewBox="0 0 16 16" aria-hidden="true"><path d="{_SIGNS[task.verdict]}"/></svg>'
    )
    return f'<span class="verdict {_tone(task)}">{sign} {task.verdict}{allowed}</span>'


def _tone(task: TaskResult) -> str:
    return "warn" if task.allow_failure and task.verdict != "passed" else _TONES.get(task.verdict, "quiet")


def _anchor(task: TaskResult) -> str:
    return escape(quote(f"task-{task.id}", safe=""))


def _task(output: Path, task: TaskResult, failed: FailedTests) -> Iterator[str]:
    yield f'<section class="task {_tone(task)}" id="{_anchor(task)}">'
    yield f"<h3>{_code(task.title)}: {_verdict(task)}</h3>"
    if task.reason:
        yield f"<p>{_code(task.reason)}</p>"
    yield f"<p>{escape(next_step(task))}</p>"
    if task.verdict not in ("passed", "skipped", "cancelled"):
        yield f"<pre>{escape(safe_name(local_command(task)))}</pre>"
    yield from _denied(task)
    yield from map(_test, failed.cases)
    if failed.total > len(failed.cases):
        yield f"<p>[... {failed.total - len(failed.cases):,} failed tests left out: see junit.xml]</p>"
    files = [name for name in _EVIDENCE if (output / task.id / name).is_file()]
    if files:
        links = ", ".join(f'<a href="{escape(quote(f"{task.id}/{name}"))}">{name}</a>' for name in files)
        yield f'<p class="quiet">Files: {links}</p>'
    yield "</section>\n"


def _denied(task: TaskResult) -> Iterator[str]:
    if not task.denied:
        return
    yield f"<details open><summary>Denied ({len(task.denied):,})</summary><ul>"
    yield from (f"<li>{_code(line)}</li>" for line in task.denied[:_MOST_DENIED])
    if len(task.denied) > _MOST_DENIED:
        yield f"<li>[... {len(task.denied) - _MOST_DENIED:,} left out]</li>"
    yield "</ul></details>"


def _test(case: Case) -> str:
    place = f"{case.file}:{case.line}" if case.file and case.line else case.file
    message = next((problem.message for problem in case.problems if problem.message), "")
    text = "\n\n".join(problem.text for problem in case.problems if problem.text)
    told = _code(f"{case.classname} :: {case.name}") + (
        f' <span class="quiet">{_code(place)}</span>' if place else ""
    )
    shown = text or message
    if not shown:
        return f"<p>{told}</p>"
    return f"<details><summary>{told}</summary><pre>{escape(safe_text(shown, TEXT_LIMIT))}</pre></details>"


def _times(run: RunResult) -> str:
    told = [task for task in run.tasks if task.phases]
    if not told:
        return ""
    longest = max(sum(seconds for _phase, seconds in phases(task)) for task in told) or 1.0
    heads = "".join(f'<th scope="col">{phase}</th>' for phase in PHASES)
    rows = "".join(_time_row(task, longest) for task in told)
    return (
        '<h2>Where the time went</h2>\n<div class="scroll"><table><caption>Seconds of each phase</caption>'
        f'<thead><tr><th scope="col">job</th><th scope="col">phases</th>{heads}'
        f'<th scope="col">machines</th></tr></thead>'
        f"<tbody>\n{rows}</tbody></table></div>"
    )


def _time_row(task: TaskResult, longest: float) -> str:
    known = dict(phases(task))
    cells = "".join(
        f'<td class="number">{known[phase]:.1f}</td>' if phase in known else "<td></td>" for phase in PHASES
    )
    return (
        f'<tr><th scope="row">{_code(task.title)}</th><td>{_bar(phases(task), longest)}</td>{cells}'
        f'<td class="number">{task.attempts}</td></tr>\n'
    )


def _bar(told: Iterable[tuple[str, float]], longest: float) -> str:
    start, parts = 0.0, []
    for phase, seconds in told:
        width = 100 * seconds / longest
        parts.append(f'<rect class="phase-{phase}" x="{start:.2f}" width="{width:.2f}" height="1"/>')
        start += width
    return (
        '<svg class="times" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(parts)}</svg>"
    )


def _code(text: str) -> str:
    return f"<code>{escape(safe_name(text))}</code>"
