"""The records of a collection for the host: nodes, reports, deselected tests, printed text, the header."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_microvm.guest.runner_records import NodeTable, cut, report_record

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_microvm.guest.runner_output import OutsideOutput


class CollectionRecorder:
    """The plug-in that watches collection.

    Args:
        out: What is written to stdout outside of capturing.
        err: The same of stderr.

    Attributes:
        nodes: The collected nodes; ``None`` before the session has started.
        records: The records so far.
    """

    def __init__(self, out: OutsideOutput, err: OutsideOutput) -> None:
        self.nodes: NodeTable | None = None
        self.records: list[dict[str, Any]] = []
        self._out = out
        self._err = err
        self._reported: list[tuple[Any, Any]] = []
        self._printed_before: list[tuple[int, int]] = []  # characters of the two outputs, for each file
        self._header: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Keep the configuration, which serialises reports."""
        self._config = config

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Start to number nodes."""
        self.nodes = NodeTable(session)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_report_header(self) -> Generator[None, Any, None]:
        """Keep the header lines of the machine's plug-ins."""
        outcome = yield
        for lines in reversed(outcome.get_result()):
            self._header += [str(lines)] if isinstance(lines, str) else [str(line) for line in lines]

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_make_collect_report(self, collector: Any) -> Generator[None, Any, None]:
        """Keep which report is of which node, and what was printed before a file."""
        if isinstance(collector, pytest.File):
            self._printed_before.append((self._out.tell(), self._err.tell()))
        outcome = yield
        if outcome.excinfo is None:
            self._reported.append((outcome.get_result(), collector))

    def pytest_collectreport(self, report: Any) -> None:
        """Record a node and its children."""
        assert self.nodes is not None
        collector = next(node for made, node in reversed(self._reported) if made is report)
        record = {"k": "collected", "node": self.nodes.number(collector), "outcome": report.outcome}
        record["result"] = [self.nodes.number(node) for node in report.result]
        if report.outcome != "passed" or report.sections:
            record.update(report_record(self._config, report), k="collected")
        self.records.append(record)

    def pytest_deselected(self, items: Any) -> None:
        """Record deselected tests."""
        assert self.nodes is not None
        self.records.append({"k": "deselected", "items": [self.nodes.number(item) for item in items]})

    # For the session

    def record_printed(self) -> None:
        """Record what was printed outside of capturing, with the number of files collected before."""
        texts = self._out.getvalue(), self._err.getvalue()
        starts = (0, 0)
        for files, ends in enumerate([*self._printed_before, (len(texts[0]), len(texts[1]))]):
            printed = "".join(text[slice(*part)] for text, *part in zip(texts, starts, ends))  # noqa: B905
            if printed:
                self.records.append({"k": "printed", "files": files, "text": cut(printed)})
            starts = ends
        self._printed_before.clear()

    def lines(self) -> list[dict[str, Any]]:
        """Return the records of the collection so far; nodes come before the records that refer to them."""
        versions = {"k": "guest", "python": sys.version.split()[0], "pytest": pytest.__version__}
        nodes = [] if self.nodes is None else self.nodes.records
        return [{**versions, "header": self._header}, *nodes, *self.records]

    def end(self) -> list[Any]:
        """Drop the collected reports; return their serialised data."""
        self._reported.clear()
        return [record["data"] for record in self.records if "data" in record]
