"""Convert a layer of a container image to a squashfs file system that an overlay file system can stack."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from pytest_microvm.errors import PullError
from pytest_microvm.images.artifacts import Built
from pytest_microvm.images.oci.compression import unpack
from pytest_microvm.images.oci.contents import (
    Attributes,
    LayerContents,
    attributes_of,
    inspect,
    members,
    opened,
)
from pytest_microvm.images.oci.documents import Descriptor, refused
from pytest_microvm.images.squashfs import squash_stream

CONVERTER = 2
"""Part of every layer's key; increase it when a change of this package changes what it makes of layers."""

Lower = Callable[[Sequence[str]], Mapping[str, Attributes]]
"""Returns the attributes of folders in the layers below, of those that are there.

Raises:
    PullError: One of them is no folder there.
"""

_DEFAULT = Attributes(0o755, 0, 0, 0)  # of a folder that no layer has
_OVERLAY_OPAQUE = ("SCHILY.xattr.trusted.overlay.opaque", "y")  # Linux: filesystems/overlayfs
_PIECE = 1 << 20
_BUFFER = 1 << 16  # tarfile copies what is in its buffer with each header that it adds


def convert(
    folder: Path, blob: IO[bytes], layer: Descriptor, diff_id: str, *, lowest: bool, lower: Lower
) -> Built:
    """Convert a layer.

    Args:
        folder: The empty folder for the result and everything temporary.
        blob: The layer as it was fetched.
        layer: Its size and digest, from the manifest.
        diff_id: The digest of its archive, from the configuration.
        lowest: Whether nothing is below it, so that it has nothing to hide.
        lower: Looks folders up that exist in the archive only by what is in them.

    Returns:
        The file system, as ``layer``; with the facts of :func:`describe`.

    Raises:
        PullError: The layer is not the one that the digests name, or is refused.
        BuildError: mksquashfs failed.
        HostError: A program is missing.
    """
    check_blob(blob, layer)
    target = folder / "layer.squashfs"
    with tempfile.TemporaryFile(dir=folder) as archive:
        found = unpack(blob, layer.size, archive, folder)
        if found != diff_id:
            raise refused(
                "a layer", f"its archive has the digest {found}, and the configuration says {diff_id}"
            )
        contents = inspect(archive)
        implied = dict(lower(contents.implied)) if contents.implied else {}
        facts = describe(contents, implied, lowest=lowest)
        if lowest:
            contents.whiteouts.clear()
            contents.opaque.clear()
        newest = max([contents.newest, *(each.mtime for each in implied.values())])
        squash_stream(lambda stream: rewrite(stream, archive, contents, implied), target, newest=newest)
    return Built({"layer": target}, facts)


def check_blob(blob: IO[bytes], layer: Descriptor) -> None:
    """Check that a blob is the one that a manifest names, and leave it at its beginning.

    Raises:
        PullError: It is not.
    """
    size = blob.seek(0, os.SEEK_END)
    if size != layer.size:
        raise DamagedBlob(layer, f"it has {size} bytes, and the manifest says {layer.size}")
    digest = hashlib.sha256()
    blob.seek(0)
    while piece := blob.read(_PIECE):
        digest.update(piece)
    if f"sha256:{digest.hexdigest()}" != layer.digest:
        raise DamagedBlob(layer, f"it has the digest sha256:{digest.hexdigest()}")
    blob.seek(0)


class DamagedBlob(PullError):
    """A blob that is not the one that its digest names: fetching it again may help."""

    def __init__(self, layer: Descriptor, why: str) -> None:
        super().__init__(
            f"layer {layer.digest[:19]} of the image is refused: {why}",
            reason="refused",
            resolution="run again; if that does not help, push the image again",
        )


def describe(contents: LayerContents, implied: Mapping[str, Attributes], *, lowest: bool) -> dict[str, str]:
    """Return the facts about a layer on which its use depends.

    ``entries``: their number. ``hides``: ``yes`` if it hides something in the layers below; ``dropped`` if it
    would, but was converted as the lowest layer; else empty. ``root``: ``1`` if it hides all layers below.
    ``implied``: the attributes that folders got from the layers below, as JSON.
    """
    hides = bool(contents.whiteouts or contents.opaque)
    return {
        "entries": str(contents.entries),
        "hides": ("dropped" if lowest else "yes") if hides else "",
        "root": "1" if "" in contents.opaque else "",
        "implied": implied_fact({path: implied.get(path, _DEFAULT) for path in contents.implied}),
    }


def implied_fact(implied: Mapping[str, Attributes]) -> str:
    """Return the attributes of folders as a fact; empty for none."""
    return json.dumps({path: list(found[:3]) for path, found in sorted(implied.items())}) if implied else ""


def implied_paths(fact: str) -> list[str]:
    """Return the folders in a fact."""
    return list(json.loads(fact)) if fact else []


def is_for(facts: Mapping[str, str], *, lowest: bool, lower: Lower) -> bool:
    """Return True if a layer that was converted for one image is right in this place of this image."""
    if facts["hides"] == ("yes" if lowest else "dropped"):
        return False
    paths = implied_paths(facts["implied"])
    if not paths:
        return True
    found = lower(paths)
    return implied_fact({path: found.get(path, _DEFAULT) for path in paths}) == facts["implied"]


def rewrite(
    stream: IO[bytes], source: IO[bytes], contents: LayerContents, implied: Mapping[str, Attributes]
) -> None:
    """Write the archive for mksquashfs: folders, then what the layer hides, then the files in their order.

    Args:
        stream: Takes the archive.
        source: The layer's own archive.
        contents: What is in it.
        implied: The attributes of folders that it does not have itself.

    Raises:
        PullError: The layer's archive is damaged.
    """
    with tarfile.open(
        fileobj=stream,
        mode="w|",
        format=tarfile.PAX_FORMAT,
        bufsize=_BUFFER,
        copybufsize=_BUFFER,
        encoding="utf-8",
        errors="surrogateescape",
    ) as out:  # type: ignore[call-overload]  # copybufsize is not in the stubs
        for path, own in sorted(contents.folders.items()):
            info = _header(path, own or implied.get(path, _DEFAULT), tarfile.DIRTYPE)
            if path in contents.opaque:
                info.pax_headers = dict([*info.pax_headers.items(), _OVERLAY_OPAQUE])
            out.addfile(info)
        for path in sorted(contents.whiteouts):
            out.addfile(_header(path, Attributes(0, 0, 0, 0), tarfile.CHRTYPE))  # device 0:0
        if not contents.names:
            return
        with opened(source) as archive:
            for number, member in members(archive):
                if names := contents.names.get(number):
                    _copy(archive, member, names, out)


def _copy(
    archive: tarfile.TarFile, member: tarfile.TarInfo, names: Sequence[str], out: tarfile.TarFile
) -> None:
    """Write a member that is not a folder under its names."""
    attributes = attributes_of(member)
    if not member.isreg():
        for name in names:
            info = _header(name, attributes, member.type)
            info.linkname = member.linkname
            info.devmajor, info.devminor = member.devmajor, member.devminor
            out.addfile(info)
        return
    info = _header(names[0], attributes, tarfile.REGTYPE)
    info.size = member.size
    content = archive.extractfile(member)
    assert content is not None, "a regular file has content"
    with content:
        out.addfile(info, content)  # raises an OSError if it ends too early
    for name in names[1:]:
        link = _header(name, attributes, tarfile.LNKTYPE)
        link.linkname = names[0]
        out.addfile(link)


def _header(path: str, attributes: Attributes, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type = kind
    info.mode, info.uid, info.gid, info.mtime = attributes[:4]
    info.pax_headers = dict(attributes.xattrs)
    return info
