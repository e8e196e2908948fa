"""Cache build results: one builder at a time across processes, results verified before each use.

Layout of the folder:

``blobs/sha256/<digest>``       every file of every artifact, once
``artifacts/<name>-<key>.json`` a build's result: the digests of its files; the key covers all inputs
``building/<name>.*/``          a build in progress; nothing refers to it
``locks/``                      one file lock for each name, and one for publishing

Blobs are renamed into place before the artifact that names them, so no artifact is ever partial.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pytest_microvm.cache.disk import explained, need_space
from pytest_microvm.images.blobs import Blobs, canonical_json, read_json, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_microvm.images.process import Progress


@dataclass(frozen=True)
class Built:
    """The output of a build function, in its folder: files by role, and facts about them."""

    files: dict[str, Path]
    facts: dict[str, str]


@dataclass(frozen=True)
class Artifact:
    """A stored build result: digests of files by role, and facts about them."""

    files: dict[str, str]
    facts: dict[str, str]


class Artifacts:
    """Artifacts in a folder.

    Args:
        root: The folder; created when the first artifact is built.
        space: Bytes that must be free when a build begins.
    """

    def __init__(self, root: Path, *, space: int = 0) -> None:
        self._root = root
        self._space = space
        self.blobs = Blobs(root / "blobs" / "sha256")

    def get(
        self, name: str, key: str, build: Callable[[Path], Built], tell: Progress, *, force: bool = False
    ) -> Artifact:
        """Return an artifact with intact files; build it if it is missing or damaged.

        Args:
            name: Its name, for display and for the lock.
            key: Identifies all its inputs.
            build: Builds it in the empty folder that it is given.
            tell: Called with a line about waits and damage.
            force: Build even if it is cached.

        Raises:
            HostError: The disk is full, or the cache cannot be written.
        """
        path = self._path(name, key)
        if not force and (found := self._intact(path)):
            return found
        seen = _version(path)
        with explained(self._root), self.only_builder(name, tell) as folder:
            # Another process may have built it while this one waited.
            if (not force or _version(path) != seen) and (found := self._intact(path, tell)):
                return found
            need_space(self._root, self._space)
            built = build(folder)
            with self.publishing():
                files = {role: self.blobs.add(file) for role, file in built.files.items()}
                entry: dict[str, Any] = {"files": files, "facts": built.facts}
                write_atomically(path, canonical_json({**entry, "seal": _seal(entry)}))
            return Artifact(files, built.facts)

    def find(self, name: str, key: str) -> Artifact | None:
        """Return an artifact with intact files; ``None`` if it is missing or damaged."""
        return self._intact(self._path(name, key))

    def drop_all_but(self, needed: set[str]) -> int:
        """Delete all blobs that are not needed, and the artifacts that refer to them.

        The caller holds :meth:`publishing`.

        Returns:
            Bytes freed.
        """
        for path in (self._root / "artifacts").glob("*.json"):
            entry = read_json(path)
            if entry is None or not set(entry.get("files", {}).values()) <= needed:
                path.unlink()
        unneeded = [digest for digest in self.blobs.digests() if digest not in needed]
        return sum(self.blobs.remove(digest) for digest in unneeded)

    def drop_broken_off_builds(self) -> int:
        """Delete the folders of builds that ended without cleaning up (a power cut, SIGKILL).

        Returns:
            Bytes freed.
        """
        freed = 0
        for folder in (self._root / "building").glob("*"):
            lock = self._lock(f"build-{folder.name.rpartition('.')[0]}")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue  # that build is under way
            try:
                freed += sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                lock.release()
        return freed

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Hold the lock that keeps a prune from deleting files while they are published."""
        with self._lock("publish"):
            yield

    def _intact(self, path: Path, tell: Progress | None = None) -> Artifact | None:
        """Return an artifact if its files are intact; with ``tell``, report and delete damaged ones."""
        artifact = _read(path)
        if artifact is None:
            if tell and path.exists():
                tell(f"the cache's {path.name} is damaged: building it again")
            return None
        damaged = {role: digest for role, digest in artifact.files.items() if not self.blobs.intact(digest)}
        if tell:
            for role, digest in damaged.items():
                tell(f"the cache's {role} is damaged or gone: building it again")
                self.blobs.remove(digest)
        return None if damaged else artifact

    @contextmanager
    def only_builder(self, name: str, tell: Progress) -> Iterator[Path]:
        """Hold the build lock of ``name``, and yield an empty folder that is removed afterwards."""
        lock = self._lock(f"build-{name}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell("waiting for another process that is building it")
            lock.acquire()
        try:
            building = self._root / "building"
            building.mkdir(parents=True, exist_ok=True)
            for broken_off in building.glob(f"{name}.*"):
                shutil.rmtree(broken_off, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(dir=building, prefix=f"{name}."))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            lock.release()

    def _path(self, name: str, key: str) -> Path:
        return self._root / "artifacts" / f"{name}-{key[:32]}.json"

    def _lock(self, name: str) -> FileLock:
        folder = self._root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")


def _read(path: Path) -> Artifact | None:
    """Return the artifact in a record; ``None`` if it is missing or damaged."""
    entry = read_json(path) or {}
    seal = entry.pop("seal", None)
    if seal not in (None, _seal(entry)):  # records of older versions have none
        return None
    files, facts = entry.get("files"), entry.get("facts")
    return Artifact(files, facts) if isinstance(files, dict) and isinstance(facts, dict) else None


def _seal(entry: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(entry)).hexdigest()


def _version(path: Path) -> tuple[int, int] | None:
    """Return a value that changes whenever a file is replaced; ``None`` if the file is missing."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
