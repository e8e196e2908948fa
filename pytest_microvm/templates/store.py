"""Templates on disk: published whole by rename, checked before use, the least recently used go first.

``templates/<key>/``: ``ram``, ``scratch``, ``state`` (device state), attachments, and ``meta.json``,
which is what makes the folder a template (:mod:`pytest_microvm.templates.integrity`). A process that uses
a template holds a shared lock (flock(2)) on its ``meta.json``; removal takes the lock alone, so what is in
use stays. Whoever makes one holds a lock on the folder it is made in; the kernel lets go of it for the dead.
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
"""The kind of a template that is a machine somebody kept."""

UNUSABLE = "unusable"
"""The kind of what is no template any more: it is damaged, or of another version."""

_DRAFT = ".building-"
_SPACE_LEFT = 256 * 1024**2  # bytes that must stay free on the disk when a template is begun


class Template:
    """A published template, held: it is not removed while this object is open.

    Attributes:
        key: The digest of everything that shaped it.
        folder: Where its files are.
        meta: What is known of it: ``kind``, ``image``, ``parent``, ``created``, ``files``...
    """

    def __init__(self, key: str, folder: Path, meta: dict[str, Any], lock: int, seen: Stamps) -> None:
        self.key = key
        self.folder = folder
        self.meta = meta
        self._seen = seen
        # Hypervisors want to open the memory for writing, although a copy writes nothing to it (before
        # QEMU 8.2 there is no other way), which a file system that is read-only refuses.
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
        """Return what the step that made it left beside it."""
        return (self.folder / name).read_bytes()

    def intact(self) -> bool:
        """Tell whether its files are still the ones that were verified when it was opened; a stat each.

        False does not mean that they are damaged: :meth:`TemplateStore.open` finds that out.
        """
        if self._lock is None:
            return False
        try:
            return leads_to(self.folder, self._lock) and stamps(self.folder, self._seen) == self._seen
        except Damaged:
            return False

    def close(self) -> None:
        """Let it be removed again; a second call does nothing."""
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
        say: Told when a template is damaged, or has to go for want of space.
    """

    def __init__(self, root: Path, cap: int, say: Callable[[str], None] = lambda _line: None) -> None:
        self.folder = root / "templates"
        self.locks = self.folder / ".locks"  # of those who make a template, by key
        self.cap = cap
        self._say = say
        self._drafts: dict[Path, int] = {}  # with the descriptors that hold their locks

    def open(self, key: str) -> Template | None:
        """Return the template called ``key``, held, or ``None``; a damaged one is told of and removed.

        Raises:
            HostError: It is damaged and cannot be made again: somebody kept it, or the cache is read-only.
        """
        folder = self.folder / key
        with explained(self.folder):
            while (lock := hold(folder / META)) is not None:
                try:
                    meta = read_meta(folder)
                    template = Template(key, folder, meta, lock, verified(folder, meta))
                except (Damaged, FileNotFoundError) as damage:
                    if leads_to(folder, lock):  # else it was removed meanwhile, and perhaps made anew
                        self._give_up(folder, damage)
                        return None
                else:
                    with contextlib.suppress(OSError):  # a cache that cannot be written
                        os.utime(lock)  # the time of use, for "least recently used"
                    lock = None
                    return template
                finally:
                    if lock is not None:
                        os.close(lock)
        return None

    @contextlib.contextmanager
    def draft(self) -> Iterator[Path]:
        """Yield a new folder to make a template in; whatever is not published is removed.

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
                with contextlib.suppress(FileNotFoundError):  # a sweep was quicker than our lock
                    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if leads_to(folder, lock, ""):
                        self._drafts[folder] = lock
                        return folder
                    os.close(lock)

    def drop(self, draft: Path) -> None:
        """Remove what :meth:`new_draft` returned; nothing happens to what was published."""
        shutil.rmtree(draft, ignore_errors=True)
        lock = self._drafts.pop(draft, None)
        if lock is not None:
            os.close(lock)

    def publish(self, key: str, draft: Path, meta: dict[str, Any]) -> None:
        """Make ``draft`` the template ``key``: everything on the disk first, then one rename.

        Raises:
            HostError: The disk is full.
        """
        with explained(draft):
            need_space(draft, NOTHING_LEFT)  # else what the machine wrote last may have been lost
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
        """Return all templates, the most recently used first; what is damaged is of kind ``unusable``."""
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

        Machines that somebody kept stay: no run can make them again.
        """
        with explained(self.folder):
            self._sweep()
            for lock in self.locks.glob("*"):
                remove_unheld(lock)
            unused = [entry for entry in self.list() if entry.kind != KEPT]
            return sum(entry.size for entry in unused if remove_unused(self.folder / entry.key))

    def shrink(self, keep: str = "") -> None:
        """Remove the least recently used until all together fit the cap; what somebody kept stays."""
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
        """Take a damaged template out of the way; say so."""
        entry = _stored(folder)
        if entry is not None and entry.kind == KEPT:
            raise HostError(
                f"the kept machine {folder.name} is damaged: {damage}",
                resolution=f"it cannot be made again: `pytest-microvm rm {folder.name}`",
            )
        discard(folder)
        self._say(f"a template in the cache is damaged ({folder.name[:12]}: {damage}): making it again")

    def _make_space(self) -> None:
        """Remove the least recently used until a template can be begun.

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
        """Remove what processes left behind that ended without tidying up (they were killed)."""
        for removed in self.folder.glob(REMOVED + "*"):
            shutil.rmtree(removed, ignore_errors=True)
        for draft in self.folder.glob(_DRAFT + "*"):
            remove_unheld(draft)


def _stored(folder: Path) -> StoredTemplate | None:
    """Return a template's line in lists; ``None`` if it is gone."""
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
