"""The sums of a test's repeated runs."""

from types import SimpleNamespace

import pytest

from pytest_microvm.suite.repeating import Repeats

PHASES = ("setup", "call", "teardown")


def report(phase, worker, *, failed=False, printed=""):
    """Return a report as pytest-xdist's controller gets it from a worker."""
    return pytest.TestReport(
        nodeid="test_it.py::test",
        location=("test_it.py", 0, "test"),
        keywords={},
        outcome="failed" if failed else "passed",
        longrepr="no answer" if failed else None,
        when=phase,
        sections=[("Captured stdout call", printed)] if printed else [],
        worker_id=worker,
    )


def test_two_workers_run_one_test_at_the_same_time():
    repeats, lines = Repeats(2), []
    for phase in PHASES:
        called = phase == "call"
        repeats.pytest_runtest_logreport(report(phase, "gw0", failed=called, printed="the queue is empty"))
        repeats.pytest_runtest_logreport(report(phase, "gw1", printed="the queue is full"))
    repeats.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    assert lines[0] == "microvm: test_it.py::test: 2 runs: 1 failed (50 %), 1 passed (50 %)"
    assert [line.strip() for line in lines if "only these" in line] == [
        "only these print: the queue is empty",
        "only these print: the queue is full",
    ]
