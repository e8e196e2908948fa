"""Additions of the ``microvm`` fixtures to a test's report: denied requests, and how machines ended."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pytest_microvm.errors import BootError, MachineCrashed, QuotaExceeded
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.network.proxy.log import NetworkRequest


def asked(found: list[MicroVM], before: Mapping[str, int]) -> list[NetworkRequest]:
    """Return the network requests that a test's machines have made since the test began.

    Args:
        found: The machines.
        before: The number of earlier requests of each machine, by its id.
    """
    for machine in found:
        machine.network.settle()
    return [one for machine in found for one in machine.network.log.since(before.get(machine.id, 0))]


def tell_denied(report: pytest.TestReport, asked: list[NetworkRequest], *, fail: bool) -> None:
    """Add denied requests to the report; with ``fail``, they make a passed test fail."""
    denied = "\n".join(str(request) for request in asked if not request.allowed)
    if not denied or report.when != "call":
        return
    if fail and report.passed:
        report.outcome = "failed"
        report.longrepr = f"denied network access\n{denied}"
    else:
        report.sections.append(("Denied network access", denied))


def redact(report: pytest.TestReport, found: list[MicroVM]) -> None:
    """Redact the machines' secrets in the report."""
    for redactor in (machine.client.redactor for machine in found if machine.client.redactor):
        report.sections = [(title, redactor.text(text)) for title, text in report.sections]
        if report.longrepr is not None and redactor.text(report.longreprtext) != report.longreprtext:
            report.longrepr = redactor.text(report.longreprtext)


def outcome_of(report: pytest.TestReport, error: BaseException | None) -> str:
    """Return a test's outcome, or its machine's if that made it fail."""
    outcomes = {QuotaExceeded: "quota", MachineCrashed: "crashed", BootError: "infra"}
    found = [outcome for kind, outcome in outcomes.items() if isinstance(error, kind)]
    return found[0] if found else report.outcome


def ended_by(error: BaseException | None, used: list[MicroVM]) -> MicroVM:
    """Return the machine that caused ``error``, as far as it is known; otherwise the last one."""
    ended = [machine for machine in used if not machine.alive]
    return ended[-1] if error is not None and ended else used[-1]
