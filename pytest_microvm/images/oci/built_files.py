"""Store the files of a built image that is pulled: each as it is, once its digest is checked."""

from __future__ import annotations

from pathlib import Path

from pytest_microvm.cache.disk import need_space
from pytest_microvm.images.artifacts import Artifacts
from pytest_microvm.images.oci.documents import Descriptor, ImageManifest
from pytest_microvm.images.oci.sources import ImageSource
from pytest_microvm.images.oci.spooling import CheckedBlob, DamagedBlob
from pytest_microvm.images.process import Progress


def store_files(
    artifacts: Artifacts, artifact: ImageManifest, source: ImageSource, folder: Path, tell: Progress
) -> None:
    """Fetch and store the files that are not stored yet.

    Args:
        artifacts: Where they are stored.
        artifact: The image; its layers are the files.
        source: The place that has them.
        folder: An empty folder on the same file system.
        tell: Called with messages about the progress.

    Raises:
        PullError: A file cannot be had, or is another one; nothing is stored then.
        HostError: The disk is full.
    """
    stored = {file.digest for file in artifact.layers if artifacts.blobs.intact(_name(file))}
    missing = [file for file in artifact.layers if file.digest not in stored]
    need_space(folder, 2 * sum(file.size for file in missing))  # as it was fetched, and as it is stored
    if missing:
        source.fetch(artifact, stored)
    for number, file in enumerate(missing, 1):
        tell(f"storing file {number} of {len(missing)} ({file.size / 1e6:.1f} MB)")
        try:
            _copy(source, file, folder)
        except DamagedBlob:
            if not source.discard(file):
                raise
            tell("what an earlier pull left of it is damaged: fetching it again")
            source.fetch(artifact, stored)
            _copy(source, file, folder)
    with artifacts.publishing():
        for file in missing:
            artifacts.blobs.add(folder / _name(file))


def _copy(source: ImageSource, file: Descriptor, folder: Path) -> None:
    with source.blob(file) as blob, (folder / _name(file)).open("wb") as target:
        checked = CheckedBlob(blob, file)
        for piece in checked.pieces:
            target.write(piece)
        checked.finish()


def _name(file: Descriptor) -> str:
    return file.digest.partition(":")[2]
