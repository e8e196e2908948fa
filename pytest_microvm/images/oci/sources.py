"""Where a container image comes from: a registry, a folder, or something that skopeo copies into a folder."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol

from pytest_microvm.images.oci.documents import (
    Descriptor,
    ImageManifest,
    choose,
    is_index,
    parse_document,
    parse_index,
    refused,
)
from pytest_microvm.images.oci.layout import Layout
from pytest_microvm.images.oci.references import Platform, Reference
from pytest_microvm.images.oci.skopeo import Skopeo
from pytest_microvm.images.process import Progress

_STEP = 10  # percent between two messages


class ImageSource(Protocol):
    """A place that has an image.

    Attributes:
        resolved: The digest of the document that the reference leads to: an index or a manifest.
    """

    resolved: str

    def manifest(self) -> bytes:
        """Return the manifest of the image for the platform, checked against its digest."""

    def configuration(self, manifest: ImageManifest) -> bytes:
        """Return the image's configuration, checked against its digest."""

    def fetch(self, manifest: ImageManifest, stored: set[str]) -> None:
        """Fetch the layers, except those whose digests are in ``stored``."""

    def blob(self, layer: Descriptor) -> AbstractContextManager[IO[bytes]]:
        """Open a layer's blob, whose content is not checked yet."""

    def discard(self, layer: Descriptor) -> bool:
        """Discard a damaged blob; return whether fetching it again may help."""

    def done(self) -> None:
        """Remove what was fetched: it is not needed any more."""


class FolderSource:
    """An image in a folder in the OCI layout.

    Args:
        reference: The reference that names it.
        platform: The platform.
        layout: The folder, if it is not the one of the reference.
        tag: The image's tag there; ``None``: the reference's.
    """

    def __init__(
        self, reference: Reference, platform: Platform, layout: Layout | None = None, tag: str | None = None
    ) -> None:
        self._layout = layout or Layout(Path(reference.name), reference)
        self._descriptor = self._layout.find(reference.tag if tag is None else tag, platform)
        self.resolved = self._descriptor.digest

    def manifest(self) -> bytes:
        """Return the manifest of the image for the platform, checked against its digest."""
        return self._layout.document(self._descriptor)

    def configuration(self, manifest: ImageManifest) -> bytes:
        """Return the image's configuration, checked against its digest."""
        return self._layout.document(manifest.configuration)

    def fetch(self, manifest: ImageManifest, stored: set[str]) -> None:
        """Do nothing: the layers are there."""

    def blob(self, layer: Descriptor) -> AbstractContextManager[IO[bytes]]:
        """Open a layer's blob, whose content is not checked yet."""
        return self._layout.blob(layer)

    def discard(self, layer: Descriptor) -> bool:  # noqa: ARG002 - as in other sources
        """Return False: another try would read the same file."""
        return False

    def done(self) -> None:
        """Do nothing: the folder is the user's."""


def copied(
    reference: Reference, platform: Platform, skopeo: Skopeo, folder: Path, tell: Progress
) -> FolderSource:
    """Copy an image of an archive or of Docker's daemon into a folder.

    Args:
        reference: The image.
        platform: The platform.
        skopeo: Copies it.
        folder: An empty folder.
        tell: Called with a message.

    Raises:
        PullError: It cannot be had.
    """
    tell(f"reading {reference}")
    blobs = folder / "blobs"
    blobs.mkdir()
    skopeo.copy(reference, folder / "layout", blobs, lambda: _size(folder))
    return FolderSource(reference, platform, Layout(folder / "layout", reference, blobs), "image")


class RegistrySource:
    """An image on a registry.

    Args:
        reference: The reference that names it.
        platform: The platform.
        skopeo: Reaches the registry.
        folder: An empty folder.
        downloads: The folder of blobs; what an interrupted pull left there is used.
        tell: Called with messages about the download.

    Raises:
        PullError: The registry does not answer, or has no such image.
    """

    def __init__(
        self,
        reference: Reference,
        platform: Platform,
        *,
        skopeo: Skopeo,
        folder: Path,
        downloads: Path,
        tell: Progress,
    ) -> None:
        self._reference = reference
        self._platform = platform
        self._skopeo = skopeo
        self._folder = folder
        self._downloads = downloads
        self._tell = tell
        self._layout: Layout | None = None
        self._document = skopeo.inspect(reference)
        self.resolved = _digest(self._document)
        if reference.digest and self.resolved != reference.digest:
            raise refused("the manifest", f"its digest is {self.resolved}")
        self._image = reference.at(self.resolved)

    def manifest(self) -> bytes:
        """Return the manifest of the image for the platform, checked against its digest."""
        document = parse_document(self._document, "the index")
        if not is_index(document):
            return self._document
        chosen = choose(parse_index(document), self._platform, str(self._reference))
        self._image = self._reference.at(chosen.digest)
        data = self._skopeo.inspect(self._image)
        return _checked(data, chosen)

    def configuration(self, manifest: ImageManifest) -> bytes:
        """Return the image's configuration, checked against its digest."""
        return _checked(self._skopeo.inspect(self._image, configuration=True), manifest.configuration)

    def fetch(self, manifest: ImageManifest, stored: set[str]) -> None:
        """Fetch the layers, except those whose digests are in ``stored``.

        skopeo does not fetch blobs that are there, and does not look into them: so an empty file stands for a
        layer that is stored.
        """
        self._downloads.mkdir(parents=True, exist_ok=True)
        blobs = self._downloads / "sha256"
        blobs.mkdir(exist_ok=True)
        wanted = {layer.digest: layer.size for layer in manifest.layers if layer.digest not in stored}
        stand_ins = [blobs / digest.partition(":")[2] for digest in stored]
        layout = self._folder / "layout"
        arrived = _Arrived(layout, blobs, wanted, self._tell)
        try:
            for path in stand_ins:
                path.touch()
            self._skopeo.copy(self._image, layout, self._downloads, arrived)
        finally:
            for path in stand_ins:
                path.unlink(missing_ok=True)
        self._layout = Layout(layout, self._reference, self._downloads)

    def blob(self, layer: Descriptor) -> AbstractContextManager[IO[bytes]]:
        """Open a layer's blob, whose content is not checked yet."""
        assert self._layout is not None, "fetch() comes first"
        return self._layout.blob(layer)

    def discard(self, layer: Descriptor) -> bool:
        """Discard a damaged blob, which an interrupted pull may have left."""
        self._path(layer).unlink(missing_ok=True)
        return True

    def done(self) -> None:
        """Remove the blobs."""
        for path in (self._downloads / "sha256").glob("*"):
            path.unlink()

    def _path(self, layer: Descriptor) -> Path:
        return self._downloads / layer.digest.replace(":", "/")


class _Arrived:
    """Measures a download, and reports it in steps.

    Args:
        layout: The folder in which skopeo writes a blob until it is complete.
        blobs: The folder of complete blobs.
        wanted: The bytes of each blob to fetch, by its digest.
        tell: Called with messages.
    """

    def __init__(self, layout: Path, blobs: Path, wanted: dict[str, int], tell: Progress) -> None:
        self._layout = layout
        self._paths = [blobs / digest.partition(":")[2] for digest in wanted]
        self._total = sum(wanted.values())
        self._tell = tell
        self._told = -1

    def __call__(self) -> int:
        """Return the bytes that have arrived."""
        complete = [path.stat().st_size for path in self._paths if path.is_file()]
        arrived = sum(complete) + _size(self._layout)
        step = min(100, 100 * arrived // max(1, self._total)) // _STEP
        if self._total and step > self._told:
            self._told = step
            self._tell(
                f"downloading: {len(complete)} of {len(self._paths)} layers, "
                f"{min(arrived, self._total) / 1e6:.0f} of {self._total / 1e6:.0f} MB"
            )
        return arrived


def _checked(data: bytes, descriptor: Descriptor) -> bytes:
    if _digest(data) != descriptor.digest:
        raise refused("a document", f"it has the digest {_digest(data)} in place of {descriptor.digest}")
    return data


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _size(folder: Path) -> int:
    """Return the bytes of the files below a folder; files that are renamed meanwhile may not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_dir() else path.lstat().st_size
        except FileNotFoundError:
            continue
    return total
