"""The result of a run, its tasks and steps: values, and their JSON form."""

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
Phase = Literal["queue", "restore", "prepare", "sync", "run", "collect"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""The phases of a task, in order; :attr:`TaskResult.phases` has the seconds of each."""

FORMAT = 1
EXIT_OK, EXIT_FAILED, EXIT_INFRA = 0, 1, 75


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    Args:
        name: The step's name.
        status: The exit status; negative: the signal that ended it; ``None``: it did not finish.
        seconds: The duration.
    """

    name: str
    status: int | None
    seconds: float = 0.0


@dataclass(frozen=True)
class Counts:
    """The number of tests per outcome; ``flaky`` tests passed after they had failed, and count as passed."""

    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    flaky: int = 0

    @property
    def total(self) -> int:
        """The number of all tests."""
        return self.passed + self.failed + self.errors + self.skipped


@dataclass(frozen=True)
class TaskResult:
    """The result of a task. Every text is safe to display; paths are relative to the output folder.

    Args:
        id: The task's id, also the name of its folder below the output folder.
        branch: The branch that it was for.
        commit: The branch's commit.
        job: The job's name.
        verdict: The outcome. ``failed``: a step or a test failed; ``quota``, ``crashed``, ``infra``: its
                machine failed; ``skipped``: a task that it needs failed; ``cancelled``: the run ended first.
        reason: The reason for a verdict other than ``passed``, in one line.
        allow_failure: Whether the run may succeed if it fails.
        attempts: The number of machines used.
        started: The time when its first machine was requested, in seconds since 1970.
        seconds: The duration, including all attempts and the queue.
        phases: Seconds of the last attempt by :data:`PHASES`.
        steps: The steps of the last attempt.
        tests: The counts of its own JUnit reports, if it had any.
        artifacts: The files copied back from the machine.
        machine: Facts about the machine: ``image``, ``image_digest``, ``accelerator``, ``peak_memory_bytes``,
            ``cpu_seconds``.
        denied: The requests that were denied, one a line.
        worker: The host that ran it, if there are several.
        lost_workers: The number of hosts that were lost while they ran it.
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
        """The task's readable name: branch and job."""
        return f"{self.branch} / {self.job}"

    @property
    def harmless(self) -> bool:
        """True if the task does not make the run fail."""
        return self.verdict == "passed" or self.allow_failure


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Args:
        id: The run's id: time and some letters, so that ids sort by time.
        repository: The repository's folder.
        definition: A readable name of the jobs' definition.
        started: The time of its start, in seconds since 1970.
        seconds: The duration.
        tasks: The tasks' results, in the plan's order.
        interrupted: Whether the run was ended early.
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
        """0: all succeeded; 1: a task failed; 75: none failed, but a machine could not do its work."""
        bad = [task.verdict for task in self.tasks if not task.harmless]
        if any(verdict in ("failed", "quota", "crashed") for verdict in bad):
            return EXIT_FAILED
        return EXIT_INFRA if bad else EXIT_OK

    def to_json(self) -> str:
        """Return the content of ``results.json``."""
        return safe_json({"format": FORMAT, "exit_code": self.exit_code, **asdict(self)}, indent=1) + "\n"


def read_results(path: Path) -> RunResult:
    """Read a ``results.json``.

    Raises:
        UsageError: The file is no ``results.json`` of this version.
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
    """Return a task's result from its JSON object, as made by :func:`dataclasses.asdict`."""
    known = {key: data[key] for key in _names(TaskResult)}
    known["steps"] = tuple(StepResult(**step) for step in data["steps"])
    known["tests"] = None if data["tests"] is None else Counts(**data["tests"])
    known["artifacts"], known["denied"] = tuple(data["artifacts"]), tuple(data["denied"])
    if known["verdict"] not in VERDICTS:
        raise ValueError(f"verdict {known['verdict']!r}")
    return TaskResult(**known)


def _names(kind: type) -> list[str]:
    return [one.name for one in fields(kind)]
