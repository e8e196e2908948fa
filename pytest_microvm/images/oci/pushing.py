"""Push a built image to a registry: as an OCI artifact, in a folder whose blobs are the stored files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from pytest_microvm.images.oci.built import MANIFEST, artifact_of, descriptor_of
from pytest_microvm.images.oci.references import Reference
from pytest_microvm.images.oci.skopeo import Skopeo
from pytest_microvm.images.process import Progress

_TAG = "image"
_STEP = 10  # percent between two messages


def push(
    manifest: bytes,
    files: Collection[Path],
    target: Reference,
    skopeo: Skopeo,
    *,
    folder: Path,
    tell: Progress,
) -> Reference:
    """Push an image.

    Args:
        manifest: The image's own manifest.
        files: Its files, named by their digests; each once.
        target: The name that it gets, and its tag.
        skopeo: Copies it.
        folder: An empty folder.
        tell: Called with messages about the progress.

    Returns:
        The reference to it by its digest.

    Raises:
        PullError: The registry does not take it, or cannot be reached.
    """
    digest = write_layout(folder / "layout", manifest, files)
    total = sum(file.stat().st_size for file in files)
    skopeo.push(f"oci:{folder / 'layout'}:{_TAG}", target, _Sent(total, tell))
    return target.at(digest)


def write_layout(layout: Path, manifest: bytes, files: Collection[Path]) -> str:
    """Write a folder in the OCI layout with the artifact of an image; its files are linked, not copied.

    Args:
        layout: The folder, which is created.
        manifest: The image's own manifest.
        files: Its files, named by their digests; each once.

    Returns:
        The artifact's digest, ``sha256:...``.
    """
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for file in files:
        (blobs / file.name).symlink_to(file)  # a hard link would change its time: it would be hashed again
    sizes = {file.name: file.stat().st_size for file in files}
    document = json.dumps(artifact_of(manifest, sizes), sort_keys=True, separators=(",", ":")).encode()
    for data in (manifest, document):
        (blobs / hashlib.sha256(data).hexdigest()).write_bytes(data)
    entry = descriptor_of(document, MANIFEST)
    entry["annotations"] = {"org.opencontainers.image.ref.name": _TAG}
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return str(entry["digest"])


class _Sent:
    """Reports an upload in steps.

    Args:
        total: The bytes to send, unless the registry has them.
        tell: Called with messages.
    """

    def __init__(self, total: int, tell: Progress) -> None:
        self._total = total
        self._tell = tell
        self._told = -1

    def __call__(self, sent: int) -> None:
        """Report the bytes that were sent."""
        step = min(100, 100 * sent // max(1, self._total)) // _STEP
        if step > self._told:
            self._told = step
            self._tell(f"uploading: {min(sent, self._total) / 1e6:.0f} of {self._total / 1e6:.0f} MB")
