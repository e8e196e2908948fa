"""The watchdog: each quota by value, who is told, and that one excess ends one machine once."""

import threading
import time
from dataclasses import dataclass

import pytest

from pytest_microvm.machine import quotas
from pytest_microvm.machine.quotas import QuotaGuard, Watchdog
from pytest_microvm.settings.spec import Limits


@dataclass
class Machine:
    """What a guard looks at."""

    cpu_seconds: float = 0.0
    disk_bytes: int = 0

    def __post_init__(self):
        self.ended = threading.Event()
        self.ends = 0

    def used(self):
        return self

    def end(self, verdict):
        self.verdict = verdict
        self.ends += 1
        self.ended.set()


def guarded(**limits):
    machine = Machine()
    limits = {"cpus": 1, "memory": 2**28, "disk": 1000, **limits}
    return machine, QuotaGuard(Limits(**limits), machine.used, machine.end)


@pytest.mark.parametrize(
    ("quota", "limits", "use"),
    [
        ("cpu_seconds", {"cpu_seconds": 2.0}, {"cpu_seconds": 2.1}),
        ("disk", {"disk": 4096}, {"disk_bytes": 4097}),
    ],
)
def test_what_is_used_is_compared(quota, limits, use):
    machine, guard = guarded(**limits)
    guard.check()
    assert guard.verdict is None
    for name, value in use.items():
        setattr(machine, name, value)
    guard.check()
    (limit,) = limits.values()
    (observed,) = use.values()
    assert (guard.verdict.quota, guard.verdict.limit, guard.verdict.observed) == (quota, limit, observed)
    assert machine.ends == 1


def test_exactly_what_is_allowed_is_allowed():
    machine, guard = guarded(disk=4096, cpu_seconds=2.0)
    machine.disk_bytes, machine.cpu_seconds = 4096, 2.0
    guard.check()
    assert guard.verdict is None


def test_the_first_reason_stays_and_ends_it_once():
    machine, guard = guarded()
    assert guard.exceed("memory", 1, 2).quota == "memory"
    assert machine.verdict is guard.verdict
    assert guard.exceed("disk", 3, 4).quota == "memory"
    assert machine.ends == 1


def test_limits_can_be_lowered_not_raised():
    machine, guard = guarded(cpu_seconds=2.0, pids=10)
    guard.tighten(pids=20, cpu_seconds=1.0, lifetime=None)
    assert (guard.limits.pids, guard.limits.cpu_seconds, guard.limits.lifetime) == (10, 1.0, None)
    machine.cpu_seconds = 1.5
    guard.check()
    assert guard.verdict.limit == 1.0


def test_nothing_is_looked_at_more_often_than_needed():
    _machine, guard = guarded()
    assert guard.check() == quotas.TICK
    _machine, guard = guarded(timeout=100.0, lifetime=100.0)
    with guard.limited("a command"):
        assert guard.check() == quotas.TICK
    _machine, guard = guarded(lifetime=0.1)
    assert 0 <= guard.check() <= 0.1


@pytest.fixture
def watchdog(monkeypatch):
    monkeypatch.setattr(quotas, "TICK", 0.05)
    dog = Watchdog()
    guards = []

    def watch(machine, guard):
        guards.append(guard)
        dog.add(guard)
        return machine, guard

    watch.dog = dog
    yield watch
    for guard in guards:
        dog.remove(guard)


def test_a_lifetime_ends(watchdog):
    machine, guard = watchdog(*guarded(lifetime=0.1))
    other, its_guard = watchdog(*guarded())
    assert machine.ended.wait(60)
    assert guard.verdict.quota == "lifetime"
    assert 0.1 <= guard.verdict.observed < 60
    assert its_guard.verdict is None
    assert not other.ended.is_set()


@pytest.mark.parametrize("timeout", [0.02, 0.1])
def test_what_takes_too_long_ends_the_machine(watchdog, timeout):
    machine, guard = watchdog(*guarded(timeout=timeout))
    with guard.limited("make coffee"):
        assert machine.ended.wait(60)
    assert (guard.verdict.quota, guard.verdict.limit) == ("timeout", pytest.approx(timeout))
    assert guard.verdict.details == "during: make coffee"


def test_what_ends_in_time_leaves_no_deadline(watchdog):
    machine, guard = watchdog(*guarded(timeout=0.2))
    for _ in range(3):
        with guard.limited("something short"):
            pass
    assert not machine.ended.wait(0.2 + 2 * quotas.TICK)
    assert guard.verdict is None


def test_without_a_timeout_nothing_is_limited():
    _machine, guard = guarded(timeout=None)
    with guard.limited("anything"):
        assert guard.check() == quotas.TICK


def test_a_removed_guard_is_left_alone(watchdog):
    machine, guard = watchdog(*guarded(lifetime=0.3))
    watchdog.dog.remove(guard)
    watchdog.dog.remove(guard)
    assert not machine.ended.wait(0.3 + 2 * quotas.TICK)


def test_the_thread_ends_with_the_last_machine_and_comes_back(watchdog):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "microvm-quotas"]

    before = set(threads())
    _machine, guard = watchdog(*guarded())
    (mine,) = set(threads()) - before
    watchdog.dog.remove(guard)
    mine.join(60)
    assert not mine.is_alive()
    again, _guard = watchdog(*guarded(lifetime=0.01))
    assert again.ended.wait(60)


def test_many_machines_are_judged_each_by_itself(watchdog):
    pairs = [watchdog(*guarded(cpu_seconds=float(number + 1))) for number in range(20)]
    for machine, _guard in pairs[::2]:
        machine.cpu_seconds = 100.0
    for machine, _guard in pairs[::2]:
        assert machine.ended.wait(60)
    deadline = time.monotonic() + 2 * quotas.TICK
    assert not any(machine.ended.wait(max(0, deadline - time.monotonic())) for machine, _guard in pairs[1::2])
