"""Decompress a pulled image's layers, checked against both of their digests, one ahead of the conversion."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Event
from typing import IO, Self

from pytest_microvm.errors import PullError
from pytest_microvm.images.oci.compression import unpack
from pytest_microvm.images.oci.documents import Descriptor, refused

Layer = tuple[Descriptor, str]
"""A layer's blob, from the manifest, and the digest of the archive in it, from the configuration."""

_PIECE = 1 << 20


class DamagedBlob(PullError):
    """A blob that is not the one that its digest names: fetching it again may help."""

    def __init__(self, layer: Descriptor, why: str) -> None:
        super().__init__(
            f"layer {layer.digest[:19]} of the image is refused: {why}",
            reason="refused",
            resolution="run again; if that does not help, push the image again",
        )


class Spools:
    """The archives of an image's layers; a thread decompresses one while the one before it is converted.

    Args:
        blob: Opens a layer's blob, whose content is not checked yet.
        layers: The layers that are likely to be converted, in order.
        folder: For the archives. At most two are there at a time.
    """

    def __init__(
        self,
        blob: Callable[[Descriptor], AbstractContextManager[IO[bytes]]],
        layers: Sequence[Layer],
        folder: Path,
    ) -> None:
        self._blob = blob
        self._folder = folder
        self._next = deque(layers)
        self._ahead: tuple[Layer, Future[IO[bytes]]] | None = None
        self._stopped = Event()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        """Begin with the first layer."""
        self._begin()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop, and delete the archive that was not taken."""
        self._stopped.set()
        self._drop()
        self._thread.shutdown()

    def take(self, layer: Layer) -> IO[bytes]:
        """Return a layer's archive, which the caller closes, and begin with the next layer.

        Raises:
            PullError: The blob is not the one that the digests name, or its compression is refused.
            HostError: A program is missing.
        """
        if self._ahead is None or self._ahead[0] != layer:  # those before it turned out to be stored
            self._drop()
            while layer in self._next:
                self._next.popleft()
            self._submit(layer)
        assert self._ahead is not None
        future, self._ahead = self._ahead[1], None
        try:
            return future.result()
        finally:
            self._begin()

    def _begin(self) -> None:
        if self._next:
            self._submit(self._next.popleft())

    def _submit(self, layer: Layer) -> None:
        self._ahead = layer, self._thread.submit(self._spool, *layer)

    def _drop(self) -> None:
        if self._ahead is not None and self._ahead[1].exception() is None:
            self._ahead[1].result().close()
        self._ahead = None

    def _spool(self, layer: Descriptor, diff_id: str) -> IO[bytes]:
        with self._blob(layer) as blob:
            return spool(blob, layer, diff_id, self._folder, self._stopped)


def spool(
    blob: IO[bytes], layer: Descriptor, diff_id: str, folder: Path, stopped: Event | None = None
) -> IO[bytes]:
    """Decompress a layer to an unnamed file; each byte of it is read once, and hashed on both sides.

    Args:
        blob: The layer as it was fetched.
        layer: Its size and digest, from the manifest.
        diff_id: The digest of its archive, from the configuration.
        folder: For the file.
        stopped: Set to end the work.

    Returns:
        The file, which the caller closes.

    Raises:
        PullError: The layer is not the one that the digests name, or its compression is refused.
        HostError: A program is missing.
    """
    archive = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the caller's, unless this fails
    try:
        _unpack(CheckedBlob(blob, layer, stopped), layer.size, diff_id, archive, folder)
    except BaseException:
        archive.close()
        raise
    return archive


def _unpack(blob: CheckedBlob, size: int, diff_id: str, archive: IO[bytes], folder: Path) -> None:
    try:
        found = unpack(blob.pieces, size, archive, folder)
    finally:
        blob.finish()  # the error of a damaged blob comes before that of its compression
    if found != diff_id:
        raise refused("a layer", f"its archive has the digest {found}, and the configuration says {diff_id}")


class CheckedBlob:
    """A blob that is hashed while it is read.

    Args:
        blob: The blob.
        layer: Its size and digest.
        stopped: Set to end the work.

    Attributes:
        pieces: Yields the blob in pieces, each once.

    Raises:
        DamagedBlob: It has another size than the manifest says.
    """

    def __init__(self, blob: IO[bytes], layer: Descriptor, stopped: Event | None = None) -> None:
        size = blob.seek(0, os.SEEK_END)
        if size != layer.size:
            raise DamagedBlob(layer, f"it has {size} bytes, and the manifest says {layer.size}")
        blob.seek(0)
        self._blob = blob
        self._layer = layer
        self._stopped = stopped or Event()
        self._digest = hashlib.sha256()
        self.pieces = self._read()

    def finish(self) -> None:
        """Hash what has not been read, and check the digest.

        Raises:
            DamagedBlob: It is another one than the manifest says.
        """
        for _piece in self.pieces:
            pass
        found = f"sha256:{self._digest.hexdigest()}"
        if found != self._layer.digest:
            raise DamagedBlob(self._layer, f"it has the digest {found}")

    def _read(self) -> Iterator[bytes]:
        while not self._stopped.is_set() and (piece := self._blob.read(_PIECE)):
            self._digest.update(piece)
            yield piece
