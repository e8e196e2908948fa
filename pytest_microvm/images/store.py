"""Image store: builds missing images, verifies the existing ones, removes unused ones.

The cache folder's ``images/`` holds the files of :mod:`pytest_microvm.images.artifacts` and the records of
:mod:`pytest_microvm.images.records`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import platformdirs

from pytest_microvm.cache.disk import explained
from pytest_microvm.errors import ImageError, KitError, UsageError
from pytest_microvm.images.artifacts import Artifacts, Built
from pytest_microvm.images.blobs import canonical_json, sha256_file, write_atomically
from pytest_microvm.images.build_keys import BUILDER_VERSION, build_key, kit_key
from pytest_microvm.images.image import Image
from pytest_microvm.images.kit_images import KitImages
from pytest_microvm.images.kits import Kit, find_kit, host_architecture, kit_names, load_kit
from pytest_microvm.images.mirror.layer import build_layer, libraries_unchanged
from pytest_microvm.images.mirror.selection import select
from pytest_microvm.images.oci.pulled import PulledImages
from pytest_microvm.images.oci.pulling import TIMEOUT, drop_downloads
from pytest_microvm.images.oci.references import (
    Reference,
    is_reference,
    parse_platform,
    parse_reference,
    parse_target,
    platform_of,
)
from pytest_microvm.images.records import LAYER, ROLES, ImageRecords, absent, file_name, layers_of
from pytest_microvm.images.set_up import RunSetUp, no_machine
from pytest_microvm.programs.needed import require_program
from pytest_microvm.untrusted.nofollow import refuse_links

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable

    from pytest_microvm.images.mirror.environment import PythonEnvironment
    from pytest_microvm.images.process import Progress

_BUILD_SPACE = 512 * 1024**2  # bytes; packages unpacked, beside what is made of them
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_MANIFEST = 1024**2
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
        reference: The reference that it was pulled by; empty for a kit's image.
        manifest: The digest of its manifest at the place it was pulled from.
    """

    image: Image
    kit: Path
    current: bool
    size_bytes: int
    reference: str = ""
    manifest: str = ""

    @property
    def origin(self) -> str:
        """What it was made from, for display."""
        return self.reference or (str(self.kit) if self.current else f"{self.kit} (changed since)")


class ImageStore:
    """Images in a folder.

    Args:
        root: The cache folder; see :func:`cache_root`.
        mode: mmdebstrap's mode, ``root`` or ``unshare``; ``None``: the one available to this user.
        set_up: Runs the set-up of kits in a machine; see :class:`pytest_microvm.host.host.Host`.
    """

    def __init__(self, root: Path, *, mode: str | None = None, set_up: RunSetUp = no_machine) -> None:
        self._root = root / "images"
        self._artifacts = Artifacts(self._root, space=_BUILD_SPACE)
        self._records = ImageRecords(self._root, self._artifacts)
        self._kits = KitImages(self._records, self._artifacts, mode, set_up)
        self._pulled = PulledImages(
            self._root, self._records, self._artifacts, self._kits.platform_for, BUILDER_VERSION
        )

    def get(
        self,
        name_or_path: str | Path,
        *,
        project: Path | None = None,
        progress: Progress | None = None,
        force: bool = False,
        at: str = "",
    ) -> Image:
        """Return a kit's image, its missing or damaged parts built; or a container image, pulled if missing.

        Args:
            name_or_path: A kit's name, its folder, or its ``kit.toml``; a container image's reference, or the
                name that it was pulled as; or ``sha256:DIGEST`` of a stored image, which is not built.
            project: Root of the user's project, which may hold kits of its own.
            progress: Called with each stage as a line of text.
            force: Build everything again.
            at: The digest to pull a missing container image at, which its registry must have.

        Raises:
            KitError: There is no such kit, or it cannot be used.
            ImageError: An image requested by its digest is not in the store, or a container image cannot be
                pulled.
            HostError: This computer lacks a program that builds images, or disk space.
            BuildError: A step of the build failed; nothing of it is left.
        """
        if by_digest := _DIGEST.fullmatch(str(name_or_path)):
            return self._records.by_digest(by_digest[1])
        if is_reference(str(name_or_path)):
            return self._referred(str(name_or_path), project, progress, at)
        if isinstance(name_or_path, str) and self._pulled.has(name_or_path):
            return self._named(name_or_path, project, progress)
        kit = load_kit(name_or_path, project=project)
        tell = _with_time(f"image {kit.name}", progress)
        while True:
            image = self._kits.build(
                kit,
                tell,
                project=project,
                force=force,
                container=lambda kit: self._container(kit, tell, force=force),  # noqa: B023 - called at once
            )
            if all(path.is_file() for path in image.files().values()):
                return image
            # A concurrent prune: while the second artifact was built, no name referred to the first.
            force = False

    def pull(
        self,
        reference: str,
        *,
        base: Path,
        platform: str = "",
        name: str = "",
        timeout: float = TIMEOUT,
        progress: Progress | None = None,
        at: str = "",
    ) -> Image:
        """Pull a container image again, or for the first time.

        Args:
            reference: Its reference.
            base: The folder that relative paths are relative to.
            platform: Its platform, such as ``linux/arm64``; this computer's if empty.
            name: A name for it, besides its reference.
            timeout: Seconds without a byte after which a registry counts as hanging.
            progress: Called with each stage as a line of text.
            at: The digest to pull in place of what the reference leads to now, which its registry must have.

        Raises:
            UsageError: The reference, the platform or the name is invalid, or its folder is behind a link.
            PullError: The image cannot be had, or is refused.
            HostError: A program is missing, or the disk is full.
        """
        parsed = _reference(reference, base)
        wanted = parse_platform(platform) if platform else platform_of(host_architecture())
        if name and name in kit_names(base):
            raise UsageError(
                f"a kit is called {name!r}, too", resolution="give the pulled image another name (--as)"
            )
        return self._pulled.pull(
            parsed, wanted, _with_time(str(parsed), progress), name=name, timeout=timeout, at=at
        )

    def push(
        self,
        image: Image,
        target: str,
        *,
        timeout: float = TIMEOUT,
        progress: Progress | None = None,
    ) -> Reference:
        """Push an image to a registry, for :meth:`pull` on other computers; its digest is the same there.

        Args:
            image: The image.
            target: The name that it gets, ``REGISTRY/NAME[:TAG]``.
            timeout: Seconds without a sign of progress after which a registry counts as hanging.
            progress: Called with each stage as a line of text.

        Returns:
            The reference to it by its digest.

        Raises:
            UsageError: The name is invalid, or the image cannot be pushed.
            ImageError: It is damaged.
            PullError: The registry does not take it, or cannot be reached.
            HostError: A program is missing, or the disk is full.
        """
        parsed = parse_target(target)
        return self._pulled.push(image, parsed, _with_time(str(parsed), progress), timeout=timeout)

    def pull_record(self, name: str, base: Path, platform: str = "") -> dict[str, str] | None:
        """Return the record of a container image's last pull; ``None`` if there is none.

        Args:
            name: Its reference, or the name that it was pulled as.
            base: The folder that relative paths are relative to.
            platform: Its platform; this computer's if empty.
        """
        if not is_reference(name):
            return self._pulled.record_of(name)
        wanted = parse_platform(platform) if platform else platform_of(host_architecture())
        return self._pulled.record(_reference(name, base), wanted)

    def damaged(self, digest: str) -> str:
        """Return the SHA-256 that a stored file has in place of its own; empty: it is intact, or missing."""
        path = self._artifacts.blobs.path(digest)
        return sha256_file(path) if path.is_file() and not self._artifacts.blobs.intact(digest) else ""

    def is_pulled(self, name: str) -> bool:
        """Return True if the user has pulled an image as ``name``."""
        return self._pulled.has(name)

    def check(self, name: str, project: Path) -> None:
        """Check that an image's kit exists, or that its reference is valid.

        Raises:
            KitError: There is no such kit, and no pulled image of that name.
            UsageError: The reference is invalid.
        """
        if is_reference(name):
            parse_reference(name, project)
        elif not self.is_pulled(name):
            find_kit(name, project=project)

    def is_container(self, name: str) -> bool:
        """Return True if an image's text is no kit's: a reference, a pulled image's name, or a digest."""
        return is_reference(name) or self.is_pulled(name) or _DIGEST.fullmatch(name) is not None

    def names_command(self, name: str, project: Path) -> bool:
        """Return True if an image is a container image or built on one, which may name a command itself."""
        return self.is_container(name) or bool(load_kit(name, project=project).source)

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
        name = (
            f"layer-{file_name(image.name)}-{hashlib.sha256(os.fsencode(environment.prefix)).hexdigest()[:8]}"
        )

        def build(folder: Path) -> Built:
            for program in ("mksquashfs", "unsquashfs"):
                require_program(program)
            size = f"{selection.size / 1e6:.0f} MB"
            tell(f"mirroring {environment.describe()}: {len(selection.entries)} files, {size}")
            layer, libraries = build_layer(folder, environment, selection, image.file_systems)
            return Built({LAYER: layer}, {"libraries": libraries, "python": environment.describe()})

        confined = {"confined": True} if environment.confined else {}
        below = {"layers": [path.name for path in image.layers]} if image.layers else {}
        key = build_key({"files": selection.digest, "rootfs": image.rootfs.name, **below, **confined})
        made = self._artifacts.get(name, key, build, tell)
        if not libraries_unchanged(made.facts["libraries"]):
            made = self._artifacts.get(name, key, build, tell, force=True)
        manifest = self._records.manifest(image.digest)
        if manifest is None:
            raise absent(image.digest)
        search = f"{environment.prefix}/bin:{manifest['environment'].get('PATH', _PATH)}"
        manifest["environment"] |= {"PATH": search}
        if environment.prefix != environment.base:
            manifest["environment"] |= {"VIRTUAL_ENV": str(environment.prefix)}
        manifest["layers"] = [*manifest.get("layers", []), made.files[LAYER]]
        manifest["python"] = made.facts["python"]
        entry = {"name": name, "key": key, "kit": "", "project": "", "mirrors": str(environment.prefix)}
        found = self._records.publish(manifest, entry)
        self._records.forget_older(name)
        return replace(found, name=image.name)

    def manifest(self, image: Image) -> bytes:
        """Return the manifest with which another computer's store can :meth:`adopt` an image.

        Raises:
            ImageError: The image is not in the store.
        """
        if self._records.manifest(image.digest) is None:
            raise absent(image.digest)
        return self._records.manifest_path(image.digest).read_bytes()

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
        if not (_NAME.fullmatch(name) or is_reference(name)):
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
                write_atomically(self._records.manifest_path(digest), manifest)
                write_atomically(self._records.name_path(entry), canonical_json(entry))
        return self._records.by_digest(digest)

    def intact(self, image: Image) -> bool:
        """Return True if an image's files still match its digest; costs a stat each, mostly."""
        return self._records.intact(image)

    def list(self) -> builtins.list[StoredImage]:
        """Return the named images, sorted by name."""
        found = []
        for _path, entry in self._records.names():
            manifest = self._records.manifest(entry["digest"])
            if manifest is None:
                continue
            image = self._records.image(entry["name"], entry["digest"], manifest)
            size = sum(path.stat().st_size for path in image.files().values() if path.is_file())
            pulled = (entry.get("reference", ""), entry.get("manifest", ""))
            found.append(StoredImage(image, Path(entry["kit"]), _is_current(entry), size, *pulled))
        return sorted(found, key=lambda stored: (stored.image.name, stored.image.digest))

    def inspect(self, name_or_digest: str) -> StoredImage:
        """Return an image by its kit's name, its reference, the name that it was pulled as, or its digest.

        Six characters of a digest are enough if unique.

        Raises:
            ImageError: There is none, or more than one.
        """
        stored = self.list()
        if is_reference(name_or_digest):
            name_or_digest = str(parse_reference(name_or_digest, Path.cwd()))
        matches = [entry for entry in stored if entry.image.name == name_or_digest]
        matches = [entry for entry in matches if entry.current] or matches
        if not matches and len(name_or_digest) >= _LEAST_DIGEST_PREFIX:
            matches = [entry for entry in stored if entry.image.digest.startswith(name_or_digest)]
        if len({entry.image.digest for entry in matches}) == 1:
            return matches[0]
        if matches:
            lines = [f"{entry.image.digest[:12]}  {entry.image.name}  {entry.origin}" for entry in matches]
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
            for path, entry in self._records.names():
                if entry["digest"] == digest:
                    path.unlink()
            return self._records.drop_unnamed()

    def prune(self) -> int:
        """Remove images whose kit changed or is gone, files that no image needs, and broken-off builds.

        Returns:
            Bytes freed.
        """
        with explained(self._root), self._artifacts.publishing():
            current = {path for path, entry in self._records.names() if _is_current(entry)}
            for path in set((self._root / "names").glob("*.json")) - current:
                path.unlink()
            freed = self._records.drop_unnamed()
        return freed + self._artifacts.drop_broken_off_builds() + drop_downloads(self._artifacts, self._root)

    def _referred(self, text: str, project: Path | None, progress: Progress | None, at: str) -> Image:
        """Return the container image that was pulled last by a reference; pull it if there is none."""
        reference, platform = _reference(text, project or Path.cwd()), platform_of(host_architecture())
        tell = _with_time(text, progress)
        return self._pulled.find(reference, platform, tell) or self._pulled.pull(
            reference, platform, tell, at=at
        )

    def _named(self, name: str, project: Path | None, progress: Progress | None) -> Image:
        """Return the container image that was pulled under a name.

        Raises:
            KitError: A kit has the name, too. A branch must not redefine a name that its user chose.
        """
        if name in kit_names(project):
            raise KitError(
                f"{name!r} is the name of a kit, and of a pulled image",
                resolution=f"name the kit by its path, or `pytest-microvm image remove {name}`",
            )
        return self._pulled.named(name, _with_time(f"image {name}", progress))

    def _container(self, kit: Kit, tell: Progress, *, force: bool) -> Image:
        """Return the container image that a kit is built on: the one that was pulled last; else pull it."""
        reference, platform = _reference(kit.source, kit.source_base), platform_of(kit.architecture)
        found = None if force else self._pulled.find(reference, platform, tell)
        return found or self._pulled.pull(reference, platform, tell)


def _files_of(manifest: bytes) -> list[str]:
    """Return the file digests in a manifest from another computer.

    Raises:
        ImageError: It is not a manifest of this version.
    """
    try:
        data = json.loads(manifest) if len(manifest) <= _MAX_MANIFEST else {}
        sound = data["files"].keys() - {LAYER} == set(ROLES) and isinstance(data.get("layers", []), list)
        found = [*(data["files"][role] for role in ROLES), *layers_of(data)]
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


def _reference(text: str, base: Path) -> Reference:
    """Parse a reference; its path must not go through a link below ``base``, which a stranger may have made.

    Raises:
        UsageError: It is invalid, or does.
    """
    reference = parse_reference(text, base)
    if reference.transport in ("oci", "oci-archive"):
        refuse_links(base, Path(reference.name))
    return reference


def _is_current(entry: dict[str, str]) -> bool:
    """Return True if a name's kit is unchanged since it was written, or its mirrored environment exists.

    A pulled image is current as long as it has a name.
    """
    if entry.get("reference"):
        return True
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
