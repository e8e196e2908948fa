"""Run one test in a machine and turn whatever happens into reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from pytest_microvm.errors import MachineCrashed, MachineError, MicroVMError, QuotaExceeded
from pytest_microvm.junit import properties
from pytest_microvm.machine import MachineFacts, Usage
from pytest_microvm.remote.backend import Backend, Lease, RunnerMachine, RunOptions
from pytest_microvm.remote.checks import line, text, violation
from pytest_microvm.remote.collected import GuestExit, GuestWarning, parse_exit, parse_warning
from pytest_microvm.remote.leases import ATTEMPTS, Leases, Watcher
from pytest_microvm.remote.replay import error_report, passed_report, rebuild_test_report
from pytest_microvm.remote.session import RunnerSession

_MAX_RECORDS = 100_000
_CONSOLE_LINES = 40


@dataclass
class Ran:
    """What one test gave.

    Args:
        reports: For pytest's hooks, in order.
        warnings: Recorded during the test.
        printed: What the test wrote past pytest's capturing.
        stop: Why the project's hooks want the run to stop, if they do.
        exit: Set if the test ended the guest's session (``pytest.exit``, an interrupt).
        facts: The machine it ran in; ``None`` if there was none.
        outcome: ``passed``, ``failed``, ``skipped``, ``infra``, ``crashed`` or ``quota``.
    """

    reports: list[pytest.TestReport] = field(default_factory=list)
    warnings: list[GuestWarning] = field(default_factory=list)
    printed: str = ""
    stop: str | None = None
    exit: GuestExit | None = None
    facts: MachineFacts | None = None
    outcome: str = "infra"


class TestRunner:
    """Run tests on machines from a backend.

    Args:
        backend: Where machines come from.
        options: Isolation and timeouts.
        watcher: Told of machines that come and go.
    """

    __test__ = False

    def __init__(self, backend: Backend, options: RunOptions, watcher: Watcher) -> None:
        self._options = options
        self._leases = Leases(backend, options.isolation, watcher)

    def run(self, item: Any, nextitem: Any) -> Ran:
        """Run ``item``; whatever goes wrong becomes its outcome."""
        failure: MicroVMError | None = None
        for _attempt in range(ATTEMPTS):
            try:
                lease = self._leases.take(item)
                session = RunnerSession(lease.machine.link)
                following = nextitem.position if self._leases.next_in_same(lease, nextitem) else None
                records = session.run(item.position, following, self._options.timeout)
            except MachineError as error:  # it never reached the test: another machine may
                failure = error
                self.release()
                continue
            except MicroVMError as error:  # this computer cannot: another attempt would not help
                failure = error
                break
            return self._run_in(lease, records, item, following is not None)
        assert failure is not None
        return Ran([*_failed(item, "setup", f"infra: {failure}", properties(None, None, "infra"))])

    def release(self) -> None:
        """End the machine in use."""
        self._leases.release()

    def _run_in(self, lease: Lease, records: Iterator[dict[str, Any]], item: Any, again: bool) -> Ran:
        facts = lease.machine.facts
        lease.tests += 1
        try:
            received = list(_bounded(records))
            usage = lease.machine.usage()
            ran = _read(item, received, facts, usage)
        except MachineError as error:
            reports = _machine_failed(item, error, lease.machine, facts)
            self._keep(lease, item, reports)
            self._leases.discard(lease)
            return Ran(reports, facts=facts, outcome=_machine_outcome(error))
        except BaseException:  # Ctrl-C: nobody waits for this machine any more
            self._leases.discard(lease)
            raise
        if any(report.failed for report in ran.reports):
            self._keep(lease, item, ran.reports)
        if self._options.isolation == "test" or not again:
            self._end(lease)
        return ran

    def _keep(self, lease: Lease, item: Any, reports: list[pytest.TestReport]) -> None:
        """Keep the machine of a test that failed, if that was asked for, and say how to enter it."""
        kept = self._leases.keep(lease, item.nodeid)
        if kept is not None:
            for report in reports:
                if report.failed:
                    report.sections.append(("Machine kept", f"enter it with: pytest-microvm shell {kept.id}"))

    def _end(self, lease: Lease) -> None:
        if self._options.isolation == "test":
            self._leases.discard(lease)
        else:
            self._leases.release()


def _bounded(records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for count, record in enumerate(records):
        if count > _MAX_RECORDS:
            raise violation(f"more than {_MAX_RECORDS} records about one test")
        yield record


def _read(item: Any, records: list[dict[str, Any]], facts: MachineFacts, usage: Usage) -> Ran:
    """Return what ``records`` say.

    Raises:
        ProtocolViolation: They are not what a runner sends.
    """
    ran = Ran(facts=facts)
    if not records or records[-1].get("k") != "end":
        raise violation("a test's reports without an end")
    ran.outcome = _outcome(records)
    ours = properties(facts, usage, ran.outcome)
    for record in records:
        kind = record.get("k")
        if kind == "report":
            ran.reports.append(rebuild_test_report(item.config, record, item, ours))
        elif kind == "warning":
            ran.warnings.append(parse_warning(record))
        elif kind == "exit":
            ran.exit = parse_exit(record)
        elif kind == "end":
            ran.printed = text(record.get("printed", ""), "output")
            stop = record.get("stop")
            ran.stop = None if stop is None else line(stop, "reason to stop")
        else:
            raise violation("a record of an unknown kind")
    if ran.exit is not None and ran.exit.reason == "internal":
        ran.reports += _failed(item, "call", f"INTERNALERROR in the guest's pytest\n{ran.exit.text}", ours)
        ran.exit = None
    return ran


def _outcome(records: list[dict[str, Any]]) -> str:
    outcomes = [record["data"].get("outcome") for record in records if isinstance(record.get("data"), dict)]
    for name in ("failed", "skipped"):
        if name in outcomes:
            return name
    return "passed"


def _machine_failed(
    item: Any, error: MachineError, machine: RunnerMachine, facts: MachineFacts
) -> list[pytest.TestReport]:
    """Return the reports of a test whose machine did not bring it to its end."""
    message = str(error)
    if isinstance(error, MachineCrashed):
        message = f"crashed: the machine ended during the test\n{machine.end_reason() or error}"
    lines = machine.console_tail().strip().splitlines()[-_CONSOLE_LINES:]
    sections = (("Machine console (last lines)", "\n".join(lines)),) if lines else ()
    ours = properties(facts, machine.usage(), _machine_outcome(error))
    return _failed(item, "call", message, ours, sections)


def _machine_outcome(error: MachineError) -> str:
    return "quota" if isinstance(error, QuotaExceeded) else "crashed"


def _failed(
    item: Any,
    when: Any,
    message: str,
    ours: list[tuple[str, str]],
    sections: tuple[tuple[str, str], ...] = (),
) -> list[pytest.TestReport]:
    """Return a failure in ``when`` between the phases that every test has."""
    failure = error_report(item, when, message, ours, sections)
    teardown = passed_report(item, "teardown", ours)
    if when == "setup":
        return [failure, teardown]
    return [passed_report(item, "setup", ours), failure, teardown]
