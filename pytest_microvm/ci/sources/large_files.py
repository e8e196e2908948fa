"""Git LFS: recognize pointers, and find their large files on this computer.

The format of pointers: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md. git-lfs is not run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pytest_microvm.untrusted.nofollow import OpenTree

MAX_POINTER = 1023
"""Maximum size of a pointer in bytes."""

_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\n(?:ext-[^\n]+\n)*"
    rb"oid sha256:([0-9a-f]{64})\nsize ([0-9]{1,15})\n"
)
_PIECE = 1024 * 1024


@dataclass(frozen=True)
class Pointer:
    """A pointer to a large file: the SHA-256 of its content, and its size in bytes."""

    sha256: str
    size: int


def parse_pointer(data: bytes) -> Pointer | None:
    """Parse a blob as a pointer; return ``None`` if it is none."""
    found = _POINTER.fullmatch(data) if len(data) <= MAX_POINTER else None
    return Pointer(found[1].decode(), int(found[2])) if found else None


@contextmanager
def large_file(repository: Path, pointer: Pointer) -> Iterator[IO[bytes] | None]:
    """Yield the large file of a pointer, ``None`` if it is not on this computer or its content differs.

    Args:
        repository: The folder of the repository's objects, in which LFS keeps its own.
        pointer: The pointer.
    """
    name = pointer.sha256
    with OpenTree(repository) as tree:
        file = tree.open(f"lfs/objects/{name[:2]}/{name[2:4]}/{name}")
    if file is None:
        yield None
        return
    with file:
        yield file if _is_it(file, pointer) else None


def _is_it(file: IO[bytes], pointer: Pointer) -> bool:
    if os.fstat(file.fileno()).st_size != pointer.size:
        return False
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    file.seek(0)
    return digest.hexdigest() == pointer.sha256
