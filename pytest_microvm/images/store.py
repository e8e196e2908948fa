"""Keep images: build the ones that are missing, verify the ones that are there, drop the rest.

Layout of the cache folder's ``images/``:

``blobs/sha256/<digest>``       every file of every image, once
``artifacts/<name>-<key>.json`` what a build made: the digests of its files; ``key`` is the digest of all inputs
``manifests/<digest>.json``     one image: its files' digests, environment and default resources
``names/<name>-<key>.json``     which image a kit, as it is written now, stands for
``building/<name>.*/``          a build in progress; nothing refers to it
``locks/``                      one builder at a time for each artifact, across processes

A reader sees a blob, then an artifact, then a manifest, then a name, each by rename: never half an image.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import platformdirs
from filelock import FileLock, Timeout

from pytest_microvm.errors import ImageError, KitError
from pytest_microvm.images.blobs import Blobs, write_atomically
from pytest_microvm.images.debian import default_mode
from pytest_microvm.images.image import Image
from pytest_microvm.images.kits import Kit, load_kit
from pytest_microvm.images.platform import build_platform, platform_recipe
from pytest_microvm.images.process import require_programs
from pytest_microvm.images.rootfs import build_rootfs
from pytest_microvm.images.squashfs import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUILDER_VERSION = 1
"""Raise it when the builder's own work changes what an image holds."""

_EPOCH = 1735689600  # 2025-01-01: the newest time stamp in an image, unless SOURCE_DATE_EPOCH says otherwise
_FILES = ("kernel", "initramfs", "runtime", "rootfs")
_LEAST_DIGEST_PREFIX = 6


def cache_root() -> Path:
    """Return the folder for everything this package caches (``PYTEST_MICROVM_CACHE`` overrides)."""
    override = os.environ.get("PYTEST_MICROVM_CACHE")
    return Path(override).expanduser().resolve() if override else platformdirs.user_cache_path("pytest-microvm")


@dataclass(frozen=True)
class _Artifact:
    """What one build made: file digests by role, and facts about them."""

    files: dict[str, str]
    facts: dict[str, str]


@dataclass(frozen=True)
class StoredImage:
    """An image in the store, as ``image list`` tells it.

    Args:
        kit: The ``kit.toml`` it was built from.
        current: Whether the kit still says what it said then.
        size_bytes: Bytes of its files, shared ones included.
    """

    image: Image
    kit: Path
    current: bool
    size_bytes: int


class ImageStore:
    """Images in a folder.

    Args:
        root: The cache folder; see :func:`cache_root`.
        mode: mmdebstrap's mode, ``root`` or ``unshare``; ``None`` for what this user can do.
    """

    def __init__(self, root: Path, *, mode: str | None = None) -> None:
        self._root = root / "images"
        self._mode = mode
        self._blobs = Blobs(self._root / "blobs" / "sha256")

    def get(
        self, name_or_path: str | Path, *, project: Path | None = None, progress: Progress | None = None,
        force: bool = False,
    ) -> Image:  # fmt: skip
        """Return a kit's image; build what is missing or damaged.

        Args:
            name_or_path: A kit's name, its folder, or its ``kit.toml``.
            project: Root of the user's project, which may hold kits of its own.
            progress: Told each stage as a line of text.
            force: Build everything again.

        Raises:
            KitError: There is no such kit, or it cannot be used.
            HostError: This computer lacks a program that builds images.
            BuildError: A step of the build failed; nothing of it is left.
        """
        kit = load_kit(name_or_path, project=project)
        tell = _with_time(f"image {kit.name}", progress)
        platform = self._platform(kit, tell, force=force)
        rootfs = self._rootfs(kit, platform, tell, force=force)
        return self._publish(kit, {**platform.files, **rootfs.files})

    def list(self) -> list[StoredImage]:
        """Return the images that names stand for, by name."""
        found = []
        for _path, entry in self._names():
            manifest = self._manifest(entry["digest"])
            if manifest is None:
                continue
            image = self._image(entry["name"], entry["digest"], manifest)
            size = sum(p.stat().st_size for p in map(self._blobs.path, manifest["files"].values()) if p.is_file())
            found.append(StoredImage(image, Path(entry["kit"]), self._is_current(entry), size))
        return sorted(found, key=lambda stored: (stored.image.name, stored.image.digest))

    def inspect(self, name_or_digest: str) -> StoredImage:
        """Return an image by its kit's name or by its digest (six characters are enough if unique).

        Raises:
            ImageError: There is none, or more than one.
        """
        stored = self.list()
        matches = [entry for entry in stored if entry.image.name == name_or_digest]
        matches = [entry for entry in matches if entry.current] or matches
        if not matches and len(name_or_digest) >= _LEAST_DIGEST_PREFIX:
            matches = [entry for entry in stored if entry.image.digest.startswith(name_or_digest)]
        if len({entry.image.digest for entry in matches}) == 1:
            return matches[0]
        if matches:
            raise ImageError(
                f"{name_or_digest!r} stands for more than one image",
                details="\n".join(f"{entry.image.digest[:12]}  {entry.image.name}  {entry.kit}" for entry in matches),
                resolution="give the digest of one of them",
            )
        raise ImageError(
            f"there is no image {name_or_digest!r} in the cache",
            details="images here: " + (", ".join(sorted({entry.image.name for entry in stored})) or "none"),
            resolution=f"build it: pytest-microvm image build {name_or_digest}",
        )

    def remove(self, name_or_digest: str) -> int:
        """Remove an image and what only it needed.

        Returns:
            Bytes freed.

        Raises:
            ImageError: There is no such image.
        """
        digest = self.inspect(name_or_digest).image.digest
        with self._publishing():
            for path, entry in self._names():
                if entry["digest"] == digest:
                    path.unlink()
            self._manifest_path(digest).unlink(missing_ok=True)
            return self._drop_unreferenced()

    def prune(self) -> int:
        """Remove images whose kit changed or is gone, files that no image needs, and broken-off builds.

        Returns:
            Bytes freed.
        """
        with self._publishing():
            for path, entry in self._names():
                if not self._is_current(entry):
                    path.unlink()
            freed = self._drop_unreferenced()
        return freed + self._drop_broken_off_builds()

    # -- building -------------------------------------------------------------------------------------

    def _platform(self, kit: Kit, tell: Progress, *, force: bool) -> _Artifact:
        recipe = platform_recipe(kit.suite, kit.architecture, kit.mirror)

        def build(folder: Path) -> _Artifact:
            made = build_platform(
                folder, suite=kit.suite, architecture=kit.architecture, mirror=kit.mirror,
                mode=self._mode or default_mode(), epoch=_source_date_epoch(), progress=tell,
            )  # fmt: skip
            files = {"kernel": made.kernel, "initramfs": made.initramfs, "runtime": made.runtime}
            facts = {"python": made.python, "kernel_version": made.kernel_version}
            return _Artifact({role: self._blobs.add(path) for role, path in files.items()}, facts)

        return self._artifact(f"platform-{kit.suite}-{kit.architecture}", recipe, build, tell, force=force)

    def _rootfs(self, kit: Kit, platform: _Artifact, tell: Progress, *, force: bool) -> _Artifact:
        def build(folder: Path) -> _Artifact:
            made = build_rootfs(
                folder, kit, python=platform.facts["python"],
                mode=self._mode or default_mode(), epoch=_source_date_epoch(), progress=tell,
            )  # fmt: skip
            return _Artifact({"rootfs": self._blobs.add(made)}, {})

        return self._artifact(f"rootfs-{kit.name}", kit.recipe(), build, tell, force=force)

    def _artifact(
        self, name: str, recipe: dict[str, Any], build: Callable[[Path], _Artifact], tell: Progress, *, force: bool
    ) -> _Artifact:
        """Return an artifact whose files are intact; build it if need be, one process at a time."""
        path = self._root / "artifacts" / f"{name}-{_key(recipe)[:32]}.json"
        if not force and (found := self._intact_artifact(path)):
            return found
        asked = _mtime_ns(path)
        with self._building(name, tell) as folder:
            # Another process may have built it while this one waited.
            if (not force or _mtime_ns(path) != asked) and (found := self._intact_artifact(path, tell)):
                return found
            require_programs()
            artifact = build(folder)
            entry = {"files": artifact.files, "facts": artifact.facts, "recipe": recipe}
            with self._publishing():
                lost = [digest for digest in artifact.files.values() if not self._blobs.path(digest).is_file()]
                assert not lost, "a prune ran between a blob and its artifact"
                write_atomically(path, _canonical(entry))
            return artifact

    def _intact_artifact(self, path: Path, tell: Progress | None = None) -> _Artifact | None:
        try:
            entry = json.loads(path.read_bytes())
            artifact = _Artifact(dict(entry["files"]), dict(entry["facts"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            if tell:
                tell(f"{path.name} is damaged: building again")
            return None
        for role, digest in artifact.files.items():
            if not self._blobs.intact(digest):
                if tell:
                    tell(f"the {role} in the cache is damaged or gone: building it again")
                    self._blobs.remove(digest)
                return None
        return artifact

    @contextmanager
    def _building(self, name: str, tell: Progress) -> Iterator[Path]:
        """Give an empty folder to the only builder of ``name``; it is gone afterwards."""
        lock = self._lock(f"build-{name}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell("waiting for another process that builds it")
            lock.acquire()
        try:
            (self._root / "building").mkdir(parents=True, exist_ok=True)
            for stale in (self._root / "building").glob(f"{name}.*"):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(
                dir=self._root / "building", prefix=f"{name}.", ignore_cleanup_errors=True
            ) as folder:
                yield Path(folder)
        finally:
            lock.release()

    # -- publishing and dropping ----------------------------------------------------------------------

    def _publish(self, kit: Kit, files: dict[str, str]) -> Image:
        manifest = {
            "format": BUILDER_VERSION,
            "architecture": kit.architecture,
            "environment": dict(kit.environment),
            "files": files,
            "resources": {"cpus": kit.cpus, "memory": kit.memory_bytes, "disk": kit.disk_bytes},
        }
        data = _canonical(manifest)
        digest = hashlib.sha256(data).hexdigest()
        key = _kit_key(kit)
        name_path = self._root / "names" / f"{kit.name}-{key[:32]}.json"
        entry = {"name": kit.name, "key": key, "digest": digest, "kit": str(kit.path)}
        if self._manifest(digest) is None or _read_json(name_path) != entry:
            with self._publishing():
                write_atomically(self._manifest_path(digest), data)
                write_atomically(name_path, _canonical(entry))
        return self._image(kit.name, digest, manifest)

    def _image(self, name: str, digest: str, manifest: dict[str, Any]) -> Image:
        paths = {role: self._blobs.path(manifest["files"][role]) for role in _FILES}
        resources = manifest["resources"]
        return Image(
            name=name,
            digest=digest,
            architecture=manifest["architecture"],
            environment=tuple(sorted(manifest["environment"].items())),
            cpus=resources["cpus"],
            memory_bytes=resources["memory"],
            disk_bytes=resources["disk"],
            **paths,
        )

    def _manifest_path(self, digest: str) -> Path:
        return self._root / "manifests" / f"{digest}.json"

    def _manifest(self, digest: str) -> dict[str, Any] | None:
        """Return a manifest whose content has the digest it is named by."""
        try:
            data = self._manifest_path(digest).read_bytes()
        except FileNotFoundError:
            return None
        return dict(json.loads(data)) if hashlib.sha256(data).hexdigest() == digest else None

    def _names(self) -> list[tuple[Path, dict[str, str]]]:
        paths = sorted((self._root / "names").glob("*.json"))
        return [(path, entry) for path in paths if (entry := _read_json(path)) is not None and "digest" in entry]

    def _is_current(self, entry: dict[str, str]) -> bool:
        try:
            return _kit_key(load_kit(Path(entry["kit"]))) == entry["key"]
        except KitError:
            return False

    def _drop_unreferenced(self) -> int:
        """Delete manifests, artifacts and blobs that no name leads to. The caller holds the publish lock."""
        digests = {entry["digest"] for _path, entry in self._names()}
        needed: set[str] = set()
        for path in (self._root / "manifests").glob("*.json"):
            manifest = self._manifest(path.stem) if path.stem in digests else None
            if manifest is None:
                path.unlink()
            else:
                needed |= set(manifest["files"].values())
        for path in (self._root / "artifacts").glob("*.json"):
            entry = _read_json(path)
            if entry is None or not set(entry.get("files", {}).values()) <= needed:
                path.unlink()
        return sum(self._blobs.remove(digest) for digest in list(self._blobs.digests()) if digest not in needed)

    def _drop_broken_off_builds(self) -> int:
        freed = 0
        for folder in (self._root / "building").glob("*"):
            lock = self._lock(f"build-{folder.name.rpartition('.')[0]}")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue  # that build is under way
            try:
                freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                lock.release()
        return freed

    @contextmanager
    def _publishing(self) -> Iterator[None]:
        """Keep prune from deleting what is just being published."""
        with self._lock("publish"):
            yield

    def _lock(self, name: str) -> FileLock:
        folder = self._root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")


def _source_date_epoch() -> int:
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(text) if re.fullmatch(r"\d{1,10}", text) else _EPOCH


def _key(recipe: dict[str, Any]) -> str:
    shaped = {"builder": BUILDER_VERSION, "epoch": _source_date_epoch(), "recipe": recipe}
    return hashlib.sha256(_canonical(shaped)).hexdigest()


def _kit_key(kit: Kit) -> str:
    resources = {"cpus": kit.cpus, "memory": kit.memory_bytes, "disk": kit.disk_bytes}
    platform = platform_recipe(kit.suite, kit.architecture, kit.mirror)
    return _key({"kit": kit.recipe(), "resources": resources, "platform": platform})


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True).encode() + b"\n"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _with_time(subject: str, progress: Progress | None) -> Progress:
    """Return a progress function that puts the subject and the seconds since now before each stage."""
    began = monotonic()

    def tell(stage: str) -> None:
        if progress is not None:
            progress(f"{subject}: {stage} ({monotonic() - began:.0f} s)")

    return tell
