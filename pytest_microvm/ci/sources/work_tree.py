"""The current files of a work tree: those that git tracks or would add."""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pytest_microvm.ci.sources.tree import Kind, selected, tree_digest
from pytest_microvm.suite.workspace import DEFAULT_LIMIT, WorkspaceEntry, add_file, file_digest, scan
from pytest_microvm.untrusted.nofollow import OpenTree


class WorkTree:
    """The files of a work tree, listed when the object is created; thread-safe.

    Args:
        top: The work tree's folder.
        limit: Maximum size of all files together, in bytes.

    Attributes:
        notes: Always empty; see :class:`pytest_microvm.ci.sources.git_tree.GitTree`.

    Raises:
        UsageError: The folder is no work tree, or its files are too large.
    """

    def __init__(self, top: Path, *, limit: int = DEFAULT_LIMIT) -> None:
        self._top = top
        self._entries = {
            entry.path: entry for entry in scan(top, limit=limit).entries if not stat.S_ISDIR(entry.mode)
        }
        self.notes: list[str] = []

    def digest(self, paths: Sequence[str] | None = None) -> str:
        """Return the digest of the tree's files; see :meth:`pytest_microvm.ci.sources.tree.Tree.digest`."""
        return tree_digest(self._hashed(selected(self._entries, paths)))

    def fill(self, archive: tarfile.TarFile, paths: Sequence[str] | None = None) -> None:
        """Write the tree's files to an archive; see :meth:`pytest_microvm.ci.sources.tree.Tree.fill`."""
        with OpenTree(self._top) as tree:
            for path in selected(self._entries, paths):
                self._add(archive, tree, path)

    def _add(self, archive: tarfile.TarFile, tree: OpenTree, path: str) -> None:
        entry = self._entries[path]
        info = tarfile.TarInfo(path)
        info.mtime = entry.mtime_ns // 10**9
        if stat.S_ISLNK(entry.mode):
            info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, entry.target
            archive.addfile(info)
            return
        info.mode = int(_kind(entry), 8)
        add_file(archive, info, tree, path)

    def _hashed(self, paths: Sequence[str]) -> Iterator[tuple[str, Kind, str]]:
        with OpenTree(self._top) as tree:
            for path in paths:
                entry = self._entries[path]
                if stat.S_ISREG(entry.mode):
                    digest = file_digest(tree, path)
                else:
                    digest = hashlib.sha256(os.fsencode(entry.target)).digest()
                yield path, _kind(entry), digest.hex()


def _kind(entry: WorkspaceEntry) -> Kind:
    if stat.S_ISLNK(entry.mode):
        return "link"
    return "755" if entry.mode & 0o100 else "644"
