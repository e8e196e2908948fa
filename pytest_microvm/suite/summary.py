"""The lines about machines in pytest's header and summary, and the properties of the JUnit suite."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from pytest_microvm.suite.backend import BackendFacts
from pytest_microvm.suite.collected import Collected

_DIGEST_LENGTH = 12
_USUAL = ("rootdir:", "configfile:", "testpaths:", "plugins:", "cachedir:", "hypothesis profile")


EXIT_INFRA = 75
"""Exit status of a run in which no test failed but some never started (EX_TEMPFAIL of sysexits.h)."""

_TROUBLE = ("infra", "crashed", "quota")


def machine_outcome(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """Return ``infra``, ``crashed`` or ``quota`` if the report failed for that reason, else ``None``."""
    if not isinstance(report, pytest.TestReport) or not report.failed:
        return None
    outcome = dict(report.user_properties).get("microvm.outcome")
    return str(outcome) if outcome in _TROUBLE else None


class Tally:
    """Counts of tests and machines, taken from report properties, so that xdist workers' tests count too."""

    def __init__(self) -> None:
        self.tests: set[str] = set()
        self.retries = 0
        self._failed: set[str] = set()
        self.ready: dict[str, float] = {}
        self._forks: set[str] = set()
        self._restored: dict[str, None] = {}
        self.outcomes: dict[str, int] = {}

    def add(self, report: pytest.TestReport) -> None:
        """Count a report: failures of any phase, and the test and its machine at its teardown."""
        found = {name: value for name, value in report.user_properties if name.startswith("microvm.")}
        if report.failed:
            self._failed.add(str(found.get("microvm.outcome", "failed")))
        if report.when != "teardown" or "microvm.outcome" not in found:
            return
        self.tests.add(report.nodeid)
        outcome = str(found["microvm.outcome"])
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.retries += int(str(found.get("microvm.retries", 0)))
        if "microvm.id" in found:
            if "microvm.fork_of" in found:
                self._forks.add(str(found["microvm.id"]))
                self._restored.update(dict.fromkeys(str(found.get("microvm.restored", "")).split()))
            self.ready[str(found["microvm.id"])] = float(str(found["microvm.ready_ms"])) / 1000

    @property
    def only_infra_failed(self) -> bool:
        """True if there are failures, and all are tests that never started in any machine."""
        return self._failed == {"infra"}

    def line(self) -> str:
        """Return the summary, such as ``12 tests in 12 machines, ready in 0.11 s (median)``."""
        text = f"{_count(len(self.tests), 'test')} in {_count(len(self.ready), 'machine')}"
        if self._forks:
            restored = f", of an earlier run: {' '.join(self._restored)}" if self._restored else ""
            text += f" ({_count(len(self._forks), 'fork')} with fixtures that stood{restored})"
        if self.ready:
            text += f", ready in {statistics.median(self.ready.values()):.2f} s (median)"
        trouble = [f"{self.outcomes[name]} {name}" for name in _TROUBLE if name in self.outcomes]
        if self.retries:
            trouble.append(f"{self.retries} retried")
        return ", ".join([text, *trouble])


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def header_line(facts: BackendFacts, isolation: str) -> str:
    """Return the line for pytest's header: accelerator, image and isolation."""
    digest = facts.image_digest.removeprefix("sha256:")[:_DIGEST_LENGTH]
    python = f", python {facts.python}, mirrored from this computer" if facts.python else ""
    return (
        f"microvm: accelerator {facts.accelerator} ({facts.accelerator_reason}), "
        f"image {facts.image} ({digest}){python}, isolation {isolation}"
    )


def guest_lines(collected: Collected) -> list[str]:
    """Return the lines about the guest's pytest: versions, and its plug-ins' header lines."""
    if not collected.pytest:
        return []
    versions = f"microvm: in the machine: Python {collected.python}, pytest {collected.pytest}"
    own = [line for line in collected.header if line and not line.startswith(_USUAL)]
    return [versions, *(f"microvm: in the machine: {line}" for line in own)]


def add_suite_properties(config: pytest.Config, facts: BackendFacts, isolation: str) -> None:
    """Add the properties common to all tests to the suite of a JUnit report, if one is written."""
    from _pytest.junitxml import xml_key  # noqa: PLC0415 - only runs with --microvm

    xml: Any = config.stash.get(xml_key, None)
    if xml is None:
        return
    for name, value in (
        ("microvm.image", facts.image),
        ("microvm.image_digest", facts.image_digest),
        *([("microvm.python", facts.python)] if facts.python else []),
        ("microvm.accelerator", facts.accelerator),
        ("microvm.accelerator_reason", facts.accelerator_reason),
        ("microvm.isolation", isolation),
    ):
        xml.add_global_property(name, value)
