"""The workspace: the files of a project that a machine gets, their digest, and their tar stream.

The project is untrusted: its files, also those that git lists, are opened below its top without following
links.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from pytest_microvm.errors import UsageError
from pytest_microvm.git.commands import GitError
from pytest_microvm.git.history import CheckoutHistory, read_history
from pytest_microvm.git.repository import Checkout, checkout_at, find_checkout
from pytest_microvm.settings.spec import format_size
from pytest_microvm.untrusted.manifest import is_git
from pytest_microvm.untrusted.nofollow import OpenTree

DEFAULT_LIMIT = 1024**3
_CACHES = frozenset(["__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"])
_LEFT_OUT = _CACHES | {".git", ".hg", ".venv", "venv", ".tox", ".nox", "node_modules", ".eggs"}
_SYSTEM = frozenset(
    f"/{name}"
    for name in (
        *("", "bin", "boot", "dev", "etc", "home", "lib", "lib64", "media", "mnt", "opt", "proc", "root"),
        *("run", "sbin", "srv", "sys", "tmp", "usr", "usr/local", "var", "var/tmp"),
    )
)


@dataclass(frozen=True)
class WorkspaceEntry:
    """One file, link or directory of a workspace: ``path`` below its top, bytes of ``size``."""

    path: str
    mode: int
    size: int
    mtime_ns: int
    target: str = ""


@dataclass(frozen=True)
class Workspace:
    """A directory to copy into a machine, to the same absolute path.

    Args:
        top: The directory.
        entries: The entries to copy, sorted by path.
        history: The history of its checkout, of which the copy gets a ``.git``; ``None``: it gets none.
    """

    top: Path
    entries: tuple[WorkspaceEntry, ...]
    history: CheckoutHistory | None = None

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.entries)

    def digest(self) -> str:
        """Return a SHA-256 over every path, permission, content and link target."""
        total = hashlib.sha256(os.fsencode(self.top) + b"\0")
        with OpenTree(self.top) as tree:
            for entry in self.entries:
                head = f"{entry.path}\0{entry.mode:o}\0{entry.target}\0"
                total.update(head.encode("utf-8", "surrogateescape"))
                if stat.S_ISREG(entry.mode):
                    total.update(file_digest(tree, entry.path))
        if self.history is not None:
            total.update(self.history.digest().encode())
        return total.hexdigest()

    def write_tar(self, file: BinaryIO) -> None:
        """Write a reproducible tar archive: paths relative to the top, owner root, time stamps kept."""
        with (
            OpenTree(self.top) as tree,
            tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            for entry in self.entries:
                self._add(archive, tree, entry)
            if self.history is not None:
                self._add_history(archive, self.history)

    def _add(self, archive: tarfile.TarFile, tree: OpenTree, entry: WorkspaceEntry) -> None:
        info = tarfile.TarInfo(entry.path)
        info.mode = stat.S_IMODE(entry.mode)
        info.mtime = entry.mtime_ns // 10**9
        if entry.target:
            info.type, info.linkname = tarfile.SYMTYPE, entry.target
            archive.addfile(info)
        elif stat.S_ISDIR(entry.mode):
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        else:
            add_file(archive, info, tree, entry.path)

    def _add_history(self, archive: tarfile.TarFile, history: CheckoutHistory) -> None:
        with tempfile.TemporaryDirectory(prefix="microvm-history-") as folder:
            made = history.make(Path(folder).resolve())
            archive.add(made, ".git", filter=_of_root)

    def part(self, entries: Iterable[WorkspaceEntry], *, history: bool) -> Workspace:
        """Return a workspace with some of the entries, and with the history or without."""
        chosen = tuple(entries)
        return replace(
            self, entries=chosen, history=_for(self.history if history else None, self.top, chosen)
        )


def _for(
    history: CheckoutHistory | None, top: Path, entries: tuple[WorkspaceEntry, ...]
) -> CheckoutHistory | None:
    """Return a history in which tracked paths that are not copied, such as caches, are not deleted."""
    if history is None:
        return None
    missing = history.tracked.difference(entry.path for entry in entries)
    with OpenTree(top) as tree:
        here = [path for path in sorted(missing) if _is_inside(path) and tree.status(path) is not None]
    return replace(history, missing=tuple(here))


def _of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member that belongs to root, with its time in whole seconds."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = int(member.mtime)
    return member


def _is_inside(path: str) -> bool:
    """Return True if a path, as an untrusted index has it, is below its folder and not in a ``.git``."""
    return {"", ".", ".."}.isdisjoint(path.split("/")) and not is_git(path)


def add_file(archive: tarfile.TarFile, info: tarfile.TarInfo, tree: OpenTree, path: str) -> None:
    """Add a file to an archive with the metadata ``info``; skip a file deleted since it was listed."""
    if (content := tree.open(path)) is not None:
        with content:
            info.size = os.fstat(content.fileno()).st_size  # the size may have changed since the listing
            archive.addfile(info, content)


def file_digest(tree: OpenTree, path: str) -> bytes:
    """Return the SHA-256 of a file; a file deleted since it was listed counts as empty."""
    digest = hashlib.sha256()
    if (file := tree.open(path)) is not None:
        with file:
            while block := file.read(1024 * 1024):
                digest.update(block)
    return digest.digest()


def scan(top: Path, *, limit: int = DEFAULT_LIMIT, git: bool = False) -> Workspace:
    """Return the workspace below ``top``: files that git tracks or would add; without git, all but caches.

    Args:
        top: The directory to copy.
        limit: Maximum size in bytes.
        git: Whether to include the history of the checkout whose top it is, if it is one.

    Raises:
        UsageError: ``top`` is not a project's directory, or too large, or git cannot list the ignored files.
    """
    if os.fspath(top) in _SYSTEM or os.fspath(top.resolve()) in _SYSTEM or not top.is_dir():
        raise UsageError(
            f"{top} is not a project's directory: it would be copied whole into every machine",
            resolution="start pytest in the project's directory, or name it with --rootdir",
        )
    with OpenTree(top) as tree:
        paths = sorted({*_paths(tree, top)})
        entries = tuple(entry for path in paths if (entry := _entry(tree, path)) is not None)
    workspace = Workspace(top, entries, _for(_history(top), top, entries) if git else None)
    if workspace.size > limit:
        largest = max(entries, key=lambda entry: entry.size)
        raise UsageError(
            f"the workspace {top} has {format_size(workspace.size)} bytes, more than {format_size(limit)}",
            details=f"the largest file is {largest.path} with {format_size(largest.size)} bytes",
            resolution="name what the tests do not need in .gitignore",
        )
    return workspace


def _history(top: Path) -> CheckoutHistory | None:
    checkout = checkout_at(top)
    return None if checkout is None else read_history(checkout)


def _paths(tree: OpenTree, top: Path) -> Iterator[str]:
    """Yield the paths below ``top`` to copy: no caches, no virtual environments."""
    try:
        checkout = find_checkout(top)
        listed = None if checkout is None else checkout.files(top.resolve())
    except GitError as error:
        raise UsageError(
            f"{top}: git cannot tell which files are ignored",
            details=f"{error.brief}\n{error.details}".strip(),
            resolution="`git status` there may say more; without a .git all files count",
        ) from error
    yield from _walk(tree, "") if listed is None else _chosen(tree, top, listed, "")


def _chosen(tree: OpenTree, top: Path, listed: list[str], above: str) -> Iterator[str]:
    """Yield the paths to copy among those that git lists below the folder ``above``."""
    environments = tuple(path[: -len("pyvenv.cfg")] for path in listed if path.endswith("/pyvenv.cfg"))
    for path in listed:
        names = path.split("/")
        if not _is_inside(path):
            continue
        if path.endswith(".pyc") or not _CACHES.isdisjoint(names):
            continue
        if environments and path.startswith(environments):
            continue
        status = tree.status(above + path)
        if status is not None and stat.S_ISDIR(status.st_mode):
            yield from _nested(tree, top, above + path)
        else:
            yield above + path


def _nested(tree: OpenTree, top: Path, folder: str) -> Iterator[str]:
    """Yield the paths to copy of a submodule or nested repository, by its own ignore rules."""
    try:
        checkout: Checkout | None = checkout_at(top / folder)
        listed = None if checkout is None else checkout.files(checkout.top)
    except (GitError, UsageError):  # unreadable for git, such as a copy of a submodule
        yield from _walk(tree, folder)
        return
    if listed is None:  # a submodule that was never fetched, or a folder that replaced a file
        yield folder
    else:
        yield from _chosen(tree, top, listed, f"{folder}/")


def _walk(tree: OpenTree, folder: str) -> Iterator[str]:
    """Yield everything below a folder but caches and virtual environments; no link is followed."""
    above = f"{folder}/" if folder else ""
    empty = True
    for name in _names(tree, folder):
        path = above + name
        status = tree.status(path)
        if status is None or is_git(name):
            continue
        if not stat.S_ISDIR(status.st_mode):
            is_link_left_out = stat.S_ISLNK(status.st_mode) and name in _LEFT_OUT
            if not is_link_left_out:
                empty = False
                if not name.endswith(".pyc"):
                    yield path
        elif name not in _LEFT_OUT and tree.status(f"{path}/pyvenv.cfg") is None:
            empty = False
            yield from _walk(tree, path)
    if empty and folder:
        yield folder


def _names(tree: OpenTree, folder: str) -> list[str]:
    """Return the names in a folder; none if this user may not read it."""
    try:
        return tree.names(folder)
    except PermissionError:
        return []


def _entry(tree: OpenTree, path: str) -> WorkspaceEntry | None:
    """Return the entry at ``path``; ``None`` if it was deleted or cannot be copied (sockets, devices)."""
    status = tree.status(path)
    if status is None:
        return None
    if stat.S_ISLNK(status.st_mode):
        target = tree.target(path)
        return None if target is None else WorkspaceEntry(path, status.st_mode, 0, status.st_mtime_ns, target)
    if stat.S_ISREG(status.st_mode):
        return WorkspaceEntry(path, status.st_mode, status.st_size, status.st_mtime_ns)
    if stat.S_ISDIR(status.st_mode):  # empty, or a nested repository
        return WorkspaceEntry(path, status.st_mode, 0, status.st_mtime_ns)
    return None
