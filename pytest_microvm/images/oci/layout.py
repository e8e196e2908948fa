"""Read images from a folder in the OCI image layout, whose files anybody may have put there."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_microvm.errors import PullError
from pytest_microvm.images.oci.documents import (
    MAX_DOCUMENT,
    Descriptor,
    choose,
    parse_document,
    parse_index,
    refused,
)
from pytest_microvm.untrusted.nofollow import OpenTree
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_microvm.images.oci.references import Platform, Reference

_INDEX = "index.json"
_NESTED = 3  # indexes inside each other
_SHOWN = 20  # names listed in an error


class Layout:
    """A folder in the OCI image layout; links in it are not followed.

    Args:
        folder: The folder.
        reference: The reference that names it, for errors.
        blobs: The folder of its blobs, if it is not in it.

    Raises:
        PullError: There is no such folder.
    """

    def __init__(self, folder: Path, reference: Reference, blobs: Path | None = None) -> None:
        self._folder = folder
        self._reference = reference
        self._blobs = blobs or folder / "blobs"

    def find(self, tag: str, platform: Platform) -> Descriptor:
        """Return the manifest of the image with a tag, or of the only image, for a platform.

        Raises:
            PullError: There is none, or the folder's index is refused.
        """
        entries = parse_index(parse_document(self._index(), "the index"))
        named = [entry for entry in entries if entry.name == tag] if tag else entries
        names = sorted({sanitize_line(entry.name, 100) for entry in entries if entry.name})
        if not named:
            raise self._absent(f"it has no image with the tag {tag}", names)
        if not tag and len(names) > 1:
            raise self._absent("it has several images", names)
        found = named[0] if len(named) == 1 else choose(named, platform, str(self._reference))
        for _level in range(_NESTED):
            if not found.is_index:
                return found
            document = parse_document(self.document(found), "the index")
            found = choose(parse_index(document), platform, str(self._reference))
        raise refused("the index", "it has too many indexes inside each other")

    def document(self, descriptor: Descriptor) -> bytes:
        """Return a document, checked against its digest.

        Raises:
            PullError: It is missing, too large, or another one.
        """
        with self.blob(descriptor) as file:
            data = file.read(MAX_DOCUMENT + 1)
        if len(data) > MAX_DOCUMENT:
            raise refused("a document", f"it has more than {MAX_DOCUMENT // 1024**2} MiB")
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != descriptor.digest:
            raise refused("a document", f"it is not the one with the digest {descriptor.digest}")
        return data

    @contextmanager
    def blob(self, descriptor: Descriptor) -> Iterator[IO[bytes]]:
        """Open a blob; its content is not checked yet.

        Raises:
            PullError: There is no such file.
        """
        with self._opened(self._blobs, descriptor.digest.replace(":", "/")) as file:
            yield file

    def _index(self) -> bytes:
        with self._opened(self._folder, _INDEX) as file:
            return file.read(MAX_DOCUMENT + 1)

    @contextmanager
    def _opened(self, folder: Path, path: str) -> Iterator[IO[bytes]]:
        try:
            with OpenTree(folder) as tree:
                file = tree.open(path)
        except OSError as error:
            raise self._absent(f"{folder}: {error.strerror}") from error
        if file is None:
            raise self._absent(f"{folder} has no file {path}; links are not followed")
        with file:
            yield file

    def _absent(self, why: str, names: list[str] | None = None) -> PullError:
        details = f"its tags: {', '.join(names[:_SHOWN])}" if names else ""
        return PullError(
            f"{self._reference} cannot be read: {why}",
            reason="absent",
            details=details,
            resolution="see whether the folder and the tag are right" if not names else "name one: add :TAG",
        )
