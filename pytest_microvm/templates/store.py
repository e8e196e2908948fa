"""Templates on disk: published whole by rename, checked before use, the least recently used go first.

``templates/<key>/``: ``ram``, ``scratch``, ``state`` (device state), attachments, and ``meta.json``,
which lists every file's size and is what makes the folder a template. A process that uses a template
holds a shared lock (flock(2)) on its ``meta.json``; removal takes the lock alone, so what is in use stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.templates.files import disk_usage, sync

if TYPE_CHECKING:
    import builtins
    from collections.abc import Iterator

    from typing_extensions import Self

KEPT = "kept"
"""The kind of a template that is a machine somebody kept."""

_META = "meta.json"
_DRAFT = ".building-"
_REMOVED = ".removed-"
_SPACE_LEFT = 256 * 1024**2  # bytes that must stay free on the disk when a template is begun


class Template:
    """A published template, held: it is not removed while this object is open.

    Attributes:
        key: The digest of everything that shaped it.
        folder: Where its files are.
        meta: What is known of it: ``kind``, ``image``, ``parent``, ``created``, ``files``...
    """

    def __init__(self, key: str, folder: Path, meta: dict[str, Any], lock: int) -> None:
        self.key = key
        self.folder = folder
        self.meta = meta
        self._lock: int | None = lock

    @property
    def ram(self) -> Path:
        """The guest's memory."""
        return self.folder / "ram"

    @property
    def scratch(self) -> Path:
        """The scratch disk."""
        return self.folder / "scratch"

    @property
    def state(self) -> Path:
        """The device state."""
        return self.folder / "state"

    def attachment(self, name: str) -> bytes:
        """Return what the step that made it left beside it."""
        return (self.folder / name).read_bytes()

    def close(self) -> None:
        """Let it be removed again; a second call does nothing."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class StoredTemplate:
    """A line of ``template list``: sizes in bytes on the disk, times in seconds since 1970."""

    key: str
    kind: str
    image: str
    created: float
    used: float
    size: int
    in_use: bool
    about: str = ""


class TemplateStore:
    """The templates under a cache folder.

    Args:
        root: The cache folder.
        cap: Bytes that all templates may take on the disk together.
    """

    def __init__(self, root: Path, cap: int) -> None:
        self.folder = root / "templates"
        self.cap = cap

    def open(self, key: str) -> Template | None:
        """Return the template called ``key``, held, or ``None``; a damaged one is removed."""
        folder = self.folder / key
        lock = _hold(folder / _META)
        if lock is None:
            return None
        meta = _read_meta(folder)
        if meta is None:
            os.close(lock)
            _discard(folder)
            return None
        os.utime(lock)  # the time of use, for "least recently used"
        return Template(key, folder, meta, lock)

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """Yield a new folder to make a template in; whatever is not published is removed.

        Raises:
            HostError: The disk is full.
        """
        folder = self.new_draft()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def new_draft(self) -> Path:
        """Return a new folder like :meth:`draft`'s, for the caller to publish or remove.

        Raises:
            HostError: The disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        free = shutil.disk_usage(self.folder).free
        if free < _SPACE_LEFT:
            raise HostError(
                f"only {free // 1024**2} MiB are free where the cache is ({self.folder})",
                resolution="free some disk, run `pytest-microvm template prune`, or set PYTEST_MICROVM_CACHE",
            )
        folder = _private(self.folder, _DRAFT)
        folder.mkdir(mode=0o700)
        return folder

    def publish(self, key: str, draft: Path, meta: dict[str, Any]) -> None:
        """Make ``draft`` the template ``key``: everything on the disk first, then one rename."""
        for path in draft.iterdir():
            sync(path)
        files = {path.name: path.stat().st_size for path in draft.iterdir()}
        state = hashlib.sha256((draft / "state").read_bytes()).hexdigest()
        meta = {**meta, "created": time.time(), "files": files, "state_sha256": state}
        (draft / _META).write_text(json.dumps(meta, indent=1))
        sync(draft / _META)
        sync(draft)
        _publish_as(draft, self.folder / key)
        sync(self.folder)
        self.shrink(keep=key)

    def list(self) -> builtins.list[StoredTemplate]:
        """Return all templates, the most recently used first."""
        found = []
        for folder in self._folders():
            meta = _read_meta(folder)
            if meta is None:
                continue
            with contextlib.suppress(OSError, KeyError):
                found.append(
                    StoredTemplate(
                        folder.name,
                        meta["kind"],
                        meta["image"],
                        meta["created"],
                        (folder / _META).stat().st_mtime,
                        disk_usage(folder),
                        _in_use(folder),
                        str(meta.get("about", "")),
                    )
                )
        return sorted(found, key=lambda entry: -entry.used)

    def remove(self, prefix: str) -> builtins.list[str]:
        """Remove the templates whose key begins with ``prefix``; return their keys.

        Raises:
            UsageError: There is none, or it is in use.
        """
        matching = [folder for folder in self._folders() if prefix and folder.name.startswith(prefix)]
        if not matching:
            raise UsageError(
                f"there is no template {prefix!r}", resolution="see `pytest-microvm template list`"
            )
        busy = [folder.name[:12] for folder in matching if not _remove(folder)]
        if busy:
            raise UsageError(f"in use: {', '.join(busy)}", resolution="wait until its run has ended")
        return [folder.name for folder in matching]

    def prune(self) -> int:
        """Remove every template that is not in use; return the bytes that became free.

        Machines that somebody kept stay: no run can make them again.
        """
        self._sweep()
        kept = {entry.key for entry in self.list() if entry.kind == KEPT}
        freed = 0
        for folder in self._folders():
            if folder.name in kept:
                continue
            size = disk_usage(folder)
            if _remove(folder):
                freed += size
        return freed

    def shrink(self, keep: str = "") -> None:
        """Remove the least recently used until all together fit the cap; what somebody kept stays."""
        entries = self.list()
        total = sum(entry.size for entry in entries)
        for entry in reversed(entries):
            if total <= self.cap:
                return
            if entry.key != keep and entry.kind != KEPT and _remove(self.folder / entry.key):
                total -= entry.size

    def _folders(self) -> builtins.list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if not path.name.startswith(".") and path.is_dir()]

    def _sweep(self) -> None:
        """Remove what processes left behind that ended without tidying up (they were killed)."""
        for left in (*self.folder.glob(_DRAFT + "*"), *self.folder.glob(_REMOVED + "*")):
            pid = left.name.split("-")[1]
            if not Path(f"/proc/{pid}").exists():
                shutil.rmtree(left, ignore_errors=True)


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """Return a template's facts, ``None`` if a file is missing or has another size than when it was made."""
    try:
        meta: dict[str, Any] = json.loads((folder / _META).read_text())
        for name, size in meta["files"].items():
            if (folder / name).stat().st_size != size:
                return None
        state = hashlib.sha256((folder / "state").read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta if state == meta["state_sha256"] else None


def _hold(meta: Path) -> int | None:
    """Return a descriptor that holds the template ``meta`` belongs to; ``None`` if there is none."""
    while True:
        try:
            lock = os.open(meta, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), meta.stat()):
                return lock
        os.close(lock)  # while we waited it was removed, and perhaps made anew


def _private(folder: Path, prefix: str) -> Path:
    """Return a new name in ``folder`` that is this process's until it ends."""
    return folder / f"{prefix}{os.getpid()}-{secrets.token_hex(6)}"


def _discard(folder: Path) -> None:
    """Take a folder away in one step, so that nobody meets half of it, then remove it."""
    gone = _private(folder.parent, _REMOVED)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _publish_as(draft: Path, target: Path) -> None:
    """Rename ``draft`` unless somebody published the same: theirs is as good. A damaged one makes way."""
    while True:
        try:
            draft.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        if _read_meta(target) is not None:
            return
        _discard(target)


def _in_use(folder: Path) -> bool:
    with (folder / _META).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove(folder: Path) -> bool:
    """Remove a template unless somebody uses it; return whether it is gone."""
    try:
        with (folder / _META).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _discard(folder)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # somebody else was quicker, or it is no template at all
        _discard(folder)
    return True
