"""The host budget: counted across processes, the dead do not count, hopeless waiting ends."""

import multiprocessing
import os
import signal
import threading

import pytest

from pytest_microvm.errors import BudgetExhausted, UsageError
from pytest_microvm.templates import budget as budget_module
from pytest_microvm.templates.budget import HostBudget, default_limits

FORK = multiprocessing.get_context("fork")
GIB = 1024**3


@pytest.fixture
def budget(tmp_path):
    return HostBudget(tmp_path / "run", cpus=4, memory=4 * GIB)


def test_taken_and_released(budget):
    assert budget.try_take("a", "base", 2, GIB)
    assert budget.try_take("b", "base", 2, GIB)
    assert not budget.try_take("c", "base", 1, GIB)
    assert {record.id for record in budget.records()} == {"a", "b"}
    budget.release("a")
    budget.release("a")
    assert budget.try_take("c", "base", 1, GIB)


def test_memory_counts_too(budget):
    assert budget.try_take("a", "base", 1, 3 * GIB)
    assert not budget.try_take("b", "base", 1, 2 * GIB)
    assert budget.try_take("c", "base", 1, GIB)


@pytest.mark.parametrize(("cpus", "memory"), [(5, GIB), (1, 5 * GIB)])
def test_request_beyond_the_whole_budget_fails_at_once(budget, cpus, memory):
    with pytest.raises(BudgetExhausted, match="do not fit into the host budget") as caught:
        budget.take("a", "base", cpus, memory)
    assert "PYTEST_MICROVM_BUDGET" in caught.value.resolution
    assert budget.records() == []


def test_a_process_does_not_wait_for_itself_for_ever(budget, monkeypatch):
    monkeypatch.setattr(budget_module, "_HOPE", 0.1)
    budget.take("a", "base", 4, GIB)
    with pytest.raises(BudgetExhausted, match="this process already holds 1 machines"):
        budget.take("b", "base", 1, GIB)


def test_a_release_wakes_another_thread(budget, monkeypatch):
    monkeypatch.setattr(budget_module, "_PAUSE", 600.0)  # only the release can wake it
    monkeypatch.setattr(budget_module, "_HOPE", 600.0)
    budget.take("a", "base", 4, GIB)
    waiting = threading.Event()
    real = budget._released.wait

    def wait(timeout):
        waiting.set()
        return real(timeout)

    monkeypatch.setattr(budget._released, "wait", wait)
    waiter = threading.Thread(target=budget.take, args=("b", "base", 4, GIB))
    waiter.start()
    waiting.wait()
    budget.release("a")
    waiter.join()
    assert [record.id for record in budget.records()] == ["b"]


def test_waiting_for_the_budget_is_reported(budget, monkeypatch):
    monkeypatch.setattr(budget_module, "_PATIENCE", 0.0)
    monkeypatch.setattr(budget_module, "_HOPE", 0.3)
    budget.take("a", "base", 4, GIB)
    said = []
    with pytest.raises(BudgetExhausted):
        budget.take("b", "base", 1, GIB, say=said.append)
    assert said == ["waiting: the host budget (4 vCPUs, 4G) is in use by other machines"]


def test_idle_machines_are_reclaimed_to_make_room(budget):
    ready = ["p1", "p2"]
    for machine in ready:
        budget.take(machine, "base", 2, GIB)

    def reclaim():
        budget.release(ready.pop())
        return True

    budget.take("mine", "base", 3, GIB, reclaim=reclaim)
    assert [record.id for record in budget.records()] == ["mine"]


def _hold(budget, ready):
    budget.take("theirs", "base", 4, GIB)
    ready.set()
    signal.pause()


def test_another_process_counts_until_it_is_dead(budget):
    ready = FORK.Event()
    process = FORK.Process(target=_hold, args=(budget, ready))
    process.start()
    assert ready.wait(60)
    assert not budget.try_take("mine", "base", 1, GIB)
    assert budget.records()[0].owner == process.pid
    killer = threading.Timer(0.2, os.kill, (process.pid, signal.SIGKILL))
    killer.start()
    reaper = threading.Thread(target=process.join)
    reaper.start()
    budget.take("mine", "base", 1, GIB)
    assert [record.id for record in budget.records()] == ["mine"]
    killer.join()
    reaper.join()


def test_a_reused_process_id_is_not_the_owner(budget, monkeypatch):
    monkeypatch.setattr(budget_module, "_started", lambda pid: "then")
    budget.take("old", "base", 4, GIB)
    monkeypatch.setattr(budget_module, "_started", lambda pid: "now")
    assert budget.records() == []
    assert budget.try_take("new", "base", 4, GIB)


def _take_often(folder, number, limit, peaks, meeting):
    budget = HostBudget(folder, limit, 100 * GIB)
    for turn in range(20):
        budget.take(f"{number}-{turn}", "base", 1, GIB)
        if turn == 0 and number < limit:
            meeting.wait(60)  # so many hold one at the same time
        peaks.put(sum(record.cpus for record in budget.records()))
        budget.release(f"{number}-{turn}")


def test_processes_together_keep_the_limit(tmp_path):
    peaks = FORK.SimpleQueue()
    meeting = FORK.Barrier(2)
    processes = [
        FORK.Process(target=_take_often, args=(tmp_path / "run", n, 2, peaks, meeting)) for n in range(4)
    ]
    for process in processes:
        process.start()
    seen = [peaks.get() for _ in range(80)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert max(seen) == 2
    assert HostBudget(tmp_path / "run", 2, GIB).records() == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"id": "x"}', "7"])
def test_odd_records_do_not_count(budget, content):
    (budget._folder / "odd.json").write_text(content)
    assert budget.try_take("a", "base", 4, GIB)


def test_limits(monkeypatch):
    monkeypatch.delenv("PYTEST_MICROVM_BUDGET", raising=False)
    cpus, memory = default_limits()
    assert cpus == 4 * os.cpu_count()
    assert 0 < memory < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv("PYTEST_MICROVM_BUDGET", "cpus=3, memory=2G")
    assert default_limits() == (3, 2 * GIB)
    monkeypatch.setenv("PYTEST_MICROVM_BUDGET", "memory=2G")
    assert default_limits() == (cpus, 2 * GIB)


@pytest.mark.parametrize("value", ["cpus=many", "memory=", "disk=3", "8", "cpus=0", "memory=-1"])
def test_bad_limits(monkeypatch, value):
    monkeypatch.setenv("PYTEST_MICROVM_BUDGET", value)
    with pytest.raises(UsageError, match="PYTEST_MICROVM_BUDGET"):
        default_limits()
