"""Verify that a template's files are unchanged since it was published: by digest once, then by stamps.

``meta.json`` has every file's size and digest, and a digest of itself. ``stamps.json`` has for each file the
metadata that the kernel changes when the file is written or replaced. While the stamps are the same, no
content is read; if one differs (after a write, a restore of the cache from an archive, a restart of the
computer), the digests decide, and the stamps are renewed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.images.blobs import canonical_json, write_atomically
from pytest_microvm.templates.files import content_digest

if TYPE_CHECKING:
    from collections.abc import Iterable

META = "meta.json"
STAMPS = "stamps.json"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Stamps = dict[str, list[int]]
"""By file: size, modification time, change time, inode; times in ns."""


class Damaged(Exception):
    """A template was changed; the message names the file."""


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Record ``facts``, and digests and stamps of the files in ``folder``, which must not change any more."""
    names = sorted(path.name for path in folder.iterdir())
    seen = stamps(folder, names)
    files = {name: {"size": seen[name][0], "sha256": content_digest(folder / name)} for name in names}
    meta = {**facts, "files": files}
    (folder / META).write_bytes(canonical_json({**meta, "seal": _seal(meta)}))
    (folder / STAMPS).write_bytes(_as_json(seen))


def read_meta(folder: Path) -> dict[str, Any]:
    """Return a template's facts.

    Raises:
        Damaged: They are missing or were changed.
    """
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_bytes())
        sealed = meta.pop("seal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(META) from error
    if sealed != _seal(meta):
        raise Damaged(META)
    return meta


def verified(folder: Path, meta: dict[str, Any]) -> Stamps:
    """Verify a template's files and return their stamps; content is read only if the stamps differ.

    Raises:
        Damaged: A file was changed or is missing.
    """
    # Taken before the content is read, so that a concurrent write makes them differ the next time.
    seen = stamps(folder, meta["files"])
    text = _as_json(seen)
    with contextlib.suppress(OSError):
        if (folder / STAMPS).read_bytes() == text:
            return seen
    for name, known in meta["files"].items():
        if seen[name][0] != known["size"]:
            raise Damaged(f"{name} has another size")
    for name, known in meta["files"].items():
        try:
            digest = content_digest(folder / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        if digest != known["sha256"]:
            raise Damaged(f"{name} has other content")
    with contextlib.suppress(OSError):  # the cache cannot be written: read the files again next time
        write_atomically(folder / STAMPS, text)
    return seen


def stamps(folder: Path, names: Iterable[str]) -> Stamps:
    """Return the current stamps of the files called ``names``.

    Raises:
        Damaged: One is missing.
    """
    found = {}
    for name in names:
        try:
            status = (folder / name).stat()
        except OSError as error:
            raise Damaged(f"{name} is missing") from error
        found[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return found


def _seal(meta: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(meta)).hexdigest()


def _as_json(seen: Stamps) -> bytes:
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return canonical_json({"boot": boot, "files": seen})
