"""What came of a run: values, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from pytest_microvm.errors import UsageError
from pytest_microvm.untrusted.text import safe_json

Verdict = Literal["passed", "failed", "quota", "crashed", "infra", "skipped", "cancelled"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
PHASES = ("queue", "restore", "prepare", "sync", "run", "collect")
"""Where a task's time goes, in order; :attr:`TaskResult.phases` has the seconds of each."""

FORMAT = 1
EXIT_OK, EXIT_FAILED, EXIT_INFRA = 0, 1, 75


@dataclass(frozen=True)
class StepResult:
    """What came of a step.

    Args:
        name: What it is called.
        status: Its exit status; negative: the signal that ended it; ``None``: it did not run to its end.
        seconds: How long it took.
    """

    name: str
    status: int | None
    seconds: float = 0.0


@dataclass(frozen=True)
class Counts:
    """How many tests came to what; ``flaky`` ones passed after they had failed, and are among the passed."""

    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    flaky: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.passed + self.failed + self.errors + self.skipped


@dataclass(frozen=True)
class TaskResult:
    """What came of a task. Every text is safe to show; paths are relative to the output folder.

    Args:
        id: The task's id, which is its folder below the output folder.
        branch: What it was for.
        commit: The same, exactly.
        job: The job's name.
        verdict: What came of it. ``failed``: a step or a test did; ``quota``, ``crashed``, ``infra``: its
            machine's; ``skipped``: what it needs did not succeed; ``cancelled``: the run ended first.
        reason: Why it is not ``passed``, in one line.
        allow_failure: Whether the run may succeed without it.
        attempts: How many machines it took.
        started: When its first machine was asked for, in seconds since 1970.
        seconds: How long it took, all attempts and the queue included.
        phases: Seconds of the last attempt by :data:`PHASES`.
        steps: Of the last attempt.
        tests: Of its JUnit, if it had any of its own.
        artifacts: Files taken back.
        machine: What ran it: ``image``, ``image_digest``, ``accelerator``, ``peak_memory_bytes``,
            ``cpu_seconds``.
        denied: What it tried to reach and may not, a line each.
        worker: Which host ran it, if there are several.
        lost_workers: How many hosts were lost while they ran it.
    """

    id: str
    branch: str
    commit: str
    job: str
    verdict: Verdict
    reason: str = ""
    allow_failure: bool = False
    attempts: int = 0
    started: float = 0.0
    seconds: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[StepResult, ...] = ()
    tests: Counts | None = None
    artifacts: tuple[str, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    denied: tuple[str, ...] = ()
    worker: str = ""
    lost_workers: int = 0

    @property
    def title(self) -> str:
        """What people read: branch and job."""
        return f"{self.branch} / {self.job}"

    @property
    def harmless(self) -> bool:
        """Whether the run may succeed with it."""
        return self.verdict == "passed" or self.allow_failure


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Args:
        id: The run's id: time and some letters, in the order of time.
        repository: The repository's folder.
        definition: Where the jobs were defined.
        started: When it began, in seconds since 1970.
        seconds: How long it took.
        tasks: In the plan's order.
        interrupted: Whether somebody ended it early.
    """

    id: str
    repository: str
    definition: str
    started: float
    seconds: float
    tasks: tuple[TaskResult, ...]
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0: all succeeded; 1: something failed; 75: nothing failed, but a machine never did its work."""
        bad = [task.verdict for task in self.tasks if not task.harmless]
        if any(verdict in ("failed", "quota", "crashed") for verdict in bad):
            return EXIT_FAILED
        return EXIT_INFRA if bad else EXIT_OK

    def to_json(self) -> str:
        """Return it as ``results.json`` has it."""
        return safe_json({"format": FORMAT, "exit_code": self.exit_code, **asdict(self)}, indent=1) + "\n"


def read_results(path: Path) -> RunResult:
    """Read a ``results.json``.

    Raises:
        UsageError: It is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        tasks = tuple(task_from_json(task) for task in data["tasks"])
        known = {key: data[key] for key in _names(RunResult)}
        return RunResult(**{**known, "tasks": tasks})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no results.json of this version: {error}",
            resolution="name the file that `pytest-microvm ci run` wrote",
        ) from error


def task_from_json(data: Mapping[str, Any]) -> TaskResult:
    """Return a task's result from what :func:`dataclasses.asdict` made of it."""
    known = {key: data[key] for key in _names(TaskResult)}
    known["steps"] = tuple(StepResult(**step) for step in data["steps"])
    known["tests"] = None if data["tests"] is None else Counts(**data["tests"])
    known["artifacts"], known["denied"] = tuple(data["artifacts"]), tuple(data["denied"])
    if known["verdict"] not in VERDICTS:
        raise ValueError(f"verdict {known['verdict']!r}")
    return TaskResult(**known)


def _names(kind: type) -> list[str]:
    return [one.name for one in fields(kind)]
