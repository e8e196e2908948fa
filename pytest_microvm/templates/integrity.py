"""Whether a template's files are what they were when it was published: a digest once, a stamp from then on.

``meta.json`` has every file's size and digest, and a digest of itself. ``stamps.json`` has for each file
what the kernel changes whenever anybody writes to it or puts another in its place. While the stamps are
the same, nothing is read; where one differs (somebody wrote; the cache came out of an archive; the computer
was started again) the content decides, and the stamps are taken anew.
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
"""By file: size, time of the last write, time of the last change of any kind, inode; times in ns."""


class Damaged(Exception):
    """A template is not what it was; the message says what of it."""


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write down ``facts`` and what the files of ``folder`` are now; nobody may write to them any more."""
    names = sorted(path.name for path in folder.iterdir())
    seen = stamps(folder, names)
    files = {name: {"size": seen[name][0], "sha256": content_digest(folder / name)} for name in names}
    meta = {**facts, "files": files}
    (folder / META).write_bytes(canonical_json({**meta, "seal": _seal(meta)}))
    (folder / STAMPS).write_bytes(_as_json(seen))


def read_meta(folder: Path) -> dict[str, Any]:
    """Return a template's facts.

    Raises:
        Damaged: They are not what was written down.
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
    """Return the stamps of files that are what they were; their content is read if the stamps are new.

    Raises:
        Damaged: One is not.
    """
    # Taken before the content is read: a write that comes between makes them differ the next time.
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
    with contextlib.suppress(OSError):  # a cache that cannot be written: they are read again next time
        write_atomically(folder / STAMPS, text)
    return seen


def stamps(folder: Path, names: Iterable[str]) -> Stamps:
    """Return the stamps of the files called ``names`` as they are now.

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
