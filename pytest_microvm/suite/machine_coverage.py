"""``coverage run -m pytest --microvm``: what machines execute is added to the data of that coverage.

Machines measure with its settings and send JSON, which is checked and kept in data of its own. At the end of
the run it is added through coverage's own interface. Nothing that a machine sends is a database or code.
"""

from __future__ import annotations

import sqlite3
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_microvm.suite import checks
from pytest_microvm.suite.executed import Executed, MeasuredFiles, parse_executed
from pytest_microvm.suite.measuring import machine_settings, measures_workers, measuring_coverage
from pytest_microvm.untrusted.text import sanitize, sanitize_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    import coverage

_MAX_SIZE = 4 * 1024**3  # bytes of a run's data, as an upper bound
_MAX_CHILDREN = 10_000
_MAX_TOLD = 100
_SHOWN = 3
_KEY = "microvm_coverage"
_TRACERS = "plugins.file_tracers"


def machine_coverage(config: pytest.Config, workspace: Path, *, workers: bool) -> MachineCoverage | None:
    """Return the plug-in for a run that coverage measures; ``None`` if machines need not measure.

    Args:
        config: pytest's configuration.
        workspace: The top of the tree that machines get a copy of.
        workers: Whether this is the controller of workers of pytest-xdist.
    """
    measuring = measuring_coverage()
    if measuring is None or (workers and not measures_workers(measuring)):
        return None
    return MachineCoverage(config, measuring, workspace)


class MachineCoverage:
    """The plug-in that adds what machines execute to the data of the coverage that measures this process.

    Args:
        config: pytest's configuration.
        measuring: That coverage.
        workspace: The top of the tree that machines get a copy of.

    Attributes:
        settings: What a machine needs to measure in the same way, as JSON.
    """

    def __init__(self, config: pytest.Config, measuring: coverage.Coverage, workspace: Path) -> None:
        directory = config.invocation_params.dir
        self.settings, told = machine_settings(measuring, workspace, directory)
        self._config = config
        self._measuring = measuring
        self._files = MeasuredFiles(workspace, directory)
        self._folder = tempfile.TemporaryDirectory(prefix="pytest-microvm-coverage-")
        self._kept: dict[tuple[str, str], KeptCoverage] = {}
        self._told = dict.fromkeys(told)
        self._unseen: set[str] | None = None
        self._failed = 0  # tests whose machine failed
        self._error = ""
        self._size = 0
        self._tracers: frozenset[str] | None = None
        measuring._warn_unimported_source = False  # noqa: SLF001 - as pytest-cov does

    def add(self, record: dict[str, Any]) -> None:
        """Add what a machine has executed.

        Args:
            record: See ``guest/runner_measuring.py``.

        Raises:
            ProtocolViolation: It is malformed.
        """
        for told in checks.array(record.get("told"), "list of messages", _MAX_TOLD):
            self._tell(checks.line(told, "message"))
        if "found" not in record:
            return
        kind = "arcs" if self.settings["options"].get("run:branch") else "lines"
        own = self._parsed(record)
        if any(places.kind != kind for places in own.places):
            raise checks.violation("coverage of another kind than it was asked for")
        children = checks.array(record.get("children", []), "list of processes", _MAX_CHILDREN)
        parsed = [self._parsed(checks.mapping(child, "process")) for child in children]
        names = checks.array(record.get("unseen", []), "list of packages")
        unseen = {checks.line(name, "package") for name in names}
        self._unseen = unseen if self._unseen is None else self._unseen & unseen
        self._keep("own", kind, own)
        for child in parsed:
            for each in sorted({places.kind for places in child.places}):
                self._keep("child", each, child)

    def _parsed(self, record: dict[str, Any]) -> Executed:
        if self._tracers is None and record.get("tracers"):
            known = dict(self._measuring.sys_info()).get(_TRACERS, ())
            self._tracers = frozenset(map(str, known))
        return parse_executed(record, self._files, self._tracers or frozenset())

    def _keep(self, whose: str, kind: str, executed: Executed) -> None:
        self._size += sum(places.size for places in executed.places)
        if self._size > _MAX_SIZE:
            self._error = f"it takes more than {_MAX_SIZE // 1024**3} GiB"
        if self._error:
            return
        try:
            if (whose, kind) not in self._kept:
                self._kept[whose, kind] = KeptCoverage(Path(self._folder.name, f"{whose}-{kind}"), kind)
            self._kept[whose, kind].add(executed)
        except _errors() as error:
            self._error = str(error)

    def _tell(self, line: str) -> None:
        if len(self._told) < _MAX_TOLD:
            self._told[line] = None

    # Hooks of pytest

    def pytest_microvm_outcome(self, outcome: str) -> None:
        """Count the tests whose machine failed: what they executed is not known."""
        self._failed += outcome in ("crashed", "quota")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Add everything to coverage's data, which coverage saves when this process ends."""
        if not self._error:
            try:
                self._merge()
            except _errors() as error:
                self._error = str(error)
        if self._error and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput[_KEY] = [*self._lines()]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """As the controller of pytest-xdist, take what a worker says."""
        for line in getattr(node, "workeroutput", {}).get(_KEY, ()):
            self._tell(line)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show what the numbers lack."""
        for line in self._lines():
            terminalreporter.write_line(f"microvm: coverage: {line}")

    def pytest_unconfigure(self) -> None:
        """Remove the machines' data."""
        for kept in self._kept.values():
            kept.data.close()
        self._folder.cleanup()

    # Parts

    def _merge(self) -> None:
        import coverage  # noqa: PLC0415 - it has been imported

        own = [kept for (whose, _kind), kept in self._kept.items() if whose == "own"]
        children = [kept for (whose, _kind), kept in self._kept.items() if whose == "child"]
        for kept in own:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "No data was collected": not in this process
                data = self._measuring.get_data()
            data.update(kept.data)
        for kept in children:  # as natively, in files that `coverage combine` finds
            beside = coverage.CoverageData(self.settings["options"]["run:data_file"], suffix=True)
            beside.update(kept.data)
            beside.write()
            beside.close()

    def _lines(self) -> Iterator[str]:
        yield from self._told
        for name in sorted(self._unseen or ()):
            yield f"module {name} was never imported"
        if self._failed:
            tests = "1 test" if self._failed == 1 else f"{self._failed} tests"
            yield f"lacks what {tests} executed in machines that failed"
        if self._files.left_out:
            names = [sanitize_line(name) for name in self._files.left_out]
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            yield f"left out, as this computer does not have them in the project: {shown}"
        if self._error:
            yield f"ERROR: it could not be added: {sanitize(self._error)}"


class KeptCoverage:
    """What machines executed, in a file of coverage's format.

    Args:
        path: The file; it must not exist.
        kind: ``lines`` or ``arcs``.

    Attributes:
        data: The data.
    """

    def __init__(self, path: Path, kind: str) -> None:
        import coverage  # noqa: PLC0415 - it has been imported

        self.data = coverage.CoverageData(str(path))
        self._kind = kind
        self._add({})

    def add(self, executed: Executed) -> None:
        """Add the lines or branches that a process executed."""
        contexts: dict[str, dict[str, set[Any]]] = {}
        for places in executed.places:
            if places.kind == self._kind and places.text:
                files = contexts.setdefault(places.context, {})
                files.setdefault(places.file, set()).update(places.numbers())
        for context, files in contexts.items():
            self.data.set_context(context)
            self._add(files)
        self.data.add_file_tracers(executed.tracers)
        for file in executed.touched:
            self.data.touch_file(file)

    def _add(self, files: dict[str, set[Any]]) -> None:
        if self._kind == "lines":
            self.data.add_lines(files)
        else:
            self.data.add_arcs(files)


def _errors() -> tuple[type[Exception], ...]:
    """Return the errors of a data file that cannot be written, or does not fit."""
    import coverage  # noqa: PLC0415 - it has been imported

    return coverage.CoverageException, sqlite3.Error, OSError
