"""The files of a work tree, as they lie there: what git tracks or would add."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pytest_microvm.ci.sources.tree import Kind, selected, tree_digest
from pytest_microvm.remote.workspace import DEFAULT_LIMIT, Entry, scan

_PIECE = 1024 * 1024


class WorkTree:
    """The files of a work tree, as they were listed when this was made; several threads may use it.

    Args:
        top: The work tree's folder.
        limit: Bytes that all files may have together.

    Attributes:
        notes: For people; it has none.

    Raises:
        UsageError: It is none, or too large.
    """

    def __init__(self, top: Path, *, limit: int = DEFAULT_LIMIT) -> None:
        self._top = top
        self._entries = {
            entry.path: entry for entry in scan(top, limit=limit).entries if not stat.S_ISDIR(entry.mode)
        }
        self.notes: list[str] = []

    def digest(self, paths: Sequence[str] | None = None) -> str:
        """Return the digest of its files; see :meth:`pytest_microvm.ci.sources.tree.Tree.digest`."""
        return tree_digest(self._hashed(selected(self._entries, paths)))

    def fill(self, archive: tarfile.TarFile, paths: Sequence[str] | None = None) -> None:
        """Write its files into an archive; see :meth:`pytest_microvm.ci.sources.tree.Tree.fill`."""
        for path in selected(self._entries, paths):
            entry = self._entries[path]
            info = tarfile.TarInfo(path)
            info.mtime = entry.mtime_ns // 10**9
            if stat.S_ISLNK(entry.mode):
                info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, entry.target
                archive.addfile(info)
                continue
            info.mode = int(_kind(entry), 8)
            with contextlib.suppress(FileNotFoundError), (self._top / path).open("rb") as content:
                info.size = os.fstat(content.fileno()).st_size  # it may have changed since it was listed
                archive.addfile(info, content)

    def _hashed(self, paths: Sequence[str]) -> Iterator[tuple[str, Kind, str]]:
        for path in paths:
            entry = self._entries[path]
            digest = hashlib.sha256(os.fsencode(entry.target))
            if stat.S_ISREG(entry.mode):
                with contextlib.suppress(FileNotFoundError), (self._top / path).open("rb") as content:
                    while piece := content.read(_PIECE):
                        digest.update(piece)
            yield path, _kind(entry), digest.hexdigest()


def _kind(entry: Entry) -> Kind:
    if stat.S_ISLNK(entry.mode):
        return "link"
    return "755" if entry.mode & 0o100 else "644"
