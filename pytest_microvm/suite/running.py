"""Run one test in a machine and turn every outcome, including machine failures, into reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytest

from pytest_microvm.errors import (
    MachineCrashed,
    MachineError,
    MicroVMError,
    ProtocolViolation,
    QuotaExceeded,
)
from pytest_microvm.machine.evidence import saved
from pytest_microvm.machine.instance import MachineFacts, Usage
from pytest_microvm.network.proxy.log import NetworkRequest
from pytest_microvm.suite.backend import Lease, RunnerMachine, RunOptions, TestLimits
from pytest_microvm.suite.checks import line, paths, text, violation
from pytest_microvm.suite.collected import GuestExit, GuestWarning, parse_exit, parse_warning
from pytest_microvm.suite.forking import FixtureForks, KeptUp
from pytest_microvm.suite.kept_folders import GuestFolders, parse_folders
from pytest_microvm.suite.leases import LeaseObserver, Leases
from pytest_microvm.suite.limits import limits_of
from pytest_microvm.suite.live_display import LiveDisplay
from pytest_microvm.suite.properties import properties
from pytest_microvm.suite.replay import error_report, passed_report, rebuild_test_report
from pytest_microvm.suite.session import RunnerSession

_MAX_RECORDS = 100_000


@dataclass
class Ran:
    """The result of one test.

    Args:
        reports: Reports for pytest's hooks, in order.
        warnings: Warnings recorded during the test.
        printed: Output that the test wrote past pytest's capturing.
        stop: The reason for which the project's hooks stop the run, if they do.
        exit: Set if the test ended the guest's session (``pytest.exit``, an interrupt).
        facts: The machine it ran in; ``None`` if there was none.
        outcome: ``passed``, ``failed``, ``skipped``, ``infra``, ``crashed`` or ``quota``.
        sent: The reports as the guest serialized them; empty if they are not the guest's alone.
        output: What the machine's plug-ins output, if this was its last test and it sent that already.
        written: Files of the workspace that changed in the machine, relative to it; not safe to show.
        set_up: Times of the wide fixtures that were set up in the machine, as the guest sent them.
        folders: The test's temporary folders in the machine, if the host asked for them.
    """

    reports: list[pytest.TestReport] = field(default_factory=list)
    warnings: list[GuestWarning] = field(default_factory=list)
    printed: str = ""
    stop: str | None = None
    exit: GuestExit | None = None
    facts: MachineFacts | None = None
    outcome: str = "infra"
    sent: list[dict[str, Any]] = field(default_factory=list)
    output: dict[str, Any] | None = None
    written: tuple[str, ...] = ()
    set_up: object = field(default_factory=list)
    folders: GuestFolders | None = None


class TestRunner:
    """A runner of tests in machines from a backend.

    Args:
        options: Isolation and timeouts.
        leases: Machines for tests.
        forks: The wide fixtures that are set up once.
        watcher: Notified of machines that start and end.
        display: Shows what tests print and log while they run.
        whole: Whether one machine runs the whole session.
    """

    __test__ = False

    def __init__(
        self,
        options: RunOptions,
        leases: Leases,
        forks: FixtureForks,
        watcher: LeaseObserver,
        display: LiveDisplay,
        *,
        whole: bool,
    ) -> None:
        self._options = options
        self._leases = leases
        self._forks = forks
        self._watcher = watcher
        self._display = display
        self._whole = whole

    def run(self, item: Any, nextitem: Any) -> Ran:
        """Run ``item``, retrying machine failures; all other failures become its outcome."""
        limits = limits_of(item, self._options)
        ran = self._run(item, nextitem, limits)
        self._display.ran()
        self._tear_down(ran, item, nextitem, limits)
        return ran

    def _run(self, item: Any, nextitem: Any, limits: TestLimits) -> Ran:
        most = self._options.retries
        retry = 0
        kept: KeptUp | None = None
        shown = 0
        way = self._forks.way(item, limits)
        while True:
            try:
                lease = self._leases.take(item, partial(self._forks.start, way, item.nodeid))
                following = nextitem.position if self._leases.next_in_same(lease, nextitem) else None
                lease.machine.tighten(limits)
                lease.asked = lease.machine.requests.added
                session = RunnerSession(
                    lease.machine.link, self._display.capture, temporary=self._options.keep_tmp
                )
                records = session.run(item.position, following, limits, way, shown)
            except MachineError as error:  # the test never started: another machine may succeed
                self._leases.release()
                if retry == most:
                    return _never_reached(item, error, retry)
                retry += 1
                self._watcher.retried(item.nodeid, error, retry, most)
            except MicroVMError as error:  # a problem of this computer: a retry would not help
                return _never_reached(item, error, retry)
            else:
                lease.again = following is not None
                ran = self._run_in(lease, records, item, retry, tells=way == "tell")
                if ran is not None:
                    return ran if kept is None else _with_set_up(ran, item, kept, self._options)
                kept, failed = self._prepare(item, limits, retry)
                if failed is not None:
                    return failed
                way, shown = ("repeat", 0) if kept is None else ("standing", kept.set_ups)

    def _prepare(self, item: Any, limits: TestLimits, retries: int) -> tuple[KeptUp | None, Ran | None]:
        """Set up a test's wide fixtures once; return what was done, or the test's result if that failed.

        Neither: they cannot be set up once, so the test's own machine does it.
        """
        restored = self._forks.restore(item, limits)
        if restored is not None and self._forks.stand(item):
            return restored, None
        keeper = self._keeper(item)
        if keeper is None:
            return None, None
        kept, failed = self._prepare_in(keeper, item, limits, retries)
        if kept is not None and restored is not None:
            restored.add(kept)
            kept = restored
        return kept, failed

    def _prepare_in(
        self, keeper: Lease, item: Any, limits: TestLimits, retries: int
    ) -> tuple[KeptUp | None, Ran | None]:
        keeper.asked = keeper.machine.requests.added
        try:
            kept = self._forks.prepare(keeper, item, limits)
        except MachineError as error:
            ran = self._failed_machine(keeper, item, error, retries)
            self._forks.lose()
            return None, ran
        except MicroVMError as error:  # of this computer, such as a full disk
            self._watcher.told(item.nodeid, f"no checkpoint of its fixtures: {error.brief}")
            self._forks.lose()
            return None, None
        if kept.exit is None:
            return kept, None
        if _is_internal(kept.exit):
            self._forks.lose()
            reports = _failed(item, "setup", _internal_error(kept.exit), [])
            return None, Ran(reports, facts=keeper.machine.facts, outcome="failed")
        return kept, Ran(exit=kept.exit, facts=keeper.machine.facts)

    def _keeper(self, item: Any) -> Lease | None:
        """Return the machine for wide fixtures; tell the user if it cannot start."""
        try:
            return self._forks.keeper(item)
        except MicroVMError as error:
            self._watcher.told(item.nodeid, f"no machine for its fixtures: {error.brief}")
            return None

    def _tear_down(self, ran: Ran, item: Any, nextitem: Any, limits: TestLimits) -> None:
        """Tear down wide fixtures that ``nextitem`` does not need; add to ``ran`` what there is to report."""
        try:
            self._forks.ran(item, ran.set_up)
        except ProtocolViolation as error:
            _add_tear_down(ran, error_report(item, "teardown", f"crashed: {error}", []), None)
        try:
            kept = self._forks.tear_down(item, nextitem, limits)
            told = None if kept is None else kept.report
            report = None if told is None else _report_of_tear_down(told, item)
        except MachineError as error:
            self._forks.lose()
            report = error_report(item, "teardown", f"the machine of the fixtures: {error}", [])
            _add_tear_down(ran, report, None)
            return
        if kept is None:
            return
        if kept.exit is not None and _is_internal(kept.exit):
            self._forks.lose()
            _add_tear_down(ran, error_report(item, "teardown", _internal_error(kept.exit), []), None)
            return
        ran.warnings += kept.warnings
        ran.printed += kept.printed
        ran.exit = ran.exit or kept.exit
        if report is not None and told is not None:
            _add_tear_down(ran, report, told["data"])

    def release(self) -> None:
        """End the machines in use."""
        self._leases.release()
        self._forks.release()

    def last(self) -> AbstractContextManager[RunnerMachine]:
        """Return the machine in which the run ends; see :meth:`Leases.last`."""
        return self._leases.last()

    def _run_in(
        self, lease: Lease, records: Iterator[dict[str, Any]], item: Any, retries: int, *, tells: bool
    ) -> Ran | None:
        """Return a test's result; ``None`` if its machine told that it needs wide fixtures."""
        facts = lease.machine.facts
        lease.tests += 1
        if tells:
            self._display.wait()
        try:
            redactor = lease.machine.redactor
            kept = _bounded(self._not_for_now(lease, records))
            received = [cast("dict[str, Any]", redactor.tree(record)) for record in kept]
            exceeded = lease.machine.exceeded()
            if exceeded is not None:
                raise exceeded  # noqa: TRY301 - handled like an excess during the test
            if tells and received and received[-1].get("k") == "needs":
                lease.finished = True  # it has done nothing that anybody needs to know
                self._display.forget()
                self._leases.discard(lease)
                return None
            asked = lease.machine.requests.since(lease.asked)
            ran = _read(item, received, facts, lease.machine.usage(), retries=retries, asked=asked)
            _tell_denied(ran, item, asked, fail=self._options.fail_on_denied)
            if ran.output is not None:
                self._leases.finished(lease, ran.output)
            self._watcher.wrote(lease.machine, item.nodeid, ran.written)
            for line in lease.machine.take_back():
                self._watcher.told(item.nodeid, line)
        except MachineError as error:
            ran = self._failed_machine(lease, item, error, retries)
            self._keep(lease, item, ran.reports)
            self._leases.discard(lease)
            return ran
        except BaseException:  # Ctrl-C: the machine is not needed any more
            self._leases.discard(lease)
            raise
        if any(report.failed for report in ran.reports):
            self._keep_folders(lease, item, ran)
            self._keep(lease, item, ran.reports)
        if self._options.isolation == "test" or not (lease.again or self._whole):
            self._leases.release()
        return ran

    def _not_for_now(self, lease: Lease, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Show output and messages, lend the terminal, or take coverage; yield all other records."""
        for record in self._display.of(lease.machine.redactor).others(records):
            if record.get("k") == "debug":
                self._watcher.debugging(lease.machine, line(record.get("socket"), "path"))
            elif record.get("k") == "coverage":
                self._watcher.executed(record)
            else:
                yield record

    def _failed_machine(self, lease: Lease, item: Any, error: MachineError, retries: int) -> Ran:
        """Return the result of a test whose machine failed before the test ended."""
        machine = lease.machine
        if isinstance(error, MachineCrashed):
            error = machine.end_error()
        quota = error if isinstance(error, QuotaExceeded) else None
        if quota is not None:
            machine.end_for(quota)
        outcome = "quota" if quota else "crashed"
        write = partial(machine.save, error=error, about=item.nodeid)
        where = saved(self._options.artifacts, item.nodeid, machine.facts.id, write)
        ours = properties(
            machine.facts,
            machine.usage(),
            outcome,
            quota=quota,
            retries=retries,
            artifacts=where,
            requests=machine.requests.since(lease.asked),
        )
        sections = (("Machine artifacts", where),) if where else ()
        reports = _failed(item, "call", f"{outcome}: {error}", ours, sections)
        return Ran(reports, facts=machine.facts, outcome=outcome)

    def _keep_folders(self, lease: Lease, item: Any, ran: Ran) -> None:
        """Bring the temporary folders of a failed test back, if requested, and report their places."""
        places = self._watcher.failed(lease.machine, item.nodeid, ran.folders)
        for report in ran.reports:
            if report.failed and places:
                report.sections.append(("Kept tmp_path", "\n".join(places)))

    def _keep(self, lease: Lease, item: Any, reports: list[pytest.TestReport]) -> None:
        """Keep the machine of a failed test, if that was requested, and add the command to enter it."""
        kept = self._leases.keep(lease, item.nodeid)
        if kept is not None:
            for report in reports:
                if report.failed:
                    report.sections.append(("Machine kept", f"enter it with: pytest-microvm shell {kept.id}"))


def _bounded(records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for count, record in enumerate(records):
        if count > _MAX_RECORDS:
            raise violation(f"more than {_MAX_RECORDS} records about one test")
        yield record


def _read(
    item: Any,
    records: list[dict[str, Any]],
    facts: MachineFacts,
    usage: Usage,
    *,
    retries: int,
    asked: list[NetworkRequest],
) -> Ran:
    """Parse the runner's ``records`` about one test.

    Raises:
        ProtocolViolation: They do not follow the runner's protocol.
    """
    ran = Ran(facts=facts)
    if not records or records[-1].get("k") != "end":
        raise violation("a test's reports without an end")
    ran.outcome = _outcome(records)
    ours = properties(facts, usage, ran.outcome, retries=retries, requests=asked)
    for record in records:
        kind = record.get("k")
        if kind == "report":
            ran.reports.append(rebuild_test_report(item.config, record, item, ours))
            ran.sent.append(record["data"])
        elif kind == "warning":
            ran.warnings.append(parse_warning(record))
        elif kind == "exit":
            ran.exit = parse_exit(record)
        elif kind == "output":
            ran.output = record
        elif kind == "end":
            ran.printed = text(record.get("printed", ""), "output")
            ran.written = paths(record.get("written", []))
            ran.set_up = record.get("wide", [])
            ran.folders = parse_folders(record.get("temporary"))
            stop = record.get("stop")
            ran.stop = None if stop is None else line(stop, "reason to stop")
        else:
            raise violation("a record of an unknown kind")
    if (
        ran.exit is None
        and not any(map(_tells, ran.reports))
        and not item.config.getoption("setuponly", False)
    ):
        raise violation("nothing about the test")  # it would be silently missing from the results
    if ran.exit is not None and _is_internal(ran.exit):
        ran.reports += _failed(item, "call", _internal_error(ran.exit), ours)
        ran.exit = None
        ran.sent.clear()
    return ran


def _is_internal(ended: GuestExit) -> bool:
    """Return True if a hook of the project failed, which pytest calls an internal error."""
    return ended.reason == "internal"


def _internal_error(ended: GuestExit) -> str:
    return f"INTERNALERROR in the guest's pytest\n{ended.text}"


def _report_of_tear_down(record: dict[str, Any], item: Any) -> pytest.TestReport:
    """Return the keeper's report of a test's tear-down.

    Raises:
        ProtocolViolation: It is malformed, or about another test or phase.
    """
    report = rebuild_test_report(item.config, record, item, [])
    if report.when != "teardown":
        raise violation("a report about another phase than the tear-down")
    return report


def _with_set_up(ran: Ran, item: Any, kept: KeptUp, options: RunOptions) -> Ran:
    """Add to a test's result what the set-up of its wide fixtures brought, which was made for it."""
    ran.warnings[:0] = kept.warnings
    ran.printed = kept.printed + ran.printed
    for report in ran.reports:
        if report.when == "setup":
            report.duration += kept.seconds
    _tell_denied(ran, item, kept.asked, fail=options.fail_on_denied)
    return ran


def _add_tear_down(ran: Ran, report: pytest.TestReport, sent: dict[str, Any] | None) -> None:
    """Add the report of wide fixtures' tear-down to that of the test's own.

    Args:
        ran: The test's result, which changes.
        report: The report to add.
        sent: The report as the guest serialized it; ``None`` if it is not the guest's.
    """
    own = next((each for each in reversed(ran.reports) if each.when == "teardown"), None)
    if own is None:  # the run was stopped before the test had one
        return
    if not report.failed or own.failed:
        failure = [("Tear-down of wider fixtures", report.longreprtext)] if report.failed else []
        own.sections += [*report.sections, *failure]
        return
    report.user_properties = own.user_properties
    report.sections[:0] = own.sections
    ran.reports[ran.reports.index(own)] = report
    if sent is None:
        ran.sent.clear()
    elif ran.sent:
        ran.sent[-1] = sent


def _tell_denied(ran: Ran, item: Any, asked: list[NetworkRequest], *, fail: bool) -> None:
    """Add denied network requests to the test's reports; with ``fail``, make a passed test fail for them."""
    denied = "\n".join(str(request) for request in asked if not request.allowed)
    if not denied:
        return
    for number, report in enumerate(ran.reports):
        if report.when == "call" and fail and report.passed:
            ours = [(name, str(value)) for name, value in report.user_properties]
            shown = tuple(report.sections)
            ran.reports[number] = error_report(item, "call", f"denied network access\n{denied}", ours, shown)
            ran.outcome = "failed"
            ran.sent.clear()
        elif report.when == "call" or report.failed:
            report.sections.append(("Denied network access", denied))


def _tells(report: pytest.TestReport) -> bool:
    """Return True if a report determines the outcome of its test."""
    return report.failed or report.skipped or (report.when == "call" and report.passed)


def _outcome(records: list[dict[str, Any]]) -> str:
    outcomes = [record["data"].get("outcome") for record in records if isinstance(record.get("data"), dict)]
    for name in ("failed", "skipped"):
        if name in outcomes:
            return name
    return "passed"


def _never_reached(item: Any, error: MicroVMError, retries: int) -> Ran:
    """Return the result of a test that never started in any machine."""
    ours = properties(None, None, "infra", retries=retries)
    return Ran(_failed(item, "setup", f"infra: {error}", ours))


def _failed(
    item: Any,
    when: Any,
    message: str,
    ours: list[tuple[str, str]],
    sections: tuple[tuple[str, str], ...] = (),
) -> list[pytest.TestReport]:
    """Return a failed report for ``when``, with passed reports for the test's other phases."""
    failure = error_report(item, when, message, ours, sections)
    teardown = passed_report(item, "teardown", ours)
    if when == "setup":
        return [failure, teardown]
    return [passed_report(item, "setup", ours), failure, teardown]
