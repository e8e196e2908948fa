"""Template store on disk: published by rename, verified before use, evicted least recently used first.

``templates/<key>/``: ``ram``, ``scratch``, ``state`` (device state), attachments, and ``meta.json``,
whose presence makes the folder a template (:mod:`pytest_microvm.templates.integrity`). A process that
uses a template holds a shared lock (flock(2)) on its ``meta.json``; removal takes the exclusive lock, so
templates in use stay. A process that makes one locks the draft; the kernel drops the locks of the dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.cache.disk import NOTHING_LEFT, explained, free_bytes, need_space
from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.templates.files import disk_usage, sync, unnamed_copy
from pytest_microvm.templates.folders import (
    REMOVED,
    discard,
    hold,
    in_use,
    leads_to,
    private,
    publish_as,
    remove_unheld,
    remove_unused,
)
from pytest_microvm.templates.integrity import (
    META,
    STAMPS,
    Damaged,
    Stamps,
    read_meta,
    seal,
    stamps,
    verified,
)

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

KEPT = "kept"
"""The kind of a template that is a kept machine."""

UNUSABLE = "unusable"
"""The kind of an unusable template: it is damaged, or of another version."""

_DRAFT = ".building-"
_SPACE_LEFT = 256 * 1024**2  # bytes that must stay free on the disk when a template is begun


class Template:
    """A published template; it is not removed while this object is open.

    Attributes:
        key: The digest of everything that shaped it.
        folder: The folder of its files.
        meta: Its facts: ``kind``, ``image``, ``parent``, ``created``, ``files``...
    """

    def __init__(self, key: str, folder: Path, meta: dict[str, Any], lock: int, seen: Stamps) -> None:
        self.key = key
        self.folder = folder
        self.meta = meta
        self._seen = seen
        # Hypervisors open the RAM file for writing, although a copy writes nothing to it (before QEMU 8.2
        # there is no other way), which a read-only file system refuses.
        self._writable = None if os.access(folder / "ram", os.W_OK) else unnamed_copy(folder / "ram")
        self._lock: int | None = lock

    @property
    def ram(self) -> Path:
        """The guest's memory."""
        if self._writable is not None:
            return Path(f"/proc/{os.getpid()}/fd/{self._writable.fileno()}")
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
        """Return an attachment that the template's step stored with it."""
        return (self.folder / name).read_bytes()

    def intact(self) -> bool:
        """Return True if its files are still those verified when it was opened; costs a stat each.

        False does not mean that they are damaged: :meth:`TemplateStore.open` verifies that.
        """
        if self._lock is None:
            return False
        try:
            return leads_to(self.folder, self._lock) and stamps(self.folder, self._seen) == self._seen
        except Damaged:
            return False

    def close(self) -> None:
        """Release the template for removal; a second call does nothing."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._writable is not None:
            self._writable.close()

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
        say: Called with a line when a template is damaged or evicted for lack of space.
    """

    def __init__(self, root: Path, cap: int, say: Callable[[str], None] = lambda _line: None) -> None:
        self.folder = root / "templates"
        self.locks = self.folder / ".locks"  # of processes that make a template, by key
        self.cap = cap
        self._say = say
        self._drafts: dict[Path, int] = {}  # with the descriptors that hold their locks

    def open(self, key: str) -> Template | None:
        """Return the template ``key``, held open, or ``None``; a damaged one is reported and removed.

        Raises:
            HostError: It is damaged and cannot be made again: a kept machine, or in a read-only cache.
        """
        folder = self.folder / key
        with explained(self.folder):
            while (lock := hold(folder / META)) is not None:
                try:
                    meta = read_meta(folder)
                    template = Template(key, folder, meta, lock, verified(folder, meta))
                except (Damaged, FileNotFoundError) as damage:
                    if leads_to(folder, lock):  # else it was removed meanwhile, and perhaps made again
                        self._give_up(folder, damage)
                        return None
                else:
                    with contextlib.suppress(OSError):  # the cache cannot be written
                        os.utime(lock)  # the time of use, for "least recently used"
                    lock = None
                    return template
                finally:
                    if lock is not None:
                        os.close(lock)
        return None

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """Yield a new folder in which to make a template; it is removed unless published.

        Raises:
            HostError: The disk is full, or becomes so, or the cache cannot be written.
        """
        folder = self.new_draft()
        try:
            with explained(folder):
                yield folder
        finally:
            self.drop(folder)

    def new_draft(self) -> Path:
        """Return a new folder like :meth:`draft`'s, for the caller to publish or :meth:`drop`.

        Raises:
            HostError: The disk is full, or the cache cannot be written.
        """
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._make_space()
            while True:
                folder = private(self.folder, _DRAFT)
                folder.mkdir(mode=0o700)
                with contextlib.suppress(FileNotFoundError):  # a sweep removed it before we locked it
                    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if leads_to(folder, lock, ""):
                        self._drafts[folder] = lock
                        return folder
                    os.close(lock)

    def drop(self, draft: Path) -> None:
        """Remove a folder of :meth:`new_draft`; a published one stays."""
        shutil.rmtree(draft, ignore_errors=True)
        lock = self._drafts.pop(draft, None)
        if lock is not None:
            os.close(lock)

    def publish(self, key: str, draft: Path, meta: dict[str, Any]) -> None:
        """Publish ``draft`` as the template ``key``: flush everything to the disk, then rename it.

        Raises:
            HostError: The disk is full.
        """
        with explained(draft):
            need_space(draft, NOTHING_LEFT)  # else the machine's last writes may be lost
            with ThreadPoolExecutor(1) as writer:  # the disk is written while the digests are computed
                written = writer.map(sync, list(draft.iterdir()))
                seal(draft, {**meta, "created": time.time()})
                list(written)
            for path in (draft / META, draft / STAMPS, draft):
                sync(path)
            publish_as(draft, self.folder / key)
            sync(self.folder)
        self.shrink(keep=key)

    def list(self) -> builtins.list[StoredTemplate]:
        """Return all templates, the most recently used first; damaged ones are of kind ``unusable``."""
        return sorted(filter(None, map(_stored, self._folders())), key=lambda entry: -entry.used)

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
        with explained(self.folder):
            busy = [folder.name[:12] for folder in matching if not remove_unused(folder)]
        if busy:
            raise UsageError(f"in use: {', '.join(busy)}", resolution="wait until its run has ended")
        return [folder.name for folder in matching]

    def prune(self) -> int:
        """Remove every template that is not in use; return the bytes that became free.

        Kept machines stay: no run can make them again.
        """
        with explained(self.folder):
            self._sweep()
            for lock in self.locks.glob("*"):
                remove_unheld(lock)
            unused = [entry for entry in self.list() if entry.kind != KEPT]
            return sum(entry.size for entry in unused if remove_unused(self.folder / entry.key))

    def shrink(self, keep: str = "") -> None:
        """Evict the least recently used templates until all fit the cap; kept machines stay."""
        entries = self.list()
        total = sum(entry.size for entry in entries)
        for entry in reversed(entries):
            if total <= self.cap:
                return
            if entry.key != keep and entry.kind != KEPT and remove_unused(self.folder / entry.key):
                total -= entry.size

    def _folders(self) -> builtins.list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if not path.name.startswith(".") and path.is_dir()]

    def _give_up(self, folder: Path, damage: Damaged | FileNotFoundError) -> None:
        """Remove a damaged template and report it."""
        entry = _stored(folder)
        if entry is not None and entry.kind == KEPT:
            raise HostError(
                f"the kept machine {folder.name} is damaged: {damage}",
                resolution=f"it cannot be made again: `pytest-microvm rm {folder.name}`",
            )
        discard(folder)
        self._say(f"a template in the cache is damaged ({folder.name[:12]}: {damage}): making it again")

    def _make_space(self) -> None:
        """Evict the least recently used templates until there is space for a new one.

        Raises:
            HostError: There is still not enough space.
        """
        removed = 0
        entries = self.list() if free_bytes(self.folder) < _SPACE_LEFT else []
        for entry in reversed(entries):
            if free_bytes(self.folder) >= _SPACE_LEFT:
                break
            removed += entry.kind != KEPT and remove_unused(self.folder / entry.key)
        if removed:
            self._say(f"the disk with the cache is nearly full: removed {removed} templates not in use")
        need_space(self.folder, _SPACE_LEFT)

    def _sweep(self) -> None:
        """Remove folders that killed processes left behind."""
        for removed in self.folder.glob(REMOVED + "*"):
            shutil.rmtree(removed, ignore_errors=True)
        for draft in self.folder.glob(_DRAFT + "*"):
            remove_unheld(draft)


def _stored(folder: Path) -> StoredTemplate | None:
    """Return a template's entry in lists; ``None`` if it is gone."""
    try:
        meta = read_meta(folder)
    except Damaged:
        meta = {}
    try:
        used = (folder / META).stat().st_mtime if meta else folder.stat().st_mtime
        return StoredTemplate(
            folder.name,
            str(meta.get("kind", UNUSABLE)),
            str(meta.get("image", "")),
            float(meta.get("created", used)),
            used,
            disk_usage(folder),
            bool(meta) and in_use(folder),
            str(meta.get("about", "")),
        )
    except OSError:
        return None
