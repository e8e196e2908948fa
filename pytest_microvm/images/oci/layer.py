"""Convert a layer of a container image to a squashfs file system that an overlay file system can stack."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from pytest_microvm.images.artifacts import Built
from pytest_microvm.images.oci.contents import Attributes, LayerContents, StoredFile, inspect
from pytest_microvm.images.oci.documents import refused
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


def convert(folder: Path, archive: IO[bytes], *, lowest: bool, lower: Lower) -> Built:
    """Convert a layer.

    Args:
        folder: The empty folder for the result and everything temporary.
        archive: The layer's archive, checked.
        lowest: Whether nothing is below it, so that it has nothing to hide.
        lower: Looks folders up that exist in the archive only by what is in them.

    Returns:
        The file system, as ``layer``; with the facts of :func:`describe`.

    Raises:
        PullError: The layer is refused.
        BuildError: mksquashfs failed.
    """
    target = folder / "layer.squashfs"
    contents = inspect(archive)
    implied = dict(lower(contents.implied)) if contents.implied else {}
    facts = describe(contents, implied, lowest=lowest)
    if lowest:
        contents.whiteouts.clear()
        contents.opaque.clear()
    newest = max([contents.newest, *(each.mtime for each in implied.values())])
    squash_stream(lambda stream: rewrite(stream, archive, contents, implied), target, epoch=newest)
    return Built({"layer": target}, facts)


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
    out = _Archive(stream)
    for path, own in sorted(contents.folders.items()):
        info = _header(path, own or implied.get(path, _DEFAULT), tarfile.DIRTYPE)
        if path in contents.opaque:
            info.pax_headers = dict([*info.pax_headers.items(), _OVERLAY_OPAQUE])
        out.add(info)
    for path in sorted(contents.whiteouts):
        out.add(_header(path, Attributes(0, 0, 0, 0), tarfile.CHRTYPE))  # device 0:0
    for number, file in contents.files.items():
        _copy(file, source, contents.names[number], out)
    out.end()


class _Archive:
    """A tar archive that is written in large pieces; tarfile writes each header and each file of its own."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._pending = bytearray()

    def add(self, header: tarfile.TarInfo) -> None:
        """Add a header; the content of a file has to follow."""
        self._pending += header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        self._write(_PIECE)

    def copy(self, source: IO[bytes], offset: int, size: int) -> None:
        """Add the content of a file.

        Raises:
            PullError: It ends too early.
        """
        source.seek(offset)
        left = size
        while left:
            piece = source.read(min(left, _PIECE))
            if not piece:
                raise refused("a layer", "its archive ends too early")
            self._pending += piece
            left -= len(piece)
            self._write(_PIECE)
        self._pending += bytes(-size % tarfile.BLOCKSIZE)

    def end(self) -> None:
        """Write the end of the archive."""
        self._pending += bytes(2 * tarfile.BLOCKSIZE)
        self._write(1)

    def _write(self, least: int) -> None:
        if len(self._pending) >= least:
            self._stream.write(self._pending)
            self._pending.clear()


def _copy(file: StoredFile, source: IO[bytes], names: Sequence[str], out: _Archive) -> None:
    """Add a file, link or device under its names."""
    regular = file.kind == tarfile.REGTYPE
    for number, name in enumerate(names):
        info = _header(name, file.attributes, file.kind)
        info.linkname = file.target
        info.devmajor, info.devminor = file.device
        if regular and number:
            info.type, info.linkname = tarfile.LNKTYPE, names[0]
            out.add(info)
            continue
        info.size = file.size
        out.add(info)
        out.copy(source, file.offset, file.size)


def _header(path: str, attributes: Attributes, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type = kind
    info.mode, info.uid, info.gid, info.mtime = attributes[:4]
    info.pax_headers = dict(attributes.xattrs)
    return info
