"""What the ``microvm`` fixtures add to a test's report: what its machines were denied, and how they ended."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pytest_microvm.errors import BootError, MachineCrashed, QuotaExceeded
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.network.proxy.log import NetworkRequest


def asked(found: list[MicroVM], before: Mapping[str, int]) -> list[NetworkRequest]:
    """Return what a test's machines asked of the network since it began.

    Args:
        found: The machines.
        before: How often each had asked by then, by its id.
    """
    for machine in found:
        machine.network.settle()
    return [one for machine in found for one in machine.network.log.since(before.get(machine.id, 0))]


def tell_denied(report: pytest.TestReport, asked: list[NetworkRequest], *, fail: bool) -> None:
    """Add what was denied to the report; let a test that passed fail for it, if that is wanted."""
    denied = "\n".join(str(request) for request in asked if not request.allowed)
    if not denied or report.when != "call":
        return
    if fail and report.passed:
        report.outcome = "failed"
        report.longrepr = f"denied network access\n{denied}"
    else:
        report.sections.append(("Denied network access", denied))


def redact(report: pytest.TestReport, found: list[MicroVM]) -> None:
    """Take the machines' secrets out of what the report shows."""
    for redactor in (machine.client.redactor for machine in found if machine.client.redactor):
        report.sections = [(title, redactor.text(text)) for title, text in report.sections]
        if report.longrepr is not None and redactor.text(report.longreprtext) != report.longreprtext:
            report.longrepr = redactor.text(report.longreprtext)


def outcome_of(report: pytest.TestReport, error: BaseException | None) -> str:
    """Return a test's outcome: what became of its machine, if that is why it failed."""
    outcomes = {QuotaExceeded: "quota", MachineCrashed: "crashed", BootError: "infra"}
    found = [outcome for kind, outcome in outcomes.items() if isinstance(error, kind)]
    return found[0] if found else report.outcome


def ended_by(error: BaseException | None, used: list[MicroVM]) -> MicroVM:
    """Return the machine that ``error`` is about, as far as that shows; the last one otherwise."""
    ended = [machine for machine in used if not machine.alive]
    return ended[-1] if error is not None and ended else used[-1]
