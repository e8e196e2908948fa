"""One attempt at a task, in one machine: prepare, restore, sync, run, collect."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import IO, Any

from pytest_microvm.agent.transfer import send_file, send_tar
from pytest_microvm.ci.definition.job import WORKSPACE, Job, Step
from pytest_microvm.ci.definition.task import Task
from pytest_microvm.ci.results.result import Phase, StepResult, TaskResult, Verdict
from pytest_microvm.ci.running.collecting import Collection
from pytest_microvm.ci.running.commands import Stop, Stopped, run_command
from pytest_microvm.ci.running.executor import Work
from pytest_microvm.ci.running.prepared import prepared_template
from pytest_microvm.errors import (
    BootError,
    HostError,
    ImageError,
    MachineCrashed,
    MachineError,
    MicroVMError,
    QuotaExceeded,
)
from pytest_microvm.host.host import Host
from pytest_microvm.machine import evidence
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.settings.spec import DEFAULT_OUTPUT
from pytest_microvm.templates.chain import Base
from pytest_microvm.templates.store import Template
from pytest_microvm.untrusted.text import sanitize, sanitize_line

_TRANSFER_TIMEOUT = 900.0  # seconds for each copy in or out
_COLLECT_TIMEOUT = 600.0  # seconds for copying back all files together
_PAUSE = 0.25  # seconds between two attempts to fit a machine into the host budget
_FAILED: Verdict = "failed"


@dataclass
class _AttemptState:
    """The recorded progress and results of an attempt."""

    phases: dict[Phase, float] = field(default_factory=dict)
    steps: list[StepResult] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    denied: tuple[str, ...] = ()
    verdict: Verdict = "passed"
    reason: str = ""

    def judge(self, verdict: Verdict, reason: str) -> None:
        """Record a verdict other than ``passed`` and its reason; the first one is kept."""
        if self.verdict == "passed":
            self.verdict, self.reason = verdict, sanitize_line(reason)


class Attempt:
    """Runs a task once.

    Args:
        host: The host, which starts machines.
        task: The task.
        work: The data that all tasks share.
        cancelled: Set to end the run early.
    """

    def __init__(self, host: Host, task: Task, work: Work, cancelled: threading.Event) -> None:
        self._host = host
        self._task = task
        self._job: Job = task.job
        self._work = work
        self._cancelled = cancelled
        self._folder = work.output / task.id
        self._state = _AttemptState()
        self._log: IO[str] | None = None

    def run(self) -> TaskResult:
        """Run the task and return its result; its output is written to the task's folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "log.txt").open("w", encoding="utf-8", errors="backslashreplace") as self._log:
            try:
                self._go_through()
            except Stopped as stopped:
                self._stopped(stopped)
            except MicroVMError as error:
                self._failed(error)
            except OSError as error:  # on this computer, for example a full disk
                self._state.judge("infra", str(error))
            if self._state.reason:
                self._say(f"{self._state.verdict}: {self._state.reason}")
        return self._result()

    def _go_through(self) -> None:
        stop = Stop(self._cancelled)
        with self._phase("prepare"):
            spec = self._job.spec_for(self._task.source.branch, default=self._task.source.default)
            base = self._host.base(spec)
            output = base.limits.output or DEFAULT_OUTPUT
            base = replace(base, limits=replace(base.limits, timeout=_TRANSFER_TIMEOUT, output=output))
            template = prepared_template(
                self._host, base, self._task, self._work, lambda vm, line: self._prepare(vm, line, stop)
            )
        with self._phase("queue"):
            machine = self._start(template, base, stop)
        with ExitStack() as end:
            end.callback(self._put_away, machine)
            self._state.phases["queue"] -= self._state.phases["restore"]  # measured as a part of it
            self._in(machine)
            with self._phase("collect"), end.pop_all():  # putting the machine away counts as collecting
                if machine.alive:
                    with suppress(QuotaExceeded, MachineCrashed):  # files copied back earlier are kept
                        self._collect(machine)

    def _start(self, template: Template, base: Base, stop: Stop) -> MicroVM:
        """Wait for room in the host budget, and start a machine."""
        told = False
        while True:
            stop.check()
            begin = time.monotonic()
            machine = self._host.try_machine(template, base)
            if machine is not None:
                self._state.phases["restore"] = time.monotonic() - begin
                return machine
            if not told:
                told = True
                self._say(f"waiting: the host budget ({self._host.budget}) is in use by other machines")
            self._host.budget.check_hope(base.limits.cpus, base.limits.memory)
            self._cancelled.wait(_PAUSE)

    def _in(self, machine: MicroVM) -> None:
        """Copy the files in, and run the steps."""
        facts = machine.facts
        self._state.machine = {
            "image": facts.image,
            "image_digest": facts.image_digest,
            "accelerator": facts.accelerator,
        }
        try:
            with self._phase("sync"):
                self._sync(machine)
            with self._phase("run"):
                self._steps(machine)
        except (QuotaExceeded, MachineCrashed) as error:
            self._failed(error)
        except Stopped as stopped:
            self._stopped(stopped)

    def _sync(self, machine: MicroVM) -> None:
        machine.path(WORKSPACE).mkdir(parents=True, exist_ok=True)
        if self._job.git:
            self._clone(machine)
        tree = self._work.sources.tree(self._task.source)
        with machine.client.operation("sync"):
            send_tar(machine.client.link(), WORKSPACE, tree.fill)
        if self._job.git:
            done = machine.run(["/bin/sh", "-c", _UNCHANGED], cwd=WORKSPACE)
            if done.returncode:
                self._say("large files (Git LFS) may look changed to git: " + sanitize(done.stderr))

    def _clone(self, machine: MicroVM) -> None:
        bundle = self._work.sources.bundle(self._task.source)
        inside = "/run/microvm-ci.bundle"
        with machine.client.operation("sync"), bundle.open("rb") as file:
            send_file(machine.client.link(), "write", inside, file)
        script = ["/bin/sh", "-e", "-c", _CLONE, "sh", inside, self._task.source.branch]
        done = machine.run(script, cwd=WORKSPACE)
        if done.returncode:
            self._state.judge(_FAILED, "the machine's git could not clone the history")
            self._say(sanitize(done.stderr))

    def _steps(self, machine: MicroVM) -> None:
        stop = Stop(self._cancelled, time.monotonic() + self._job.timeout)
        for step in self._job.steps:
            succeeded = self._state.verdict == "passed"
            if step.when == ("failure" if succeeded else "success"):
                self._state.steps.append(StepResult(step.name, None))
                continue
            if self._state.steps and (self._job.artifacts or self._job.junit):
                self._collect(machine)  # the machine may crash during the next step
            self._step(machine, step, stop)

    def _step(self, machine: MicroVM, step: Step, stop: Stop) -> None:
        self._say(f"$ {step.run}")
        begin = time.monotonic()
        status: int | None = None
        try:
            status = run_command(
                machine, step.run, cwd=WORKSPACE, env=self._environment(), say=self._say, stop=stop
            )
        finally:
            self._state.steps.append(StepResult(step.name, status, round(time.monotonic() - begin, 3)))
        if status:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            self._state.judge(_FAILED, f"step {step.name!r} ended with {how}")

    def _prepare(self, machine: MicroVM, command: str, stop: Stop) -> tuple[int, str]:
        self._say(f"$ {command}")
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            self._say(line)

        limited = Stop(stop.cancelled, time.monotonic() + self._job.timeout)
        env = self._usual_environment()
        status = run_command(machine, command, cwd=WORKSPACE, env=env, say=say, stop=limited)
        return status, "\n".join(said[-100:])

    def _environment(self) -> dict[str, str]:
        source, job = self._task.source, self._job
        return {
            "MICROVM_CI_BRANCH": source.branch,
            "MICROVM_CI_COMMIT": source.commit,
            "MICROVM_CI_JOB": job.key,
            **self._usual_environment(),
        }

    def _usual_environment(self) -> dict[str, str]:
        """Return the variables that all branches have in common, since they can share a prepared template."""
        matrix = {f"MATRIX_{_variable(name)}": value for name, value in self._job.matrix}
        return {"CI": "true", **matrix, **dict(self._job.env)}

    def _collect(self, machine: MicroVM) -> None:
        collection = Collection(machine, WORKSPACE, time.monotonic() + _COLLECT_TIMEOUT)
        collection.take(self._job.junit, self._folder / "junit")
        taken = collection.take(self._job.artifacts, self._folder / "artifacts")
        self._state.artifacts = [f"{self._task.id}/artifacts/{path}" for path in taken]
        for note in collection.notes:
            self._say(f"not taken back: {note}")

    def _put_away(self, machine: MicroVM) -> None:
        """Record the machine's usage, denied requests and evidence, and close it."""
        machine.network.settle()
        usage = machine.usage()
        self._state.machine["peak_memory_bytes"] = usage.peak_memory_bytes
        self._state.machine["cpu_seconds"] = round(usage.cpu_seconds, 3)
        self._state.denied = tuple(sanitize_line(str(request)) for request in machine.network.denied)
        for line in self._state.denied:
            self._say(line)
        if self._state.denied and self._job.fail_on_denied:
            self._state.judge(_FAILED, self._state.denied[0])
        try:
            evidence.record(self._folder, machine.instance, machine.facts, self._task.title)
        finally:
            machine.close()

    def _failed(self, error: MicroVMError) -> None:
        """Derive the verdict from the error that ended the attempt."""
        kinds: tuple[tuple[type[MicroVMError], Verdict], ...] = (
            (QuotaExceeded, "quota"),
            (BootError, "infra"),
            (MachineCrashed, "crashed"),
            (HostError, "infra"),
            (ImageError, "infra"),
            (MachineError, "failed"),
        )
        verdict = next((verdict for kind, verdict in kinds if isinstance(error, kind)), _FAILED)
        self._state.judge(verdict, error.brief)
        for line in sanitize(str(error)).splitlines()[1:]:
            self._say(line)

    def _stopped(self, stopped: Stopped) -> None:
        if stopped.why == "cancelled":
            self._state.judge("cancelled", "the run was ended early")
        else:
            during = f", during {self._state.steps[-1].name!r}" if self._state.steps else ""
            self._state.judge("quota", f"timeout: {self._job.timeout:g} s{during}")

    # Log and watcher

    def _say(self, text: str) -> None:
        """Write lines to the log and pass them to the watcher."""
        assert self._log is not None
        for line in text.splitlines():
            self._log.write(f"{line}\n")
            self._work.watcher.line(self._task, line)
        self._log.flush()

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        """Report a phase to the watcher, and record its seconds when the block ends."""
        self._work.watcher.phase(self._task, phase)
        begin = time.monotonic()
        try:
            yield
        finally:
            self._state.phases[phase] = time.monotonic() - begin

    def _result(self) -> TaskResult:
        state, source = self._state, self._task.source
        return TaskResult(
            self._task.id,
            source.branch,
            source.commit,
            self._job.name,
            state.verdict,
            state.reason,
            allow_failure=self._job.allow_failure,
            phases={name: round(seconds, 3) for name, seconds in state.phases.items()},
            steps=tuple(state.steps),
            artifacts=tuple(state.artifacts),
            machine=state.machine,
            denied=state.denied,
        )


_CLONE = """\
git init --quiet .
git fetch --quiet --tags "$1" HEAD
git checkout --quiet --force -B "$2" FETCH_HEAD
rm -f "$1"
"""
# Without git-lfs, git regards the content of a large file as a change of its pointer.
_UNCHANGED = """\
git grep --quiet filter=lfs HEAD -- '*.gitattributes' || exit 0
git ls-files -z --modified |
    xargs -0 -r -n 1 sh -c 'git cat-file blob ":$0" |
        head -c 24 | grep -q "^version https://git-lfs" && printf "%s\\0" "$0"; :' |
    git update-index -z --assume-unchanged --stdin
"""


def _variable(name: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in name).upper()
