"""Image store: builds missing images, verifies the existing ones, removes unused ones.

Beside the files of :mod:`pytest_microvm.images.artifacts`, the cache folder's ``images/`` holds

``manifests/<digest>.json``  one image: its files' digests, environment and default resources
``names/<name>-<key>.json``  the image that a kit, as it was written then, stands for

each renamed into place once everything that it refers to exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import platformdirs

from pytest_microvm.cache.disk import explained
from pytest_microvm.errors import ImageError, KitError
from pytest_microvm.images.artifacts import Artifact, Artifacts, Built
from pytest_microvm.images.blobs import canonical_json, read_json, sha256_file, write_atomically
from pytest_microvm.images.debian import default_mode
from pytest_microvm.images.image import Image
from pytest_microvm.images.kits import Kit, load_kit
from pytest_microvm.images.mirror.layer import build_layer, libraries_unchanged
from pytest_microvm.images.mirror.selection import select
from pytest_microvm.images.platform import build_platform, platform_recipe
from pytest_microvm.images.rootfs import build_rootfs
from pytest_microvm.programs.needed import require, require_program

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable

    from pytest_microvm.images.mirror.environment import PythonEnvironment
    from pytest_microvm.images.process import Progress

BUILDER_VERSION = 2
"""Increase it when a change of the builder changes the content of images."""

_EPOCH = 1735689600  # 2025-01-01: the newest time stamp in an image, unless SOURCE_DATE_EPOCH says otherwise
_BUILD_SPACE = 512 * 1024**2  # bytes; packages unpacked, beside what is made of them
_FILES = ("kernel", "initramfs", "runtime", "rootfs")
_LAYER = "layer"  # the role of a mirrored environment in its artifact, and in manifests of earlier versions
_KEPT_LAYERS = 3
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_MANIFEST = 1024**2
_NAME_KEYS = {"name", "key", "digest", "kit", "project"}
_LEAST_DIGEST_PREFIX = 6


def cache_root() -> Path:
    """Return the folder for everything this package caches (``PYTEST_MICROVM_CACHE`` overrides)."""
    override = os.environ.get("PYTEST_MICROVM_CACHE")
    if override:
        return Path(override).expanduser().resolve()
    return platformdirs.user_cache_path("pytest-microvm")


@dataclass(frozen=True)
class StoredImage:
    """An image in the store, as listed by ``image list``.

    Args:
        kit: The ``kit.toml`` it was built from.
        current: Whether the kit is unchanged since then.
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
        mode: mmdebstrap's mode, ``root`` or ``unshare``; ``None``: the one available to this user.
    """

    def __init__(self, root: Path, *, mode: str | None = None) -> None:
        self._root = root / "images"
        self._mode = mode
        self._artifacts = Artifacts(self._root, space=_BUILD_SPACE)

    def get(
        self,
        name_or_path: str | Path,
        *,
        project: Path | None = None,
        progress: Progress | None = None,
        force: bool = False,
    ) -> Image:
        """Return a kit's image; build its missing or damaged parts.

        Args:
            name_or_path: A kit's name, its folder, or its ``kit.toml``; or ``sha256:DIGEST`` of a stored
                image, which is not built.
            project: Root of the user's project, which may hold kits of its own.
            progress: Called with each stage as a line of text.
            force: Build everything again.

        Raises:
            KitError: There is no such kit, or it cannot be used.
            ImageError: An image requested by its digest is not in the store.
            HostError: This computer lacks a program that builds images, or disk space.
            BuildError: A step of the build failed; nothing of it is left.
        """
        if by_digest := _DIGEST.fullmatch(str(name_or_path)):
            return self._by_digest(by_digest[1])
        kit = load_kit(name_or_path, project=project)
        tell = _with_time(f"image {kit.name}", progress)
        while True:
            platform = self._platform(kit, tell, force=force)
            rootfs = self._rootfs(kit, platform, tell, force=force)
            image = self._publish(kit, {**platform.files, **rootfs.files}, project)
            if all(path.is_file() for path in image.files().values()):
                return image
            # A concurrent prune: while the second artifact was built, no name referred to the first.
            force = False

    def mirrored(
        self,
        image: Image,
        environment: PythonEnvironment,
        *,
        without: Path | None = None,
        progress: Progress | None = None,
    ) -> Image:
        """Return ``image`` with a Python environment of this computer laid over it, at the same paths.

        The layer is packed again if a file of the environment has changed.

        Args:
            image: The image.
            environment: The environment.
            without: A folder whose editable sources machines get another way: the workspace.
            progress: Called with each stage as a line of text.

        Raises:
            UsageError: The environment cannot be mirrored.
            HostError: This computer lacks a program that packs layers, or disk space.
            BuildError: Packing failed.
        """
        tell = _with_time(f"python {environment.name}", progress)
        selection = select(environment, without=without)
        for folder in selection.editable:
            tell(f"editable sources outside the workspace are mirrored, too: {folder}")
        name = f"layer-{image.name}-{hashlib.sha256(os.fsencode(environment.prefix)).hexdigest()[:8]}"

        def build(folder: Path) -> Built:
            for program in ("mksquashfs", "unsquashfs"):
                require_program(program)
            size = f"{selection.size / 1e6:.0f} MB"
            tell(f"mirroring {environment.describe()}: {len(selection.entries)} files, {size}")
            layer, libraries = build_layer(folder, environment, selection, image.file_systems)
            return Built({_LAYER: layer}, {"libraries": libraries, "python": environment.describe()})

        confined = {"confined": True} if environment.confined else {}
        below = {"layers": [path.name for path in image.layers]} if image.layers else {}
        key = _key({"files": selection.digest, "rootfs": image.rootfs.name, **below, **confined})
        made = self._artifacts.get(name, key, build, tell)
        if not libraries_unchanged(made.facts["libraries"]):
            made = self._artifacts.get(name, key, build, tell, force=True)
        manifest = self._manifest(image.digest)
        if manifest is None:
            raise _absent(image.digest)
        search = f"{environment.prefix}/bin:{manifest['environment'].get('PATH', _PATH)}"
        manifest["environment"] |= {"PATH": search}
        if environment.prefix != environment.base:
            manifest["environment"] |= {"VIRTUAL_ENV": str(environment.prefix)}
        manifest["layers"] = [*manifest.get("layers", []), made.files[_LAYER]]
        manifest["python"] = made.facts["python"]
        entry = {"name": name, "key": key, "kit": "", "project": "", "mirrors": str(environment.prefix)}
        found = self._publish_manifest(manifest, entry)
        self._forget_older(name)
        return replace(found, name=image.name)

    def manifest(self, image: Image) -> bytes:
        """Return the manifest with which another computer's store can :meth:`adopt` an image.

        Raises:
            ImageError: The image is not in the store.
        """
        if self._manifest(image.digest) is None:
            raise _absent(image.digest)
        return self._manifest_path(image.digest).read_bytes()

    def adopt(
        self,
        name: str,
        manifest: bytes,
        fetch: Callable[[str, Path], None],
        progress: Progress | None = None,
    ) -> Image:
        """Store an image that another computer built; afterwards ``get("sha256:DIGEST")`` finds it.

        Args:
            name: Its kit's name, for display.
            manifest: The result of :meth:`manifest` there.
            fetch: ``fetch(digest, path)`` writes the file with this SHA-256 to ``path``; called for each file
                that is missing here.
            progress: Called with stages that take long.

        Raises:
            ImageError: The manifest is invalid, or a fetched file does not match its digest; nothing of it is
                kept.
            HostError: The disk is full, or the cache cannot be written.
        """
        files = _files_of(manifest)
        if not _NAME.fullmatch(name):
            raise ImageError(
                f"invalid image name: expected a kit's name, got {name!r}", resolution="name its kit"
            )
        digest = hashlib.sha256(manifest).hexdigest()
        tell = _with_time(f"image {name}", progress)
        blobs = self._artifacts.blobs
        with explained(self._root), self._artifacts.only_builder(f"image-{digest[:32]}", tell) as folder:
            missing = [file for file in files if not blobs.intact(file)]
            for file in missing:
                tell(f"fetching {file[:12]}")
                fetch(file, folder / file)
                if sha256_file(folder / file) != file:
                    raise ImageError(
                        f"what was sent for file {file[:12]} of image {name} is something else",
                        resolution="see whether the sender's disk or memory is damaged; run again",
                    )
            entry = {"name": name, "key": digest, "digest": digest, "kit": "", "project": ""}
            with self._artifacts.publishing():
                for file in missing:
                    blobs.add(folder / file)
                write_atomically(self._manifest_path(digest), manifest)
                write_atomically(self._root / "names" / f"{name}-{digest[:32]}.json", canonical_json(entry))
        return self._by_digest(digest)

    def _by_digest(self, digest: str) -> Image:
        manifest = self._manifest(digest)
        if manifest is None:
            raise _absent(digest)
        names = [entry["name"] for _path, entry in self._names() if entry["digest"] == digest]
        image = self._image(names[0] if names else "image", digest, manifest)
        if not self.intact(image):
            raise _absent(digest)
        return image

    def intact(self, image: Image) -> bool:
        """Return True if an image's files still match its digest; costs a stat each, mostly."""
        return all(self._artifacts.blobs.intact(path.name) for path in image.files().values())

    def list(self) -> builtins.list[StoredImage]:
        """Return the named images, sorted by name."""
        found = []
        for _path, entry in self._names():
            manifest = self._manifest(entry["digest"])
            if manifest is None:
                continue
            image = self._image(entry["name"], entry["digest"], manifest)
            size = sum(path.stat().st_size for path in image.files().values() if path.is_file())
            found.append(StoredImage(image, Path(entry["kit"]), _is_current(entry), size))
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
            lines = [f"{entry.image.digest[:12]}  {entry.image.name}  {entry.kit}" for entry in matches]
            raise ImageError(
                f"{name_or_digest!r} stands for more than one image",
                details="\n".join(lines),
                resolution="give the digest of one of them",
            )
        raise ImageError(
            f"there is no image {name_or_digest!r} in the cache",
            details="images here: " + (", ".join(sorted({entry.image.name for entry in stored})) or "none"),
            resolution="see `pytest-microvm image list`; build with `pytest-microvm image build KIT`",
        )

    def remove(self, name_or_digest: str) -> int:
        """Remove an image and the files that only it needs.

        Returns:
            Bytes freed.

        Raises:
            ImageError: There is no such image.
        """
        digest = self.inspect(name_or_digest).image.digest
        with explained(self._root), self._artifacts.publishing():
            for path, entry in self._names():
                if entry["digest"] == digest:
                    path.unlink()
            return self._drop_unnamed()

    def prune(self) -> int:
        """Remove images whose kit changed or is gone, files that no image needs, and broken-off builds.

        Returns:
            Bytes freed.
        """
        with explained(self._root), self._artifacts.publishing():
            current = {path for path, entry in self._names() if _is_current(entry)}
            for path in set((self._root / "names").glob("*.json")) - current:
                path.unlink()
            freed = self._drop_unnamed()
        return freed + self._artifacts.drop_broken_off_builds()

    def _platform(self, kit: Kit, tell: Progress, *, force: bool) -> Artifact:
        def build(folder: Path) -> Built:
            require("images")
            made = build_platform(
                folder,
                suite=kit.suite,
                architecture=kit.architecture,
                mirror=kit.mirror,
                mode=self._mode or default_mode(),
                epoch=_source_date_epoch(),
                progress=tell,
            )
            return Built(
                {"kernel": made.kernel, "initramfs": made.initramfs, "runtime": made.runtime},
                {"python": made.python, "kernel_version": made.kernel_version},
            )

        return self._artifacts.get(*platform_name_and_key(kit), build, tell, force=force)

    def _rootfs(self, kit: Kit, platform: Artifact, tell: Progress, *, force: bool) -> Artifact:
        def build(folder: Path) -> Built:
            require("images")
            made = build_rootfs(
                folder,
                kit,
                python=platform.facts["python"],
                mode=self._mode or default_mode(),
                epoch=_source_date_epoch(),
                progress=tell,
            )
            return Built({"rootfs": made}, {})

        return self._artifacts.get(f"rootfs-{kit.name}", _key(kit.recipe()), build, tell, force=force)

    def _publish(self, kit: Kit, files: dict[str, str], project: Path | None) -> Image:
        manifest = {
            "format": BUILDER_VERSION,
            "architecture": kit.architecture,
            "environment": dict(kit.environment),
            "files": files,
            "resources": dict(kit.resources),
            **({"network": list(kit.network)} if kit.network else {}),
        }
        entry = {"name": kit.name, "key": kit_key(kit), "kit": str(kit.path)}
        entry["project"] = str(project.resolve()) if project else ""
        return self._publish_manifest(manifest, entry)

    def _publish_manifest(self, manifest: dict[str, Any], entry: dict[str, str]) -> Image:
        """Store a manifest and the entry that names it; return the image."""
        data = canonical_json(manifest)
        digest = hashlib.sha256(data).hexdigest()
        entry = {**entry, "digest": digest}
        name_path = self._root / "names" / f"{entry['name']}-{entry['key'][:32]}.json"
        if self._manifest(digest) is None or read_json(name_path) != entry:
            # Names serve only lists and prunes: if the cache cannot be written, the image does without one.
            with contextlib.suppress(OSError), self._artifacts.publishing():
                write_atomically(self._manifest_path(digest), data)
                write_atomically(name_path, canonical_json(entry))
        return self._image(entry["name"], digest, manifest)

    def _forget_older(self, name: str) -> None:
        """Remove all but the newest images of a mirrored environment, which grows a layer with every change.

        Some older ones stay for runs that started before, and for kept machines.
        """
        paths = [path for path, entry in self._names() if entry["name"] == name]
        paths.sort(key=lambda path: path.stat().st_mtime_ns)
        if len(paths) > _KEPT_LAYERS:
            with contextlib.suppress(OSError), self._artifacts.publishing():
                for path in paths[:-_KEPT_LAYERS]:
                    path.unlink(missing_ok=True)
                self._drop_unnamed()

    def _image(self, name: str, digest: str, manifest: dict[str, Any]) -> Image:
        paths = {role: self._artifacts.blobs.path(manifest["files"][role]) for role in _FILES}
        return Image(
            name=name,
            digest=digest,
            architecture=manifest["architecture"],
            environment=tuple(sorted(manifest["environment"].items())),
            resources=manifest["resources"],
            network=tuple(manifest.get("network", ())),
            layers=tuple(self._artifacts.blobs.path(layer) for layer in _layers(manifest)),
            python=manifest.get("python", ""),
            **paths,
        )

    def _manifest_path(self, digest: str) -> Path:
        return self._root / "manifests" / f"{digest}.json"

    def _manifest(self, digest: str) -> dict[str, Any] | None:
        """Return the manifest with this digest; ``None`` if it is missing or damaged."""
        try:
            data = self._manifest_path(digest).read_bytes()
        except FileNotFoundError:
            return None
        return dict(json.loads(data)) if hashlib.sha256(data).hexdigest() == digest else None

    def _names(self) -> builtins.list[tuple[Path, dict[str, str]]]:
        paths = sorted((self._root / "names").glob("*.json"))
        return [(path, entry) for path in paths if (entry := read_json(path)) and entry.keys() >= _NAME_KEYS]

    def _drop_unnamed(self) -> int:
        """Delete all manifests and artifacts without a name. The caller holds the publish lock."""
        digests = {entry["digest"] for _path, entry in self._names()}
        needed: set[str] = set()
        for path in (self._root / "manifests").glob("*.json"):
            manifest = self._manifest(path.stem) if path.stem in digests else None
            if manifest is None:
                path.unlink()
            else:
                needed |= {*manifest["files"].values(), *_layers(manifest)}
        return self._artifacts.drop_all_but(needed)


def _layers(manifest: dict[str, Any]) -> list[str]:
    """Return the digests of a manifest's layers, the lowest first; earlier versions had one, as a role."""
    one = manifest["files"].get(_LAYER)
    return [*([] if one is None else [one]), *manifest.get("layers", [])]


def _absent(digest: str) -> ImageError:
    return ImageError(
        f"image sha256:{digest[:12]}... is not in the cache, or is damaged",
        resolution="run again: it is fetched again, or built",
    )


def _files_of(manifest: bytes) -> list[str]:
    """Return the file digests in a manifest from another computer.

    Raises:
        ImageError: It is not a manifest of this version.
    """
    try:
        data = json.loads(manifest) if len(manifest) <= _MAX_MANIFEST else {}
        sound = data["files"].keys() - {_LAYER} == set(_FILES) and isinstance(data.get("layers", []), list)
        found = [*(data["files"][role] for role in _FILES), *_layers(data)]
        files = list(dict.fromkeys(map(str, found)))
        sound = sound and data["format"] == BUILDER_VERSION and canonical_json(data) == manifest
        sound = sound and all(re.fullmatch(r"[0-9a-f]{64}", file) for file in files)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ImageError(
            "what was sent is no image of this version", resolution="install the same version on both sides"
        )
    return files


def platform_name_and_key(kit: Kit) -> tuple[str, str]:
    """Return the name and key of the platform artifact that a kit shares with all kits of its suite."""
    key = _key(platform_recipe(kit.suite, kit.architecture, kit.mirror))
    return f"platform-{kit.suite}-{kit.architecture}", key


def _source_date_epoch() -> int:
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(text) if re.fullmatch(r"\d{1,10}", text) else _EPOCH


def _key(recipe: dict[str, Any]) -> str:
    shaped = {"builder": BUILDER_VERSION, "epoch": _source_date_epoch(), "recipe": recipe}
    return hashlib.sha256(canonical_json(shaped)).hexdigest()


def kit_key(kit: Kit) -> str:
    """Return a digest of all inputs of a kit's image, including platform and builder."""
    platform = platform_recipe(kit.suite, kit.architecture, kit.mirror)
    return _key(
        {"kit": kit.recipe(), "resources": dict(kit.resources), "network": kit.network, "platform": platform}
    )


def _is_current(entry: dict[str, str]) -> bool:
    """Return True if a name's kit is unchanged since it was written, or its mirrored environment exists."""
    if mirrored := entry.get("mirrors"):
        return Path(mirrored).is_dir()
    project = Path(entry["project"]) if entry.get("project") else None
    try:
        return kit_key(load_kit(Path(entry["kit"]), project=project)) == entry["key"]
    except KitError:
        return False


def _with_time(subject: str, progress: Progress | None) -> Progress:
    """Return a progress callback that adds the subject and the elapsed seconds to each stage."""
    began = monotonic()

    def tell(stage: str) -> None:
        if progress is not None:
            progress(f"{subject}: {stage} ({monotonic() - began:.0f} s)")

    return tell
