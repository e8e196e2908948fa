"""Measure a machine's pytest session as ``coverage run`` on the host measures that process.

The host sends the settings of its :class:`coverage.Coverage`. A machine starts one with the same settings
before pytest loads any code of the project, records as for pytest-cov, and sends what was executed after
collection, after each test and at the end of the session. The host adds that to its own data.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import Any

from pytest_microvm.guest.runner_coverage import MAX_FILE, CoverageRecorder, text_of

_OWN_CODE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_NAMED = 20  # modules


def start_measuring(settings: dict[str, Any]) -> Measurement:
    """Start to measure this process.

    Args:
        settings: ``options`` of coverage by name, and ``config_file``, if the workspace has it.
    """
    os.environ["COVERAGE_RUN"] = "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the host has shown them
            recorder = _recorder(settings)
    except Exception as error:  # noqa: BLE001 - coverage's plug-ins are the project's code
        return Measurement(None, [f"machines measure nothing: {type(error).__name__}: {error}"])
    late = [name for name in recorder.decide_early() if name != "__main__"]
    named = ", ".join(late[:_NAMED]) + (", ..." if len(late) > _NAMED else "")
    return Measurement(recorder, [f"loaded in machines before they measure: {named}"] if late else [])


def _recorder(settings: dict[str, Any]) -> CoverageRecorder:
    import coverage  # noqa: PLC0415 - only installed where coverage is measured

    file = settings["config_file"]
    measuring = coverage.Coverage(data_file=settings["options"]["run:data_file"], config_file=file or False)
    for name, value in settings["options"].items():
        with contextlib.suppress(coverage.CoverageException):  # another version has other options
            measuring.set_option(name, value)
    measuring.set_option("run:debug", [])
    omitted: Any = measuring.get_option("run:omit") or []
    measuring.set_option("run:omit", [*omitted, os.path.join(_OWN_CODE, "*")])
    measuring.start()
    return CoverageRecorder(measuring, measuring._collector)


class Measurement:
    """A measurement of this process that has started.

    Args:
        recorder: What records; ``None`` if nothing is measured.
        told: Lines for the user.
    """

    def __init__(self, recorder: CoverageRecorder | None, told: list[str]) -> None:
        self._recorder = recorder
        self._told = told

    def measures(self, name: str, file: str) -> bool:
        """Return True if a module of that name and file is measured when it is loaded."""
        return self._recorder is not None and self._recorder.measures(name, file)

    def settle(self) -> None:
        """Decide about all loaded files before the machine is copied; else each copy does it again."""
        if self._recorder is not None:
            self._recorder.decide_early()

    def take(self) -> dict[str, Any]:
        """Return what was executed since the last call, as a record for the host."""
        told, self._told = self._told, []
        record: dict[str, Any] = {"k": "coverage", "told": told}
        if self._recorder is not None:
            try:
                record.update(self._recorder.take_own(), unseen=self._recorder.unseen())
                record["children"] = [
                    found for path in self._recorder.new_files() if (found := _contents(path)) is not None
                ]
            except Exception as error:  # noqa: BLE001 - a test may have replaced what coverage needs
                told.append(f"what a machine executed is missing: {type(error).__name__}: {error}")
        return record


def _contents(path: str) -> dict[str, Any] | None:
    """Return a child process's data file as JSON; ``None`` if it is none, or too large."""
    import coverage  # noqa: PLC0415 - it has been imported

    try:
        if os.path.getsize(path) > MAX_FILE:
            return None
        data = coverage.CoverageData(path)
        data.read()
        found = _found_in(data)
        data.close()
    except (OSError, coverage.CoverageException):
        return None
    return found


def _found_in(data: Any) -> dict[str, Any]:
    kind = "arcs" if data.has_arcs() else "lines"
    files = sorted(data.measured_files())
    found = []
    for context in sorted(data.measured_contexts()):
        data.set_query_context(context)
        for file in files:
            places = data.arcs(file) if kind == "arcs" else data.lines(file)
            if places:
                found.append([context, kind, file, text_of(places)])
    tracers = {file: data.file_tracer(file) or "" for file in files}
    return {"found": found, "tracers": {f: t for f, t in tracers.items() if t}, "touched": tracers}
