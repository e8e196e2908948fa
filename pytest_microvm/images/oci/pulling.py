"""Pull a container image: find it, fetch the layers that are not stored yet, convert them one by one."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_microvm.cache.disk import explained, need_space
from pytest_microvm.errors import BuildError
from pytest_microvm.images.artifacts import Artifact, Artifacts, Built
from pytest_microvm.images.oci.built import is_built, parse_artifact, parse_image
from pytest_microvm.images.oci.built_files import store_files
from pytest_microvm.images.oci.contents import Attributes, refused_member
from pytest_microvm.images.oci.documents import (
    ImageConfiguration,
    parse_configuration,
    parse_document,
    parse_manifest,
    wrong_platform,
)
from pytest_microvm.images.oci.layer import CONVERTER, convert, is_for
from pytest_microvm.images.oci.references import Platform, Reference
from pytest_microvm.images.oci.skopeo import Skopeo
from pytest_microvm.images.oci.sources import FolderSource, ImageSource, RegistrySource, copied
from pytest_microvm.images.oci.spooling import DamagedBlob, Layer, Spools
from pytest_microvm.images.process import Progress, build_environment
from pytest_microvm.programs.needed import require_program

TIMEOUT = 60.0
"""Seconds without a byte after which a registry counts as hanging."""

_NAME = "pull"  # of the lock, and of the folder of a pull in progress
# A line of `unsquashfs -lln`: kind and mode, owner, size (of a device: its numbers), date, time, path.
_LINE = re.compile(r"(\S)(\S{9})\s+(\d+)/(\d+)\s+(?:\d+,\s*)?\d+\s+\S+ \S+ (.+)")


@dataclass(frozen=True)
class Pulled:
    """A pulled image.

    Args:
        resolved: The digest of the document that the reference led to: an index or a manifest.
        manifest: The digest of the image's manifest.
        configuration: Its configuration.
        layers: The digests of its file systems, the lowest first.
        configuration_digest: The digest of its configuration.
    """

    resolved: str
    manifest: str
    configuration: ImageConfiguration
    layers: tuple[str, ...]
    configuration_digest: str


@dataclass(frozen=True)
class PulledBuilt:
    """A pulled image that was built on another computer; its files are stored.

    Args:
        resolved: The digest of the document that the reference led to: an index or a manifest.
        manifest: The digest of the artifact's manifest.
        image: The image's own manifest, checked.
    """

    resolved: str
    manifest: str
    image: Mapping[str, Any]
    configuration_digest: str


class Puller:
    """Pulls images into the cache.

    Args:
        artifacts: Where the layers are stored, each once for all images.
        root: The folder of the image store.
        tell: Called with messages about the progress.
        timeout: Seconds without a byte after which a registry counts as hanging.
        image_format: The format of built images that this version reads.
    """

    def __init__(
        self,
        artifacts: Artifacts,
        root: Path,
        tell: Progress,
        timeout: float = TIMEOUT,
        image_format: int = 0,
    ) -> None:
        self._artifacts = artifacts
        self._root = root
        self._tell = tell
        self._timeout = timeout
        self._format = image_format

    def pull(
        self, reference: Reference, platform: Platform, known: Callable[[str], bool]
    ) -> Pulled | PulledBuilt | None:
        """Pull an image; one pull runs at a time.

        Args:
            reference: The image.
            platform: Its platform.
            known: Returns whether the image that a document's digest leads to is stored already.

        Returns:
            The image; ``None`` if it is known.

        Raises:
            PullError: It cannot be had, or is refused.
            HostError: A program is missing, or the disk is full.
        """
        with explained(self._root), self._artifacts.only_builder(_NAME, self._tell) as folder:
            source = self._source(reference, platform, folder)
            if known(source.resolved):
                source.done()
                return None
            data = source.manifest()
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            found = parse_document(data, "the manifest")
            if is_built(found):
                artifact = parse_artifact(found)
                image = parse_image(
                    source.configuration(artifact),
                    artifact,
                    image_format=self._format,
                    platform=platform,
                    shown=str(reference),
                )
                store_files(self._artifacts, artifact, source, folder, self._tell)
                source.done()
                return PulledBuilt(source.resolved, digest, image, artifact.configuration.digest)
            manifest = parse_manifest(found)
            document = parse_document(source.configuration(manifest), "the configuration")
            configuration = parse_configuration(document, len(manifest.layers))
            if configuration.platform != str(platform):
                raise wrong_platform(str(reference), str(platform), [configuration.platform])
            blobs = list(zip(manifest.layers, configuration.diff_ids, strict=True))
            stack = _Stack(self._artifacts, source, blobs, folder, self._tell)
            stored = stack.stored()
            missing = [layer for layer in manifest.layers if layer.digest not in stored]
            need_space(self._root, sum(layer.size for layer in missing))
            if missing:
                source.fetch(manifest, stored)
            layers = stack.convert(stored, lambda: source.fetch(manifest, stored))
            source.done()
            return Pulled(source.resolved, digest, configuration, layers, manifest.configuration.digest)

    def _source(self, reference: Reference, platform: Platform, folder: Path) -> ImageSource:
        if reference.transport == "oci":
            return FolderSource(reference, platform)
        skopeo = Skopeo(reference, folder, platform, self._timeout)
        if reference.transport == "docker":
            downloads = self._root / "downloads"
            return RegistrySource(
                reference, platform, skopeo=skopeo, folder=folder, downloads=downloads, tell=self._tell
            )
        return copied(reference, platform, skopeo, folder, self._tell)


def drop_downloads(artifacts: Artifacts, root: Path) -> int:
    """Delete what interrupted pulls left; return the bytes freed."""
    folder = root / "downloads"
    if not folder.is_dir():
        return 0
    with artifacts.only_builder(_NAME, lambda _line: None):
        freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder, ignore_errors=True)
    return freed


class _Stack:
    """An image's layers, converted from the lowest to the highest: a layer may depend on those below it."""

    def __init__(
        self,
        artifacts: Artifacts,
        source: ImageSource,
        layers: Sequence[Layer],
        folder: Path,
        tell: Progress,
    ) -> None:
        self._artifacts = artifacts
        self._source = source
        self._layers = layers
        self._folder = folder
        self._tell = tell

    def stored(self) -> set[str]:
        """Return the digests of the blobs that need not be fetched: their layers are converted already."""
        found: set[str] = set()
        below = _Below(self._artifacts)
        for number, (layer, diff_id) in enumerate(self._layers):
            artifact = self._found(number, diff_id, below)
            if artifact is None:
                # What the layers above it inherit is not known yet.
                above = self._layers[number + 1 :]
                found |= {one.digest for one, id_ in above if self._independent(id_)}
                break
            found.add(layer.digest)
            below.add(artifact)
        return found

    def convert(self, stored: set[str], fetch: Callable[[], None]) -> tuple[str, ...]:
        """Convert the layers that are not stored, and return the digests of all that change something.

        Args:
            stored: The digests of the blobs that were not fetched.
            fetch: Fetches the blobs again, after a damaged one was discarded.
        """
        below = _Below(self._artifacts)
        wanted = [layer for layer in self._layers if layer[0].digest not in stored]
        with Spools(self._source.blob, wanted, self._folder) as spools:
            for number, (layer, diff_id) in enumerate(self._layers):
                artifact = self._found(number, diff_id, below)
                if artifact is None:
                    self._tell(
                        f"converting layer {number + 1} of {len(self._layers)} ({layer.size / 1e6:.1f} MB)"
                    )
                    try:
                        artifact = self._made(number, diff_id, below, spools)
                    except DamagedBlob:
                        if not self._source.discard(layer):
                            raise
                        self._tell("what an earlier pull left of it is damaged: fetching it again")
                        fetch()
                        artifact = self._made(number, diff_id, below, spools)
                below.add(artifact)
        return below.digests

    def _found(self, number: int, diff_id: str, below: _Below) -> Artifact | None:
        for key in self._keys(number, diff_id):
            artifact = self._artifacts.find(_artifact(diff_id), key)
            if artifact is not None and is_for(artifact.facts, lowest=not number, lower=below):
                return artifact
        return None

    def _independent(self, diff_id: str) -> bool:
        """Return True if a layer is stored, and depends on no other one."""
        artifact = self._artifacts.find(_artifact(diff_id), self._keys(1, diff_id)[0])
        return artifact is not None and not artifact.facts["implied"]

    def _keys(self, number: int, diff_id: str) -> tuple[str, str]:
        """Return the key of a layer in any place, and the key of the layer above just those below it."""
        return _key(diff_id), _key(diff_id, *(id_ for _layer, id_ in self._layers[:number]), "above these")

    def _made(self, number: int, diff_id: str, below: _Below, spools: Spools) -> Artifact:
        everywhere, here = self._keys(number, diff_id)
        name = _artifact(diff_id)

        def build(folder: Path) -> Built:
            for program in ("mksquashfs", "unsquashfs"):
                require_program(program, "pulls")
            with spools.take(self._layers[number]) as archive:
                return convert(folder, archive, lowest=not number, lower=below)

        taken = self._artifacts.find(name, everywhere) is not None
        return self._artifacts.get(name, here if taken else everywhere, build, self._tell)


class _Below:
    """The layers below one that is being converted."""

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts
        self._stack: list[str] = []
        self._empty: list[str] = []

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests of the file systems, the lowest first; at least one."""
        return tuple(self._stack or self._empty[:1])

    def add(self, artifact: Artifact) -> None:
        """Put a layer on top; one that hides everything is the lowest one, and an empty one is left out."""
        digest = artifact.files["layer"]
        if artifact.facts["root"]:
            self._stack.clear()
        if artifact.facts["entries"] == "0":
            self._empty.append(digest)
        else:
            self._stack.append(digest)

    def __call__(self, paths: Sequence[str]) -> Mapping[str, Attributes]:
        """Return the attributes of folders, as the highest layer that has each of them says.

        Raises:
            PullError: One of them is a link or a file there.
        """
        found: dict[str, Attributes] = {}
        for digest in reversed(self._stack):
            left = [path for path in paths if path not in found]
            if not left:
                break
            for path, kind, attributes in _listed(self._artifacts.blobs.path(digest), left):
                if kind == "c":  # hidden: what is further below does not count
                    found.setdefault(path, Attributes(0o755, 0, 0, 0))
                elif kind != "d":
                    what = "a link" if kind == "l" else "no folder"
                    raise refused_member(path, f"something is in it, and it is {what} in a layer below")
                else:
                    found.setdefault(path, attributes)
        return found


def _listed(layer: Path, paths: Sequence[str]) -> list[tuple[str, str, Attributes]]:
    """Return those of ``paths`` that a file system has: path, kind (as ``ls -l`` shows it), attributes."""
    command = ["unsquashfs", "-lln", "-no-wildcards", "-dest", "", str(layer), *paths]
    done = subprocess.run(command, capture_output=True, check=False, env=build_environment())
    if done.returncode not in (0, 2):  # 2: a path is missing in it
        raise BuildError(
            f"unsquashfs failed (exit code {done.returncode})", details=done.stderr.decode(errors="replace")
        )
    wanted = set(paths)
    found = []
    for line in done.stdout.decode(errors="surrogateescape").splitlines():
        match = _LINE.fullmatch(line)
        path = match[5].partition(" -> ")[0].lstrip("/") if match else ""
        if match and path in wanted:
            found.append((path, match[1], Attributes(_mode(match[2]), int(match[3]), int(match[4]), 0)))
    return found


def _mode(text: str) -> int:
    """Return the permission bits that ``ls -l`` shows as ``rwxr-sr-t``."""
    mode = sum(0o400 >> place for place, letter in enumerate(text) if letter not in "-ST")
    special = zip((0o4000, 0o2000, 0o1000), (text[2], text[5], text[8]), strict=True)
    return mode + sum(bit for bit, letter in special if letter in "sStT")


def _artifact(diff_id: str) -> str:
    return f"oci-{diff_id.partition(':')[2][:16]}"


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join([str(CONVERTER), *parts]).encode()).hexdigest()
