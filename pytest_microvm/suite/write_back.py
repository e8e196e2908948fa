"""Files that tests write in the workspace: the wanted ones come back, the others are counted and named."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

from pytest_microvm.errors import HostError, TransferError
from pytest_microvm.mounts.merging import TakeOver, is_below
from pytest_microvm.suite.backend import RunnerMachine
from pytest_microvm.suite.written_options import WantedFiles
from pytest_microvm.untrusted.manifest import Entry, Manifest, is_git, look
from pytest_microvm.untrusted.nofollow import folder_below, open_folder, refuse_links
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

REPORTS_AT_THE_END = ("/.coverage", "/coverage.xml", "/coverage.json", "/coverage.lcov", "/htmlcov/")
"""Patterns of the reports of coverage that come back from the last machine."""

EXAMPLES = ".hypothesis/examples"
"""The folder of hypothesis's database, as of its version 6."""

_EXAMPLE = re.compile(r"\.hypothesis/examples/[0-9a-f]{1,96}/[0-9a-f]{1,96}")
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
_MAX_FILES = 10_000  # from one machine at once
_MAX_TOLD = 1000
_MAX_PATH = 4096
_SHOWN = 5
_CHANGED_MEANWHILE = Entry("other")  # what nothing on the host equals: a conflict
_KEY = "microvm_write_back"


class WriteBack:
    """The plug-in that brings files back from machines, each as soon as its machine's tests have ended.

    A file that comes back is also given to the machines after it, so that tests that update the same file
    one after another find it as natively.

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
        self._started = time.time_ns()
        self._known: dict[str, Entry | None] = {}  # what machines get and have changed, by path
        self._kept: dict[str, None] = {}
        self._gone: dict[str, None] = {}
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
            self._push(machine, EXAMPLES)
        for path, entry in self._known.items():
            if self.has_examples and entry is not None and _EXAMPLE.fullmatch(path):
                continue
            if entry is None:
                machine.remove(PurePosixPath(self._top / path))
            else:
                self._push(machine, path)
        for path in self._wanted.appended if last else ():
            if (self._top / path).exists():
                self._push(machine, path)

    def _push(self, machine: RunnerMachine, path: str) -> None:
        refuse_links(self._top, self._top / path)
        try:
            machine.push(self._top / path, PurePosixPath(self._top / path))
        except OSError as error:
            raise HostError(f"{self._top / path} cannot be read: {error.strerror or error}") from error

    def take(self, machine: RunnerMachine, changed: Sequence[str], *, last: bool = False) -> None:
        """Bring back the wanted files among those that changed in a machine; note the others.

        Args:
            machine: The machine; it still runs.
            changed: Paths relative to the workspace, as the machine says; NUL ends one that was removed.
            last: Whether it is the last machine, which writes the reports.

        Raises:
            MachineError: A file cannot be transferred.
            HostError: The workspace cannot be written to.
        """
        wanted = []
        for told in changed[:_MAX_PATHS]:
            path = told.removesuffix("\0")
            if _is_usable(path) and self._is_wanted(path, last=last):
                wanted.append(path)
            elif path == told and len(self._gone) < _MAX_PATHS and not self._unmentioned.match_file(path):
                self._gone[sanitize_line(path)] = None
        for path in wanted[_MAX_FILES:]:
            self._tell(f"{path}: more than {_MAX_FILES} files from one machine")
        if wanted:
            self._bring_back(machine, wanted[:_MAX_FILES])

    def _bring_back(self, machine: RunnerMachine, paths: list[str]) -> None:
        try:
            with tempfile.TemporaryDirectory(dir=self._staging_parent(), prefix=".microvm-") as name:
                staging = Path(name).resolve()
                content, spare = staging / "content", staging / "spare"
                content.mkdir()
                spare.mkdir()
                received = [path for path in paths if self._receive(machine, path, content)]
                self._merge(content, spare, received, f".microvm-{machine.facts.id}")
        except OSError as error:
            raise HostError(
                f"files of the tests cannot be written to {self._top}: {error.strerror or error}",
                resolution="make room, or allow this user to write there",
            ) from error

    def _staging_parent(self) -> Path:
        """Return a folder on the workspace's file system, if possible not the workspace itself."""
        parent = self._top.resolve().parent
        same = parent.stat().st_dev == self._top.stat().st_dev and os.access(parent, os.W_OK | os.X_OK)
        return parent if same else self._top

    def _receive(self, machine: RunnerMachine, path: str, content: Path) -> bool:
        """Receive a file into staging; return False if the machine has something else there."""
        target = content / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            machine.pull(PurePosixPath(self._top / path), target)
        except FileNotFoundError:  # it was removed
            return True
        except TransferError as error:
            self._tell(f"{path}: {error.brief}")
            return False
        return True

    def _tell(self, line: str) -> None:
        if len(self._told) < _MAX_TOLD:
            self._told.append(sanitize_line(line))

    def _merge(self, content: Path, spare: Path, paths: list[str], suffix: str) -> None:
        root, staged, empty = (open_folder(folder) for folder in (self._top.resolve(), content, spare))
        try:
            before, after = self._before(root, paths), _entries(staged, paths)
            result = TakeOver(root, staged, empty, suffix).run(before, after, {})
            if any(_EXAMPLE.fullmatch(path) for path in result.created):
                _hide_examples(root)
        finally:
            for folder in (root, staged, empty):
                os.close(folder)
        missed = {conflict.path for conflict in result.conflicts}
        for conflict in result.conflicts:
            saved = "" if conflict.saved is None else f"; the machine's version: {conflict.saved}"
            self._tell(f"{conflict.path}: {conflict.why}{saved}")
        for path in paths:
            if not is_below(path, missed):
                self._known[path] = after.get(path)
        for path in [*result.created, *result.changed, *result.deleted]:
            if path in self._known:
                self._kept[path] = None

    def _before(self, root: int, paths: list[str]) -> Manifest:
        """Return the entries that the machine has changed, as far as the host had them when the run began."""
        before = _entries(root, paths)
        for path in paths:
            if path in self._known:
                known = self._known[path]
                before.pop(path, None)
                if known is not None:
                    before[path] = known
            elif path in before and self._is_new(root, path):
                before[path] = _CHANGED_MEANWHILE
        return before

    def _is_new(self, root: int, path: str) -> bool:
        *above, name = path.split("/")
        with folder_below(root, above) as folder:
            if folder is None:
                return False
            return os.stat(name, dir_fd=folder, follow_symlinks=False).st_ctime_ns > self._started

    def _is_wanted(self, path: str, *, last: bool) -> bool:
        if self.has_examples and _EXAMPLE.fullmatch(path):
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
    def _unmentioned(self) -> GitIgnoreSpec:
        return _spec(_UNMENTIONED)

    # Hooks of pytest: workers tell their controller

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """As a worker of pytest-xdist, send what there is to say to the controller."""
        try:
            return (yield)
        finally:
            if hasattr(self._config, "workeroutput"):
                known = [path for path, entry in self._known.items() if entry is not None]
                said = {"known": known, "kept": [*self._kept], "gone": [*self._gone], "told": self._told}
                self._config.workeroutput[_KEY] = said

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """As the controller, take what a worker says."""
        said = getattr(node, "workeroutput", {}).get(_KEY)
        if said is None:
            return
        root = open_folder(self._top.resolve())
        try:
            self._known.update(_entries(root, said["known"]))
        finally:
            os.close(root)
        self._kept.update(dict.fromkeys(said["kept"]))
        self._gone.update(dict.fromkeys(said["gone"]))
        self._told += said["told"]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show which files came back, which did not, and which are gone."""
        shown = [path for path in self._kept if not _EXAMPLE.fullmatch(path)]
        kept = [path for path in shown if os.path.lexists(self._top / path)]
        if kept:
            terminalreporter.write_line(f"microvm: written by tests: {_names(kept)}")
        for line in self._told:
            terminalreporter.write_line(f"microvm: not written: {line}", yellow=True)
        gone = [path for path in self._gone if path not in self._kept]
        if gone:
            terminalreporter.write_line(
                f"microvm: written by tests and gone with their machines: {_names(gone)}; "
                "--microvm-write-back=PATTERN keeps them"
            )


def _hide_examples(root: int) -> None:
    """Let git ignore the folder of hypothesis, as hypothesis does when it makes it."""
    with folder_below(root, [EXAMPLES.partition("/")[0]]) as folder, contextlib.suppress(FileExistsError):
        if folder is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            file = os.open(".gitignore", flags, 0o644, dir_fd=folder)
            try:
                os.write(file, b"*\n")
            finally:
                os.close(file)


def _spec(patterns: Iterable[str]) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec  # noqa: PLC0415 - only if tests write files

    return GitIgnoreSpec.from_lines(patterns)


def _entries(root: int, paths: Iterable[str]) -> Manifest:
    """Return the entries of ``paths`` and of the folders above them, as far as they exist below ``root``."""
    found: Manifest = {}
    for path in paths:
        *above, name = path.split("/")
        for depth in range(len(above)):
            with folder_below(root, above[:depth]) as parent:
                entry = None if parent is None else look(parent, above[depth])
            if entry is not None and entry.kind == "folder":
                found["/".join(above[: depth + 1])] = entry
        with folder_below(root, above) as parent:
            entry = None if parent is None else look(parent, name)
        if entry is not None:
            found[path] = entry
    return found


def _is_usable(path: str) -> bool:
    """Return True if a machine's path is one below the workspace, and none of git's own."""
    return (
        path.isprintable()
        and len(path) <= _MAX_PATH
        and {"", ".", ".."}.isdisjoint(path.split("/"))
        and not is_git(path)
    )


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
