"""The end of a run: in a last machine, plug-ins and the project's hooks get all reports and speak."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from pytest_microvm.errors import MachineError, MicroVMError
from pytest_microvm.suite import checks
from pytest_microvm.suite.backend import RunnerMachine
from pytest_microvm.suite.machine_coverage import MachineCoverage
from pytest_microvm.suite.running import Ran
from pytest_microvm.suite.session import RunnerSession
from pytest_microvm.suite.write_back import WriteBack
from pytest_microvm.untrusted.text import sanitize

_TIMEOUT = 600.0
_WIDTH = 80  # columns of a terminal that pytest does not have
_MAX_RECORDS_SIZE = 4 * 1024**3


@dataclass(frozen=True)
class Ended:
    """What the last machine said; all texts are safe to show.

    Args:
        status: The exit status of its pytest session.
        loop: What plug-ins wrote after the last test.
        finish: What they wrote when the session finished.
        summary: What they wrote in the summary.
        written: Files that they wrote, relative to the workspace; not safe to show.
        executed: What the last machine executed, as coverage measured it; not checked.
    """

    status: int
    loop: str
    finish: str
    summary: str
    written: tuple[str, ...]
    executed: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Course:
    """How a run has gone, as far as the reports of tests do not say it.

    Args:
        tests: Number of tests that were collected.
        interrupted: Whether pytest interrupted it, such as for errors in the collection.
        stopped: pytest's text if a limit of failures (``-x``, ``--maxfail``) stopped it.
        errors: Errors in the collection that were reported before it stopped; ``None``: all.
    """

    tests: int
    interrupted: bool = False
    stopped: str = ""
    errors: int | None = None


class RunRecords:
    """The records of a run for the last machine, in a file: reports, and what the machines' plug-ins output.

    Args:
        path: The file; it must not exist.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("xb")
        self._outputs: list[dict[str, Any]] = []

    def add_test(self, item: Any, ran: Ran) -> None:
        """Add a test's reports: the guest's own where there are, so that nothing of them is lost."""
        reports = ran.sent or [
            item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
            for report in ran.reports
        ]
        machine = "" if ran.facts is None else ran.facts.id
        self._write(
            {
                "k": "test",
                "machine": machine,
                "nodeid": item.nodeid,
                "location": item.location,
                "reports": reports,
            }
        )
        self._write_outputs()

    def add_output(self, machine: str, record: dict[str, Any] | None) -> None:
        """Add a machine's last record; it comes after the report of its last test.

        Args:
            machine: The machine's id.
            record: The record; ``None`` if the machine ended without.
        """
        output = None if record is None else record.get("output")
        self._outputs.append({"k": "down", "machine": machine, "output": output})

    def close(self) -> None:
        """Complete the file."""
        if not self._file.closed:
            self._write_outputs()
            self._file.close()

    def _write_outputs(self) -> None:
        for record in self._outputs:
            self._write(record)
        self._outputs.clear()

    def _write(self, record: dict[str, Any]) -> None:
        if self._file.tell() > _MAX_RECORDS_SIZE:
            return  # `Ending.finish` says so
        self._file.write(json.dumps(record, default=str).encode() + b"\n")


def end_run(machine: RunnerMachine, files: list[Path], course: Course, *, width: int) -> Ended:
    """Give the last machine the records in ``files``; return what it said.

    Args:
        machine: The machine.
        files: The records.
        course: How the run has gone.
        width: Columns of the terminal.

    Raises:
        MachineError: The machine failed.
    """
    try:
        session = RunnerSession(machine.link)
        data = session.end_run(_pieces(files), _TIMEOUT, width=width, **asdict(course))
        said = machine.redactor.tree(checks.Records().read(data.strip()))
        return _ended(checks.mapping(said, "answer"))
    except TimeoutError:
        raise MachineError(f"the last machine did not end the run within {_TIMEOUT:g} s") from None


def _ended(record: dict[str, Any]) -> Ended:
    return Ended(
        checks.integer(record.get("status"), "exit status", 0, 255),
        checks.text(record.get("loop"), "output"),
        checks.text(record.get("finish"), "output"),
        checks.text(record.get("summary"), "summary"),
        checks.paths(record.get("written")),
        tuple(
            checks.mapping(each, "coverage") for each in checks.array(record.get("coverage", []), "list", 1)
        ),
    )


def _pieces(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                yield piece


class Ending:
    """The plug-in that ends a run: it keeps the records, and after the last test starts the last machine.

    Args:
        config: pytest's configuration.
        last: Returns the last machine, as a context manager that ends it.
        whole: Whether that machine has run all tests, and needs no records of them.
        write_back: Brings back the reports that the last machine writes.
        coverage: Takes what the last machine executes; ``None`` if coverage does not measure this process.
    """

    def __init__(
        self,
        config: pytest.Config,
        last: Callable[[], AbstractContextManager[RunnerMachine]],
        write_back: WriteBack,
        *,
        whole: bool,
        coverage: MachineCoverage | None = None,
    ) -> None:
        self._whole = whole
        self._coverage = coverage
        self._write_back = write_back
        self._config = config
        self._last = last
        self._is_worker = hasattr(config, "workerinput")  # of pytest-xdist: its controller ends the run
        workerinput = getattr(config, "workerinput", {})
        given = workerinput.get("microvm_records")
        self._own = None if given else tempfile.TemporaryDirectory(prefix="pytest-microvm-run-")
        self._folder = Path(given or (self._own.name if self._own else ""))
        self.records = RunRecords(self._folder / f"records-{workerinput.get('workerid', '')}")
        self._errors = 0
        self._ended: Ended | None = None

    def add_test(self, item: Any, ran: Ran) -> None:
        """Keep a test's reports for the last machine."""
        if not self._whole:
            self.records.add_test(item, ran)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a pytest-xdist worker where the records belong."""
        node.workerinput["microvm_records"] = str(self._folder)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """After the last test, let plug-ins and the project's hooks say what they say, in a machine."""
        try:
            return (yield)
        finally:
            error = sys.exc_info()[1]
            by_user = type(error) is KeyboardInterrupt  # pytest and pytest-xdist raise subclasses of it
            if not by_user and not isinstance(error, pytest.exit.Exception):
                self._end_run(session, interrupted=isinstance(error, KeyboardInterrupt))

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count the errors in the collection."""
        self._errors += report.failed

    def end_stopped(self, session: pytest.Session) -> None:
        """End a run whose collection was stopped by ``-x`` or ``--maxfail``: there is no test loop."""
        self._end_run(session, errors=self._errors)

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Complete the records; show what was said, and take the last machine's exit status."""
        self.records.close()  # the controller of pytest-xdist reads them
        if self._ended is None:
            return
        self._show(self._ended.finish)
        if exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
            session.exitstatus = self._ended.status

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show what plug-ins said in the summary."""
        if self._ended is None:
            return
        terminalreporter.write(self._ended.summary)
        terminalreporter.ensure_newline()

    def pytest_unconfigure(self) -> None:
        """Remove the records, unless another process needs them."""
        self.records.close()
        if self._own is not None:
            self._own.cleanup()

    def _end_run(
        self, session: pytest.Session, *, interrupted: bool = False, errors: int | None = None
    ) -> None:
        if self._is_worker:
            return
        stopped = str(session.shouldfail or "")
        try:
            self.finish(Course(session.testscollected, interrupted, stopped, errors))
        except MicroVMError as error:
            session.testsfailed += 1  # what a plug-in checks at the end has not been checked
            self._show(
                f"\nERROR: the end of the run failed in its machine: {sanitize(str(error))}\n", red=True
            )
            return
        assert self._ended is not None
        self._show(self._ended.loop)

    def finish(self, course: Course) -> None:
        """Give the last machine everything, and keep what it says and the reports that it writes.

        Args:
            course: How the run has gone.

        Raises:
            HostError: A report cannot be written.
            MachineError: The machine failed.
        """
        self.records.close()
        files = sorted(self._folder.iterdir())
        if any(file.stat().st_size > _MAX_RECORDS_SIZE for file in files):
            raise MachineError(
                f"the reports of this run take more than {_MAX_RECORDS_SIZE // 1024**3} GiB",
                resolution="run fewer tests at once, or let them print less",
            )
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        width = _WIDTH if terminal is None else terminal._tw.fullwidth  # noqa: SLF001 - pytest has no other way
        with self._last() as machine:
            self._write_back.give(machine, last=True)
            self._ended = end_run(machine, files, course, width=width)
            self._write_back.take(machine, self._ended.written, last=True)
        if self._coverage is not None:
            for record in self._ended.executed:
                self._coverage.add(record)

    def _show(self, text: str, **markup: bool) -> None:
        """Write to pytest's terminal, or to stdout if its plug-in is switched off."""
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None:
            sys.stdout.write(text)
        else:
            terminal.write(text, **markup)
