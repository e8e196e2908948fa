"""Files of machines that come into one folder of the host, merged with what is there."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from pytest_microvm.errors import HostError, TransferError
from pytest_microvm.mounts.merging import TakeOver, is_below
from pytest_microvm.suite.backend import RunnerMachine
from pytest_microvm.untrusted.manifest import Entry, Manifest, is_git, look
from pytest_microvm.untrusted.nofollow import folder_below, open_folder, refuse_links
from pytest_microvm.untrusted.text import sanitize_line

EXAMPLES = ".hypothesis/examples"
"""The folder of hypothesis's database, as of its version 6."""

EXAMPLE = re.compile(r"\.hypothesis/examples/[0-9a-f]{1,96}/[0-9a-f]{1,96}")
"""The path of a file of hypothesis's database."""

_MAX_FILES = 10_000  # from one machine at once
_MAX_TOLD = 1000
_MAX_PATH = 4096
_CHANGED_MEANWHILE = Entry("other")  # what nothing on the host equals: a conflict


class MergedFiles:
    """Files below one folder, which has the same path in the machines.

    Args:
        top: The folder.
        shown: The text in front of the paths of its files where users see them.
        make: Whether to make the folder when files come.

    Attributes:
        known: What machines have changed, by path; ``None``: they removed it.
        kept: The files that came, as users see them.
        told: What did not come, with the reason, safe to show.
    """

    def __init__(self, top: Path, shown: str = "", *, make: bool = False) -> None:
        self.known: dict[str, Entry | None] = {}
        self.kept: dict[str, None] = {}
        self.told: list[str] = []
        self._top = top
        self._shown = shown
        self._make = make
        self._started = time.time_ns()

    def push(self, machine: RunnerMachine, path: str) -> None:
        """Give a machine a file or folder, which a link of the folder must not replace.

        Raises:
            MachineError: It cannot take it.
            UsageError: A link is in the way.
            HostError: It cannot be read.
        """
        refuse_links(self._top, self._top / path)
        try:
            machine.push(self._top / path, PurePosixPath(self._top / path))
        except OSError as error:
            raise HostError(f"{self._top / path} cannot be read: {error.strerror or error}") from error

    def bring_back(self, machine: RunnerMachine, paths: Sequence[str]) -> None:
        """Bring files back from a machine, which still runs.

        Args:
            machine: The machine.
            paths: Usable paths, relative to the folder.

        Raises:
            MachineError: A file cannot be transferred.
            HostError: The folder cannot be written to.
        """
        for path in paths[_MAX_FILES:]:
            self.tell(path, f"more than {_MAX_FILES} files from one machine")
        paths = paths[:_MAX_FILES]
        if not paths:
            return
        try:
            if self._make:
                self._top.mkdir(parents=True, exist_ok=True)
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

    def learn(self, paths: Iterable[str]) -> None:
        """Notice files that came by way of another process."""
        root = open_folder(self._top.resolve())
        try:
            self.known.update(_entries(root, paths))
        finally:
            os.close(root)

    def tell(self, path: str, why: str) -> None:
        """Note a file that does not come, for the end of the run."""
        if len(self.told) < _MAX_TOLD:
            self.told.append(sanitize_line(f"{self._shown}{path}: {why}"))

    def _staging_parent(self) -> Path:
        """Return a folder on the same file system, if possible not the folder itself."""
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
            self.tell(path, error.brief)
            return False
        return True

    def _merge(self, content: Path, spare: Path, paths: list[str], suffix: str) -> None:
        root, staged, empty = (open_folder(folder) for folder in (self._top.resolve(), content, spare))
        try:
            before, after = self._before(root, paths), _entries(staged, paths)
            result = TakeOver(root, staged, empty, suffix).run(before, after, {})
            if any(EXAMPLE.fullmatch(path) for path in result.created):
                _hide_examples(root)
        finally:
            for folder in (root, staged, empty):
                os.close(folder)
        missed = {conflict.path for conflict in result.conflicts}
        for conflict in result.conflicts:
            saved = "" if conflict.saved is None else f"; the machine's version: {conflict.saved}"
            self.tell(conflict.path, f"{conflict.why}{saved}")
        for path in paths:
            if not is_below(path, missed):
                self.known[path] = after.get(path)
        for path in [*result.created, *result.changed, *result.deleted]:
            if path in self.known:
                self.kept[f"{self._shown}{path}"] = None

    def _before(self, root: int, paths: list[str]) -> Manifest:
        """Return the entries that the machine has changed, as far as the host had them when the run began."""
        before = _entries(root, paths)
        for path in paths:
            if path in self.known:
                known = self.known[path]
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


def is_usable(path: str) -> bool:
    """Return True if a machine's path is one below the folder, and none of git's own."""
    return (
        path.isprintable()
        and len(path) <= _MAX_PATH
        and {"", ".", ".."}.isdisjoint(path.split("/"))
        and not is_git(path)
    )


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
