"""A commit's files from git's objects: unchanged bytes, with available submodules and large files."""

from __future__ import annotations

import os
import tarfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_microvm.ci.sources.file_names import refusal
from pytest_microvm.ci.sources.git_contents import CommitFile, Contents, contents, too_large
from pytest_microvm.ci.sources.git_objects import borrowed, entries
from pytest_microvm.ci.sources.large_files import MAX_POINTER
from pytest_microvm.ci.sources.submodules import find_module, module_names
from pytest_microvm.ci.sources.tree import Kind, selected, tree_digest
from pytest_microvm.errors import UsageError
from pytest_microvm.git.repository import Repository
from pytest_microvm.suite.workspace import DEFAULT_LIMIT
from pytest_microvm.untrusted.text import sanitize_line

MAX_FILES = 200_000

_MAX_DEPTH = 8  # of submodules in submodules
_MAX_NOTES = 100
_MAX_MODULES = 256 * 1024  # bytes of a .gitmodules
_MAX_TARGET = 4095  # bytes of a link's target
_MODULE, _LINK, _FORMAT, _EXECUTABLE = 0o160000, 0o120000, 0o170000, 0o111


@dataclass
class _Listing:
    """A commit's files, empty folders and time, and the repositories that have its blobs."""

    files: dict[str, CommitFile] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    homes: dict[Path, Repository] = field(default_factory=dict)
    seconds: int = 0


class GitTree:
    """The files of a commit; thread-safe.

    Args:
        repository: The repository with its objects.
        commit: The commit's full name.
        modules: Folders that contain the submodules' repositories, by name.
        known: A cache of contents' SHA-256 by blob, shared by the trees of one repository.
        limit: Maximum size of all files together, in bytes.

    Attributes:
        notes: Readable lines about missing submodules and large files, and about paths that were left out.
            Complete once the tree was used.
    """

    def __init__(
        self,
        repository: Repository,
        commit: str,
        *,
        modules: Sequence[Path] = (),
        known: dict[str, str] | None = None,
        limit: int = DEFAULT_LIMIT,
    ) -> None:
        self._repository = repository
        self._commit = commit
        self._modules = modules
        self._known = {} if known is None else known
        self._limit = limit
        self._listing: _Listing | None = None
        self._lock = threading.Lock()
        self.notes: list[str] = []

    def digest(self, paths: Sequence[str] | None = None) -> str:
        """Return the digest of the tree's files; see :meth:`pytest_microvm.ci.sources.tree.Tree.digest`."""
        listing = self._listed()
        files = [listing.files[path] for path in selected(listing.files, paths)]
        with contents(listing.homes, self._limit, self._note) as source:
            return tree_digest((file.path, file.kind, self._sha256(source, file)) for file in files)

    def fill(self, archive: tarfile.TarFile, paths: Sequence[str] | None = None) -> None:
        """Write the tree's files to an archive; see :meth:`pytest_microvm.ci.sources.tree.Tree.fill`."""
        listing = self._listed()
        for folder in listing.folders if paths is None else ():
            info = _member(folder, listing)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        with contents(listing.homes, self._limit, self._note) as source:
            for path in selected(listing.files, paths):
                file, info = listing.files[path], _member(path, listing)
                with source.content(file) as (content, size):
                    if file.kind == "link":
                        info.type, info.mode = tarfile.SYMTYPE, 0o777
                        info.linkname = os.fsdecode(content.read())
                        archive.addfile(info)
                    else:
                        info.mode, info.size = int(file.kind, 8), size
                        archive.addfile(info, content)

    def read(self, path: str, limit: int) -> bytes | None:
        """Return the content of a regular file, ``None`` if there is no such file.

        Raises:
            UsageError: The file has more than ``limit`` bytes.
        """
        listing = self._listed()
        file = listing.files.get(path)
        if file is None or file.kind == "link":
            return None
        if file.size > limit:
            raise UsageError(f"{path} has {file.size} bytes, more than {limit}", resolution="make it smaller")
        with contents(listing.homes, limit, self._note) as source, source.content(file) as (content, _size):
            return content.read()

    def plain_files(self, below: str) -> list[CommitFile]:
        """Return the regular files below a folder."""
        prefix = below.strip("/") + "/"
        found = self._listed().files.values()
        return [file for file in found if file.path.startswith(prefix) and file.kind != "link"]

    def _sha256(self, source: Contents, file: CommitFile) -> str:
        """Return the SHA-256 of a file's content; a file that may be an LFS pointer bypasses the cache."""
        if file.kind != "link" and file.size <= MAX_POINTER:
            return source.sha256(file)
        if file.object not in self._known:
            self._known[file.object] = source.sha256(file)
        return self._known[file.object]

    def _note(self, text: str) -> None:
        text = sanitize_line(text)
        if text not in self.notes and len(self.notes) < _MAX_NOTES:
            self.notes.append(text)

    # Listing

    def _listed(self) -> _Listing:
        with self._lock:
            if self._listing is None:
                listing = _Listing()
                with borrowed(self._repository) as repository:
                    shown = repository.git("log", "-1", "--format=%ct", self._commit)
                listing.seconds = min(max(0, int(shown)), 2**33)
                self._list(listing, self._repository, self._commit, self._modules, top="", depth=_MAX_DEPTH)
                listing.files = {path: listing.files[path] for path in sorted(listing.files, key=os.fsencode)}
                self._listing = listing
            return self._listing

    def _list(
        self,
        listing: _Listing,
        home: Repository,
        commit: str,
        modules: Sequence[Path],
        *,
        top: str,
        depth: int,
    ) -> None:
        """Add a commit's files, and those of its submodules, to the listing below ``top``."""
        with borrowed(home) as repository:
            links = self._list_files(listing, home, repository, commit, top)
            names: Mapping[str, str] = {}
            gitmodules = listing.files.get(f"{top}.gitmodules")
            if links and gitmodules and gitmodules.kind != "link" and gitmodules.size <= _MAX_MODULES:
                names = module_names(repository, gitmodules.object)
        for path, pinned in links.items():
            module = find_module(names.get(path), modules, home.format, pinned) if depth else None
            if module is None:
                listing.folders.append(top + path)
                self._note(f"submodule {top}{path}: its commit {pinned[:12]} is not on this computer")
            else:
                inner = [module.directory / "modules"]
                self._list(listing, module, pinned, inner, top=f"{top}{path}/", depth=depth - 1)

    def _list_files(
        self, listing: _Listing, home: Repository, repository: Repository, commit: str, top: str
    ) -> dict[str, str]:
        """Add a commit's own files to the listing; return its submodules' commits by path."""
        listing.homes[home.directory] = home
        links: dict[str, str] = {}
        folders: set[str] = set()
        total = sum(file.size for file in listing.files.values())
        for entry in entries(repository, commit):
            path = os.fsdecode(entry.path)
            above = [path[:at] for at, char in enumerate(path) if char == "/"]
            taken = path in folders or any(
                top + one in listing.files or one in links for one in (path, *above)
            )
            why = refusal(entry.path) or ("something else has this name" if taken else "")
            if entry.mode & _FORMAT == _LINK and entry.size > _MAX_TARGET:
                why = "no link has such a target"
            if why:
                self._note(f"{top}{path} was left out: {why}")
                continue
            folders.update(above)
            if entry.mode == _MODULE:
                links[path] = entry.object
            else:
                listing.files[top + path] = CommitFile(
                    top + path, _kind(entry.mode), entry.object, entry.size, home.directory
                )
                total += entry.size
            if total > self._limit:
                raise too_large(f"with {top}{path} they have {total}", self._limit)
            if len(listing.files) + len(links) > MAX_FILES:
                raise UsageError(
                    f"the sources have more than {MAX_FILES} files",
                    resolution="keep what builds and tests do not need out of the repository",
                )
        return links


def _kind(mode: int) -> Kind:
    if mode & _FORMAT == _LINK:
        return "link"
    return "755" if mode & _EXECUTABLE else "644"


def _member(path: str, listing: _Listing) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.mtime = listing.seconds
    return info
