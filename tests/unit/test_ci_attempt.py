"""The phases of an attempt: which are reported and timed, whichever step ends it."""

import threading
import time
from types import SimpleNamespace

import pytest

from pytest_microvm.ci.definition.job import Job, Step
from pytest_microvm.ci.definition.task import Source, Task
from pytest_microvm.ci.running.attempt import Attempt
from pytest_microvm.ci.running.commands import Stopped
from pytest_microvm.ci.running.executor import Work
from pytest_microvm.errors import BootError, HostError, MachineCrashed, MachineError
from pytest_microvm.settings.spec import Limits
from pytest_microvm.templates.chain import Base

TASK = Task("main.test", Source("main", "c" * 40), Job("test", "test", (Step("true", "true"),)))
FACTS = SimpleNamespace(image="base", image_digest="sha256:0", accelerator="tcg")
MACHINE = SimpleNamespace(alive=True, facts=FACTS)
ALL = ["prepare", "queue", "sync", "run", "collect"]
WAIT = 0.05


class Watcher:
    def __init__(self):
        self.phases = []

    def phase(self, _task, phase):
        self.phases.append(phase)

    def line(self, _task, _text): ...


class Here(Attempt):
    """An attempt without a machine, some of whose steps raise an error."""

    def __init__(self, folder, errors):
        self.errors, self.watcher, self.ends, self.full = errors, Watcher(), [], [None]
        work = Work(None, folder, self.watcher, "repository", "main")
        host = SimpleNamespace(
            base=lambda _spec: self.step("base", Base(None, None, None, Limits(1, 1, 1))),
            template=lambda _base, _steps: None,
            budget=SimpleNamespace(check_hope=lambda _cpus, _memory: None),
            try_machine=self.try_machine,
        )
        super().__init__(host, TASK, work, threading.Event())

    def try_machine(self, _template, _base):
        return self.full.pop() if self.full else self.step("start", MACHINE)

    def step(self, name, result=None):
        time.sleep(WAIT)
        if name in self.errors:
            raise self.errors[name]
        return result

    def _sync(self, _machine):
        self.step("sync")

    def _steps(self, _machine):
        self.step("steps")

    def _collect(self, _machine):
        self.step("collect")

    def _put_away(self, machine):
        self.ends.append(machine)
        self.step("put away")


@pytest.mark.parametrize(
    ("errors", "verdict", "phases"),
    [
        ({}, "passed", ALL),
        ({"base": HostError("no QEMU")}, "infra", ALL[:1]),
        ({"start": BootError("no answer")}, "infra", ALL[:2]),
        ({"sync": MachineError("the disk is full")}, "failed", ALL[:3]),
        ({"sync": OSError("the disk is full")}, "infra", ALL[:3]),
        ({"sync": MachineCrashed("ended")}, "crashed", [*ALL[:3], "collect"]),
        ({"steps": Stopped("timeout")}, "quota", ALL),
        ({"steps": MachineCrashed("ended"), "collect": MachineCrashed("ended")}, "crashed", ALL),
        ({"collect": MachineError("no such folder")}, "failed", ALL),
        ({"put away": OSError("the disk is full")}, "infra", ALL),
    ],
)
def test_phases_until_the_attempt_ends(tmp_path, errors, verdict, phases):
    attempt = Here(tmp_path, errors)
    result = attempt.run()
    assert result.verdict == verdict
    assert attempt.watcher.phases == phases
    started = len(phases) > 2
    assert set(result.phases) == {*phases, *(["restore"] if started else [])}
    assert attempt.ends == [MACHINE] * started


def test_time_belongs_to_one_phase_each(tmp_path):
    begin = time.monotonic()
    phases = Here(tmp_path, {}).run().phases
    assert sum(phases.values()) <= time.monotonic() - begin + 0.01  # rounded
    assert min(phases.values()) >= WAIT
    assert phases["queue"] > 0.2  # the first try found no room
    assert phases["collect"] >= 2 * WAIT  # with putting the machine away
