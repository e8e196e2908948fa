"""Store files by the SHA-256 of their content, and detect damage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CHUNK = 1 << 20


class Blobs:
    """A folder of files named by the SHA-256 of their content.

    A file is hashed once per boot of this computer, and again only if its size, times or inode change.

    Args:
        root: The folder; created when the first file is added.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen = root / "verified"

    def path(self, digest: str) -> Path:
        """Return the path of the file with this digest, whether or not it exists."""
        return self._root / digest

    def add(self, source: Path) -> str:
        """Move a file from the same file system into the folder, and return its digest.

        The file is on disk, complete, before its name appears.
        """
        self._seen.mkdir(parents=True, exist_ok=True)
        source.chmod(0o444)
        digest = sha256_file(source)
        sync_file(source)
        source.replace(self.path(digest))
        sync_folder(self._root)
        self._remember(digest)
        return digest

    def intact(self, digest: str) -> bool:
        """Return True if the file exists and its content still has this digest."""
        path = self.path(digest)
        try:
            if self._fingerprint(path) == json.loads((self._seen / digest).read_text()):
                return True
        except (OSError, ValueError):
            pass  # missing, or not yet hashed since this computer booted
        try:
            if sha256_file(path) != digest:
                return False
        except OSError:
            return False
        with contextlib.suppress(OSError):  # the cache cannot be written: hash it again next time
            self._remember(digest)
        return True

    def remove(self, digest: str) -> int:
        """Delete a file if it exists; return the bytes freed."""
        path = self.path(digest)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            size = 0
        path.unlink(missing_ok=True)
        (self._seen / digest).unlink(missing_ok=True)
        return size

    def digests(self) -> Iterator[str]:
        """Yield the digest of every file."""
        if self._root.is_dir():
            yield from (path.name for path in sorted(self._root.iterdir()) if path.is_file())

    def _remember(self, digest: str) -> None:
        write_atomically(self._seen / digest, json.dumps(self._fingerprint(self.path(digest))).encode())

    @staticmethod
    def _fingerprint(path: Path) -> list[object]:
        found = path.stat()
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
        return [boot, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return the canonical JSON text of a value."""
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; ``None`` if it is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it is either absent, old or complete, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk."""
    sync_file(path)
