"""The files of a source, wherever they are: in git's objects, in a work tree, in an archive."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from pytest_microvm.errors import UsageError

Kind = Literal["644", "755", "link"]
"""What a file is to a tree: a plain one, one that can be run, a symbolic link."""


class Tree(Protocol):
    """Files to be copied into a machine. Nothing of them is checked out or run on this computer."""

    def digest(self, paths: Sequence[str] | None = None) -> str:
        """Return a SHA-256 over every path, mode and content.

        Two trees of the same files have the same one, whatever kind of tree they are.

        Args:
            paths: Files and folders, relative to the top; ``None``: all.

        Raises:
            UsageError: A path is not in it.
        """

    def fill(self, archive: tarfile.TarFile, paths: Sequence[str] | None = None) -> None:
        """Write the files into an archive, with paths relative to the top.

        Args:
            archive: Where to; a stream.
            paths: As for :meth:`digest`.

        Raises:
            UsageError: A path is not in it.
        """


def tree_digest(files: Iterable[tuple[str, Kind, str]]) -> str:
    """Return the digest that every kind of tree gives for the same files.

    Folders do not count: a tree is its files. Nor do times and owners.

    Args:
        files: Path (undecodable bytes as ``surrogateescape`` has them), kind, and the SHA-256 of the content
            as hexadecimal digits, of a link the SHA-256 of its target; in any order.
    """
    total = hashlib.sha256()
    for path, kind, content in sorted((os.fsencode(path), kind, content) for path, kind, content in files):
        total.update(b"%b\0%b\0%b\n" % (path, kind.encode(), content.encode()))
    return total.hexdigest()


def selected(files: Iterable[str], paths: Sequence[str] | None) -> list[str]:
    """Return which of ``files`` are one of ``paths``, or below one, in their order.

    Args:
        files: The paths of a tree's files.
        paths: Files and folders; ``None``: all.

    Raises:
        UsageError: One of ``paths`` is nothing of the tree.
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
    """Return a path's names; ``.`` is the top, and what begins with a slash is nothing of a tree."""
    start = ("/",) if path.startswith("/") else ()
    return start + tuple(name for name in path.split("/") if name not in ("", "."))
