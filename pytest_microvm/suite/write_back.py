"""Files that tests write: the wanted ones come back, the others in the workspace are counted and named."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

from pytest_microvm.suite.backend import RunnerMachine
from pytest_microvm.suite.merged_files import EXAMPLE, EXAMPLES, MergedFiles, is_usable
from pytest_microvm.suite.written_options import WantedFiles
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

REPORTS_AT_THE_END = ("/.coverage", "/coverage.xml", "/coverage.json", "/coverage.lcov", "/htmlcov/")
"""Patterns of the reports of coverage that come back from the last machine."""

_UNMENTIONED = (".coverage*", "*.pyc", ".hypothesis/", ".mypy_cache/", ".ruff_cache/")
_DATA = frozenset(
    [
        "xml",
        "json",
        "jsonl",
        "html",
        "htm",
        "css",
        "js",
        "lcov",
        "md",
        "txt",
        "log",
        "csv",
        "png",
        "svg",
        "db",
    ]
)
_MAX_PATHS = 100_000
_SHOWN = 5
_KEY = "microvm_write_back"


class WriteBack:
    """The plug-in that brings files back from machines, each as soon as its machine's tests have ended.

    A file of the workspace that comes back is also given to the machines after it, so that tests that update
    the same file one after another find it as natively.

    Args:
        config: pytest's configuration.
        top: The workspace.
        wanted: The files to bring back.

    Attributes:
        has_examples: Whether there are tests of hypothesis, which keeps failing examples in files.
    """

    def __init__(self, config: pytest.Config, top: Path, wanted: WantedFiles) -> None:
        self.has_examples = False
        self._config = config
        self._top = top
        self._wanted = wanted
        self._files = MergedFiles(top)
        self._outside = [
            (place, MergedFiles(place.folder, f"{place.folder}/", make=True)) for place in wanted.outside
        ]
        self._gone: dict[str, None] = {}
        self._kept: dict[str, None] = {}  # by other processes
        self._told: list[str] = []

    @property
    def finishing(self) -> bool:
        """True if each machine has to finish its pytest session: plug-ins may write files then."""
        return self._wanted.while_running

    # Called by what runs tests

    def give(self, machine: RunnerMachine, *, last: bool = False) -> None:
        """Give a new machine the files that came back from those before it.

        Args:
            machine: The machine.
            last: Whether it is the last machine, which may add to files of the host.

        Raises:
            MachineError: It cannot take them.
            HostError: A file cannot be read any more.
        """
        if self.has_examples and (self._top / EXAMPLES).is_dir():
            self._files.push(machine, EXAMPLES)
        for path, entry in self._files.known.items():
            if self.has_examples and entry is not None and EXAMPLE.fullmatch(path):
                continue
            if entry is None:
                machine.remove(PurePosixPath(self._top / path))
            else:
                self._files.push(machine, path)
        for path in self._wanted.appended if last else ():
            if (self._top / path).exists():
                self._files.push(machine, path)

    def take(self, machine: RunnerMachine, changed: Sequence[str], *, last: bool = False) -> None:
        """Bring back the wanted files among those that changed in a machine; note the others.

        Args:
            machine: The machine; it still runs.
            changed: Paths as the machine says, relative to the workspace, or absolute outside it; NUL ends
                one that was removed.
            last: Whether it is the last machine, which writes the reports.

        Raises:
            MachineError: A file cannot be transferred.
            HostError: A folder cannot be written to.
        """
        wanted, outside = [], []
        for told in changed[:_MAX_PATHS]:
            path = told.removesuffix("\0")
            if any(place.holds(path) for place, _ in self._outside):
                outside.append(path)
            elif is_usable(path) and self._is_wanted(path, last=last):
                wanted.append(path)
            elif path == told and len(self._gone) < _MAX_PATHS and not self._unmentioned.match_file(path):
                self._gone[sanitize_line(path)] = None
        self._files.bring_back(machine, wanted)
        for place, files in self._outside:
            if place.early or last:
                names = [path.removeprefix(f"{place.folder}/") for path in outside if place.holds(path)]
                files.bring_back(machine, [name for name in names if is_usable(name)])

    def _is_wanted(self, path: str, *, last: bool) -> bool:
        if self._temporary.match_file(path):
            return False
        if self.has_examples and EXAMPLE.fullmatch(path):
            return True
        if self._by_user.match_file(path) or (last and self._at_the_end.match_file(path)):
            return True
        return _is_data(path) and self._by_project.match_file(path)

    @cached_property
    def _by_user(self) -> GitIgnoreSpec:
        return _spec(self._wanted.by_user)

    @cached_property
    def _by_project(self) -> GitIgnoreSpec:
        return _spec(self._wanted.by_project)

    @cached_property
    def _at_the_end(self) -> GitIgnoreSpec:
        return _spec(REPORTS_AT_THE_END)

    @cached_property
    def _temporary(self) -> GitIgnoreSpec:
        return _spec(self._wanted.temporary)

    @cached_property
    def _unmentioned(self) -> GitIgnoreSpec:
        return _spec([*_UNMENTIONED, *self._wanted.temporary])

    # Hooks of pytest: workers tell their controller

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """As a worker of pytest-xdist, send what there is to say to the controller."""
        try:
            return (yield)
        finally:
            if hasattr(self._config, "workeroutput"):
                known = [path for path, entry in self._files.known.items() if entry is not None]
                kept, told = self._came()
                said = {"known": known, "kept": kept, "gone": [*self._gone], "told": told}
                self._config.workeroutput[_KEY] = said

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """As the controller, take what a worker says."""
        said = getattr(node, "workeroutput", {}).get(_KEY)
        if said is None:
            return
        self._files.learn(said["known"])
        self._kept.update(dict.fromkeys(said["kept"]))
        self._gone.update(dict.fromkeys(said["gone"]))
        self._told += said["told"]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show which files came back, which did not, and which are gone."""
        kept, told = self._came()
        shown = [path for path in kept if not EXAMPLE.fullmatch(path) and os.path.lexists(self._top / path)]
        if shown:
            terminalreporter.write_line(f"microvm: written by tests: {_names(shown)}")
        for line in told:
            terminalreporter.write_line(f"microvm: not written: {line}", yellow=True)
        gone = [path for path in self._gone if path not in kept]
        if gone:
            terminalreporter.write_line(
                f"microvm: written by tests and gone with their machines: {_names(gone)}; "
                "--microvm-write-back=PATTERN keeps them"
            )

    def _came(self) -> tuple[list[str], list[str]]:
        """Return the files that came, and lines about those that did not."""
        kept, told = dict(self._kept), list(self._told)
        for files in (self._files, *(files for _, files in self._outside)):
            kept.update(files.kept)
            told += files.told
        return [*kept], told


def _spec(patterns: Iterable[str]) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec  # noqa: PLC0415 - only if tests write files

    return GitIgnoreSpec.from_lines(patterns)


def _is_data(path: str) -> bool:
    """Return True if no program would take a file for its configuration or code, by its name."""
    *above, name = path.split("/")
    hidden = any(folder.startswith(".") and folder != ".benchmarks" for folder in above)
    return not hidden and name.rpartition(".")[2] in _DATA and not name.startswith(".")


def _names(paths: Iterable[str]) -> str:
    """Return the number of files and the first names, safe to show."""
    names = [sanitize_line(path) for path in paths]
    count = f"{len(names)} file" + ("" if len(names) == 1 else "s")
    return f"{count} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
