"""Unpack a layer's blob to the plain tar archive in it, within a limit that no compression can exceed."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import IO, TYPE_CHECKING

from pytest_microvm.images.oci.documents import refused
from pytest_microvm.images.process import build_environment, started
from pytest_microvm.programs.needed import require_program

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

MAX_UNPACKED = 16 * 1024**3
"""Bytes of a layer's archive."""

_RATIO = 200  # a layer unpacks to at most this many times its size...
_ALWAYS = 256 * 1024**2  # ...or to this many bytes: a file of zeros compresses better than any program
_PIECE = 1 << 20
_GZIP = 16 + zlib.MAX_WBITS  # zlib: expect gzip's header and checksum
_ZSTD_MEMORY = "128MB"  # a window that the format recommends to support is 8 MB; zstd --long=27 makes 128 MB
# The first bytes of each kind; what is none of them is a plain archive.
_KINDS = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
)


def unpack(blob: Iterable[bytes], size: int, target: IO[bytes], folder: Path) -> str:
    """Write the archive in a blob to ``target``, while the blob is read once.

    Args:
        blob: The blob in pieces.
        size: Its bytes.
        target: Takes the archive.
        folder: For temporary files.

    Returns:
        The archive's digest, ``sha256:...``.

    Raises:
        PullError: The blob is damaged, compressed in another way, or unpacks to too much.
    """
    pieces = iter(blob)
    begin = next(pieces, b"")
    kind = next((kind for magic, kind in _KINDS if begin.startswith(magic)), "tar")
    if kind in ("bzip2", "xz"):
        raise refused("a layer", f"it is compressed with {kind}", "compress it with gzip or zstd")
    limit = min(MAX_UNPACKED, max(_ALWAYS, _RATIO * size))
    digest, total = hashlib.sha256(), 0
    for piece in {"gzip": _gzip, "zstd": _zstd, "tar": _plain}[kind](chain([begin], pieces), folder):
        total += len(piece)
        if total > limit:
            raise refused("a layer", f"it unpacks to more than {limit // 1024**2} MiB, from {size} bytes")
        digest.update(piece)
        target.write(piece)
    return f"sha256:{digest.hexdigest()}"


def _plain(blob: Iterator[bytes], _folder: Path) -> Iterator[bytes]:
    return blob


def _gzip(blob: Iterator[bytes], _folder: Path) -> Iterator[bytes]:
    """Yield the content of gzip's members; some programs write a layer as several."""
    member, data = None, b""
    try:
        while data := data or next(blob, b""):
            member = member or zlib.decompressobj(_GZIP)
            yield member.decompress(data, _PIECE)
            data = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
        while member is not None and (piece := member.decompress(b"", _PIECE)):
            yield piece
    except zlib.error as error:
        raise refused("a layer", f"its compression is damaged ({error})") from None
    if member is not None and not member.eof:
        raise refused("a layer", "its compressed data end too early", "run again, or push it again")


def _zstd(blob: Iterator[bytes], folder: Path) -> Iterator[bytes]:
    """Yield what the program zstd unpacks: a process of its own, with a limit to its memory."""
    command = [
        require_program("zstd", "pulls"),
        "--decompress",
        "--stdout",
        "--quiet",
        f"--memory={_ZSTD_MEMORY}",
    ]
    with tempfile.TemporaryFile(dir=folder) as messages, ThreadPoolExecutor(1) as feeding:
        running = started(
            command,
            environment=build_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
        )
        with running as process:
            assert process.stdin is not None
            assert process.stdout is not None
            fed = feeding.submit(_feed, process.stdin, blob)
            while piece := process.stdout.read(_PIECE):
                yield piece
            if process.wait() != 0:
                messages.seek(0)
                said = messages.read(500).decode(errors="replace").strip()
                raise refused("a layer", f"its compression is damaged ({said})")
            fed.result()


def _feed(stream: IO[bytes], blob: Iterator[bytes]) -> None:
    """Write a blob to a program, as much of it as it reads."""
    with suppress(BrokenPipeError), stream:  # its exit status says more
        for piece in blob:
            stream.write(piece)
