"""Replay a guest's collection in the host's session: reports, items, deselection, errors."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import pytest
from _pytest.runner import collect_one_node

from pytest_microvm.suite import checks
from pytest_microvm.suite.collected import Collected, CollectOutcome, GuestExit
from pytest_microvm.suite.foreign_warnings import warning_message
from pytest_microvm.suite.live_display import LiveDisplay
from pytest_microvm.suite.proxies import build_proxies
from pytest_microvm.suite.replay import rebuild_collect_report
from pytest_microvm.untrusted.text import sanitize_part

_OUTPUT = ("Captured stdout", "Captured stderr")
_MAX_DEPTH = 200  # nested collectors; Python's recursion limit is not much higher
_SPARE_VISITS = 100_000  # for files that are named more than once


class Replay:
    """A replay of the guest's collection through the host's hooks, as if it had happened on the host.

    Args:
        session: The host's session.
        collected: The guest's collection.
        display: Shows what was printed meanwhile, if the user wants to see that.
    """

    def __init__(self, session: pytest.Session, collected: Collected, display: LiveDisplay) -> None:
        self._session = session
        self._config = session.config
        self._collected = collected
        self._display = display
        self._printed = deque(collected.printed if display.capture else ())
        self._files = 0
        self._proxies = build_proxies(collected, session)
        self._reports: dict[int, deque[CollectOutcome]] = defaultdict(deque)
        for report in collected.reports:
            self._reports[report.node].append(report)
        self._told: set[int] = set()
        self._visits = 0

    def perform(self) -> None:
        """Fill ``session.items``, as ``Session.perform_collect`` does.

        Raises:
            pytest.UsageError: The guest's pytest ended with one.
            ProtocolViolation: The guest's nodes do not form a tree.
        """
        session, hook = self._session, self._config.hook
        session.items = []
        self._warn()
        try:
            found = list(self._items())
            self._show_printed()
            session.items = self._ordered(found)
            gone = [self._proxies[number] for number in self._collected.deselected]
            known = {item.number for item in found}
            deselected = [item for item in gone if item.number in known]
            if deselected:
                hook.pytest_deselected(items=deselected)
            if self._collected.exit is None:
                hook.pytest_collection_modifyitems(session=session, config=self._config, items=session.items)
        finally:
            hook.pytest_collection_finish(session=session)
        session.testscollected = len(session.items)
        if self._collected.exit is not None:
            raise_exit(self._collected.exit)

    def make_report(self, collector: Any) -> pytest.CollectReport:
        """Return the next report on ``collector``."""
        number = 0 if collector is self._session else collector.number
        reports = self._reports[number]
        if not reports:
            raise checks.violation("a collector without a report")
        outcome = reports.popleft() if len(reports) > 1 else reports[0]
        result = [self._proxies[child] for child in outcome.result]
        return rebuild_collect_report(self._config, outcome, collector.nodeid, result)

    def _warn(self) -> None:
        for warning in self._collected.warnings:
            self._config.hook.pytest_warning_recorded.call_historic(
                kwargs={
                    "warning_message": warning_message(warning),
                    "when": warning.when,
                    "nodeid": warning.nodeid,
                    "location": None,
                }
            )

    def _items(self) -> Iterator[Any]:
        """Yield the items in pytest's order: first report failures on the way to the arguments."""
        for told in self._collected.reports:
            if told.node == 0:
                break
            if told.outcome != "passed":
                self._tell(self._proxies[told.node])
        if not self._reports[0]:
            return
        report = self._tell(self._session)
        if report.passed:
            for node in report.result:
                yield from self._below(node, ())

    def _below(self, node: Any, active: tuple[int, ...]) -> Iterator[Any]:
        self._visits += 1
        if self._visits > 2 * len(self._proxies) + _SPARE_VISITS:
            raise checks.violation("a collection tree that never ends")
        if len(active) > _MAX_DEPTH or node.number in active:
            raise checks.violation("a collection tree with a loop")
        if isinstance(node, pytest.Item):
            node.ihook.pytest_itemcollected(item=node)
            yield node
        elif isinstance(node, pytest.File) or node.number not in self._told:
            # Only files are reported again if they are named twice.
            self._told.add(node.number)
            report = self._collect(node)
            if report.passed:
                for child in report.result:
                    yield from self._below(child, (*active, node.number))
            node.ihook.pytest_collectreport(report=report)

    def _tell(self, node: Any) -> pytest.CollectReport:
        report = self._collect(node)
        node.ihook.pytest_collectreport(report=report)
        return report

    def _collect(self, node: Any) -> pytest.CollectReport:
        """Return the report on a collector; what was printed is shown where it was natively."""
        if isinstance(node, pytest.File):
            self._show_printed(self._files)
            self._files += 1
        report = collect_one_node(node)
        if self._display.capture:
            for title, text in report.sections:
                if title.startswith(_OUTPUT):
                    self._display.write(sanitize_part(text))
        if self._display.capture == "no":
            report.sections = [section for section in report.sections if not section[0].startswith(_OUTPUT)]
        return report

    def _show_printed(self, files: float = math.inf) -> None:
        """Show what was printed outside of capturing before file number ``files`` was collected."""
        while self._printed and self._printed[0][0] <= files:
            self._display.write(sanitize_part(self._printed.popleft()[1]))

    def _ordered(self, found: list[Any]) -> list[Any]:
        """Return the items of ``found`` in the order set by the project's hooks."""
        position = {number: place for place, number in enumerate(self._collected.order)}
        wanted = {item.number for item in found}
        for item in found:
            item.position = position.get(item.number, -1)
        ordered = [self._proxies[number] for number in self._collected.order if number in wanted]
        reported = {number for report in self._collected.reports for number in report.result}
        for number in self._collected.order:
            if number not in reported:  # added by a hook of the project, not by a collector
                self._proxies[number].position = position[number]
                ordered.insert(min(position[number], len(ordered)), self._proxies[number])
        return ordered


def raise_exit(ended: GuestExit) -> None:
    """End the host's session as the guest's session ended.

    Raises:
        pytest.UsageError: For bad input.
        KeyboardInterrupt: The guest's session was interrupted.
        pytest.exit.Exception: In every other case, with the guest's exit code, but never 0: no test can end a
            run so that it looks passed.
    """
    text = ended.text.strip().removeprefix("ERROR: ")
    if ended.reason == "no pytest":
        raise pytest.UsageError(
            f"the image has no pytest: {text} cannot import it\n"
            "next step: mirror the environment that runs pytest (--microvm-python=host), or use an image "
            "that has pytest (--microvm-image=python)"
        )
    if ended.reason == "usage":
        raise pytest.UsageError(text)
    if ended.reason == "interrupt" and not text:
        raise KeyboardInterrupt
    code = ended.code or pytest.ExitCode.INTERRUPTED
    pytest.exit(text or "the guest's pytest ended", returncode=code)
