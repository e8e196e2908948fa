"""The files of a source, wherever they are: in git's objects, in a work tree, in an archive."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from typing import Protocol


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
