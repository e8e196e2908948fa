"""The interface of a source's files, common to git's objects, a work tree and an archive."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from pytest_microvm.errors import UsageError

Kind = Literal["644", "755", "link"]
"""The kind of a file in a tree: regular, executable, or a symbolic link."""


class Tree(Protocol):
    """Files to be copied into a machine; none of them is checked out or run on this computer."""

    def digest(self, paths: Sequence[str] | None = None) -> str:
        """Return a SHA-256 over every path, mode and content.

        Trees with equal files have equal digests, whatever kind of tree they are.

        Args:
            paths: Files and folders, relative to the top; ``None``: all.

        Raises:
            UsageError: A path is not in the tree.
        """

    def fill(self, archive: tarfile.TarFile, paths: Sequence[str] | None = None) -> None:
        """Write the files to an archive, with paths relative to the top.

        Args:
            archive: The archive to write to; a stream.
            paths: As for :meth:`digest`.

        Raises:
            UsageError: A path is not in the tree.
        """


def tree_digest(files: Iterable[tuple[str, Kind, str]]) -> str:
    """Return the digest of a tree's files, equal for equal files in every kind of tree.

    Folders, times and owners are not part of the digest.

    Args:
        files: Path (undecodable bytes as ``surrogateescape``), kind, and SHA-256 as hexadecimal digits, of
            the content or of a link's target; in any order.
    """
    total = hashlib.sha256()
    for path, kind, content in sorted((os.fsencode(path), kind, content) for path, kind, content in files):
        total.update(b"%b\0%b\0%b\n" % (path, kind.encode(), content.encode()))
    return total.hexdigest()


def selected(files: Iterable[str], paths: Sequence[str] | None) -> list[str]:
    """Return those of ``files`` that are in ``paths`` or below one of them, in their order.

    Args:
        files: The paths of a tree's files.
        paths: Files and folders; ``None``: all.

    Raises:
        UsageError: One of ``paths`` is not in the tree.
    """
    if paths is None:
        return list(files)
    missing = {path: _parts(path) for path in paths}
    wanted = set(missing.values())
    found = []
    for file in files:
        parts = tuple(file.split("/"))
        hits = {parts[:length] for length in range(len(parts) + 1)} & wanted
        if hits:
            found.append(file)
            missing = {path: names for path, names in missing.items() if names not in hits}
    for path in missing:
        raise UsageError(
            f"{path!r} is nothing of the sources", resolution="name files and folders relative to their top"
        )
    return found


def _parts(path: str) -> tuple[str, ...]:
    """Return a path's components; ``.`` is the top, and an absolute path matches no file of a tree."""
    start = ("/",) if path.startswith("/") else ()
    return start + tuple(name for name in path.split("/") if name not in ("", "."))
