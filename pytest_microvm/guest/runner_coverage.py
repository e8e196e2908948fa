"""What a machine's tests executed, as JSON, without a database.

By pytest-xdist's contract, pytest-cov ends its worker's session and sends it a serialized database. With one
machine per test, a database per test would be written, compressed, sent, loaded and combined. Instead, a
machine records only what its tests executed, the last machine merges these records, and pytest-cov gets one
database, as if one worker had run all tests. ``runner_measuring.py`` records in the same way for
``coverage run``.
"""

from __future__ import annotations

import base64
import os
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    import pytest

PLUGIN = "_cov"  # the name under which pytest-cov registers its plug-in
MAX_FILE = 16 * 1024**2
"""Bytes of a child process's data file; larger ones are left out."""


def recorder_of(config: pytest.Config) -> CoverageRecorder | None:
    """Return a recorder for pytest-cov's measurement; ``None`` if it measures nothing or is unknown."""
    controller = getattr(config.pluginmanager.getplugin(PLUGIN), "cov_controller", None)
    measuring = getattr(controller, "cov", None)
    collector = getattr(measuring, "_collector", None)
    if not (hasattr(collector, "covdata") and hasattr(collector, "flush_data")):
        return None
    recorder = CoverageRecorder(measuring, collector)
    recorder.decide_early()
    return recorder


class CoverageRecorder:
    """The place to which coverage's collector flushes its data, instead of :class:`coverage.CoverageData`.

    Args:
        measuring: The started :class:`coverage.Coverage`.
        collector: Its collector.
    """

    def __init__(self, measuring: Any, collector: Any) -> None:
        folder, self._prefix = os.path.split(os.path.abspath(measuring.config.data_file))
        self._folder = folder
        self._collector = collector
        self._context = collector.static_context or ""
        self._found: dict[tuple[str, str, str], set[Any]] = {}
        self._tracers: dict[str, str] = {}
        self._files = set(self._data_files())
        self._inorout = getattr(measuring, "_inorout", None)
        self._walked: set[str] = set()
        collector.covdata = self

    def decide_early(self) -> list[str]:
        """Decide about all loaded files now whether they are measured; else each machine decides again.

        coverage asks the frame that enters a file for its module's name, by which ``--cov=PACKAGE`` chooses.

        Returns:
            The names of the modules that are measured and that it has not decided about before.
        """
        decisions: Any = getattr(self._collector, "should_trace_cache", {})
        measured = []
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and file.endswith(".py") and file not in decisions:
                entering = SimpleNamespace(f_globals=vars(module))
                decisions[file] = self._collector.should_trace(file, entering)
                if decisions[file].trace:
                    measured.append(name)
        return measured

    def measures(self, name: str, file: str) -> bool:
        """Return True if a module of that name and file would be measured."""
        entering = SimpleNamespace(f_globals={"__name__": name, "__file__": file})
        return bool(self._collector.should_trace(file, entering).trace)

    # Called by the collector

    def set_context(self, context: str | None) -> str:
        """Record under another context from now on; return the one before, as of coverage 7.16."""
        before, self._context = self._context, context or ""
        return before

    def add_lines(self, executed: Mapping[str, Collection[int]]) -> None:
        """Record executed lines by file."""
        self._add("lines", executed)

    def add_arcs(self, executed: Mapping[str, Collection[tuple[int, int]]]) -> None:
        """Record executed branches, as pairs of lines, by file."""
        self._add("arcs", executed)

    def add_file_tracers(self, tracers: Mapping[str, str]) -> None:
        """Record which of coverage's plug-ins traces a file."""
        self._tracers.update(tracers)

    def _add(self, kind: str, executed: Mapping[str, Collection[Any]]) -> None:
        for file, places in executed.items():
            self._found.setdefault((self._context, kind, file), set()).update(places)

    # Called by the runner

    def take(self) -> dict[str, Any]:
        """Return as JSON what was executed since the last call, and the data files of child processes."""
        taken = self.take_own()
        taken["files"] = [content for path in self.new_files() if (content := _read(path)) is not None]
        return taken

    def take_own(self) -> dict[str, Any]:
        """Return as JSON what this process has executed since the last call."""
        self._collector.flush_data()
        found, self._found = self._found, {}
        return {
            "found": [[*key, text_of(places)] for key, places in found.items()],
            "tracers": self._tracers,
            "touched": dict(self._touched()),
        }

    def new_files(self) -> list[str]:
        """Return the paths of data files that child processes have written since the last call."""
        new = [name for name in self._data_files() if name not in self._files]
        self._files.update(new)
        return [os.path.join(self._folder, name) for name in new]

    def unseen(self) -> list[str]:
        """Return the packages that are to be measured, and that nothing has imported."""
        unmatched = getattr(self._inorout, "source_pkgs_unmatched", ())
        return [name for name in unmatched if name not in sys.modules]

    def _touched(self) -> Iterator[tuple[str, str]]:
        """Yield the files of packages that were imported since the last call, each with its tracer.

        coverage reports a package's files that nothing executed, if the package itself was imported.
        """
        packages = {name for name in getattr(self._inorout, "source_pkgs", ()) if name in sys.modules}
        if not packages <= self._walked:
            self._walked |= packages
            for file, tracer in self._inorout.find_possibly_unexecuted_files():  # type: ignore[union-attr]
                yield self._collector.file_mapper(file), tracer or ""

    def _data_files(self) -> list[str]:
        try:
            names = os.listdir(self._folder)
        except OSError:
            return []
        return [name for name in names if name.startswith(self._prefix + ".")]


def _read(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError:
        return None
    return base64.b64encode(data).decode() if len(data) <= MAX_FILE else None


class MergedCoverage:
    """What all machines' tests executed."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], set[str]] = {}
        self._tracers: dict[str, str] = {}
        self._touched: dict[str, str] = {}
        self._files: list[bytes] = []

    def add(self, taken: dict[str, Any]) -> None:
        """Add what :meth:`CoverageRecorder.take` returned in a machine."""
        for context, kind, file, places in taken["found"]:
            self._found.setdefault((context, kind, file), set()).add(places)
        self._tracers.update(taken["tracers"])
        self._touched.update(taken["touched"])
        self._files += [base64.b64decode(content) for content in taken["files"]]

    def as_worker_output(self, controller: Any) -> dict[str, Any]:
        """Return what pytest-cov's worker would send, and write the data files of child processes.

        Args:
            controller: pytest-cov's controller in this process.
        """
        from coverage import CoverageData  # noqa: PLC0415 - only installed where coverage is measured

        data = CoverageData(no_disk=True)
        for (context, kind, file), texts in self._found.items():
            data.set_context(context)
            numbers = {number for text in texts for number in _numbers(kind, text)}
            (data.add_lines if kind == "lines" else data.add_arcs)({file: numbers})
        data.add_file_tracers(self._tracers)
        if self._found:  # else it is undecided whether this is data of lines or of branches
            for file, tracer in self._touched.items():
                data.touch_file(file, tracer)
        path = os.path.abspath(controller.cov.config.data_file)
        for number, content in enumerate(self._files):
            with open(f"{path}.machines.{number}", "wb") as written:
                written.write(content)
        return {
            "cov_worker_path": controller.topdir,
            "cov_worker_node_id": "machines",
            "cov_worker_data": data.dumps(),
        }


def text_of(places: Iterable[Any]) -> str:
    """Return lines or pairs of lines as one text: a record then takes the host few values to check."""
    flat = (n for place in sorted(places) for n in (place if isinstance(place, tuple) else (place,)))
    return " ".join(map(str, flat))


def _numbers(kind: str, text: str) -> list[Any]:
    numbers = [int(number) for number in text.split()]
    return numbers if kind == "lines" else list(zip(numbers[::2], numbers[1::2]))  # noqa: B905 - Python 3.8
