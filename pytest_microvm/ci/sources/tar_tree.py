"""A source's files in a tar archive, for transfer to computers that lack the repository."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pytest_microvm.ci.sources.tree import Kind, Tree, selected, tree_digest

_CHUNK = 1 << 20


class TarTree:
    """The files of an archive made by :func:`write_tree`, on this or another computer; thread-safe.

    Args:
        path: The archive; it must not be changed or removed while this object is in use.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def digest(self, paths: Sequence[str] | None = None) -> str:
        """Return the digest of the tree's files; see :meth:`pytest_microvm.ci.sources.tree.Tree.digest`."""
        with tarfile.open(self._path, "r:") as archive:
            files = {member.name: member for member in archive if not member.isdir()}
            return tree_digest(
                (path, _kind(files[path]), _sha256(archive, files[path])) for path in selected(files, paths)
            )

    def fill(self, archive: tarfile.TarFile, paths: Sequence[str] | None = None) -> None:
        """Write the tree's files to an archive; see :meth:`pytest_microvm.ci.sources.tree.Tree.fill`."""
        with tarfile.open(self._path, "r:") as own:
            members = own.getmembers()
            files = {member.name: member for member in members if not member.isdir()}
            for member in (one for one in members if one.isdir() and paths is None):
                archive.addfile(member)
            for path in selected(files, paths):
                member = files[path]
                archive.addfile(member, own.extractfile(member) if member.isreg() else None)


def write_tree(tree: Tree, path: Path) -> None:
    """Write all files of a tree to an archive for :class:`TarTree`.

    Raises:
        UsageError: The tree cannot be read.
    """
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        tree.fill(archive)


def _kind(member: tarfile.TarInfo) -> Kind:
    if member.issym():
        return "link"
    return "755" if member.mode & 0o100 else "644"


def _sha256(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.issym():
        return hashlib.sha256(os.fsencode(member.linkname)).hexdigest()
    digest = hashlib.sha256()
    for chunk in _chunks(archive, member):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    content = archive.extractfile(member)
    assert content is not None, "a tree has files and links alone"
    with content:
        while chunk := content.read(_CHUNK):
            yield chunk
