"""The records of stored images: a manifest for each, and the names that keep it.

``manifests/<digest>.json``  one image: its files' digests, environment and default resources
``names/*.json``             what an image is called, and why it is kept

Each is renamed into place once everything that it refers to exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.errors import ImageError
from pytest_microvm.images.blobs import canonical_json, read_json, write_atomically
from pytest_microvm.images.image import Image, Service, StartDefaults

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_microvm.images.artifacts import Artifacts

ROLES = ("kernel", "initramfs", "runtime", "rootfs")
"""The files that every image has."""

LAYER = "layer"
"""The role of a mirrored environment in its artifact, and in manifests of earlier versions."""

_KEPT_LAYERS = 3
_NAME_KEYS = {"name", "key", "digest", "kit", "project"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ImageRecords:
    """The records in a folder.

    Args:
        root: The folder of the image store.
        artifacts: Its artifacts.
    """

    def __init__(self, root: Path, artifacts: Artifacts) -> None:
        self._root = root
        self._artifacts = artifacts

    def publish(self, manifest: Mapping[str, Any], entry: Mapping[str, str]) -> Image:
        """Store a manifest and the entry that names it; return the image."""
        data = canonical_json(manifest)
        digest = hashlib.sha256(data).hexdigest()
        entry = {**entry, "digest": digest}
        name_path = self.name_path(entry)
        if self.manifest(digest) is None or read_json(name_path) != entry:
            # Names serve only lists and prunes: if the cache cannot be written, the image does without one.
            with contextlib.suppress(OSError), self._artifacts.publishing():
                write_atomically(self.manifest_path(digest), data)
                write_atomically(name_path, canonical_json(entry))
        return self.image(entry["name"], digest, manifest)

    def image(self, name: str, digest: str, manifest: Mapping[str, Any]) -> Image:
        """Return the image that a manifest describes."""
        path = self._artifacts.blobs.path
        return Image(
            name=name,
            digest=digest,
            architecture=manifest["architecture"],
            environment=tuple(sorted(manifest["environment"].items())),
            resources=manifest["resources"],
            network=tuple(manifest.get("network", ())),
            layers=tuple(path(layer) for layer in layers_of(manifest)),
            python=manifest.get("python", ""),
            start=_start(manifest.get("start", {})),
            services=tuple(Service(**service) for service in manifest.get("services", ())),
            **{role: path(manifest["files"][role]) for role in ROLES},
        )

    def manifest_path(self, digest: str) -> Path:
        """Return the path of the manifest with a digest, whether or not it exists."""
        return self._root / "manifests" / f"{digest}.json"

    def manifest(self, digest: str) -> dict[str, Any] | None:
        """Return the manifest with a digest; ``None`` if it is missing or damaged."""
        try:
            data = self.manifest_path(digest).read_bytes()
        except FileNotFoundError:
            return None
        return dict(json.loads(data)) if hashlib.sha256(data).hexdigest() == digest else None

    def by_digest(self, digest: str) -> Image:
        """Return a stored image whose files are intact.

        Raises:
            ImageError: There is none.
        """
        manifest = self.manifest(digest)
        if manifest is None:
            raise absent(digest)
        names = [entry["name"] for _path, entry in self.names() if entry["digest"] == digest]
        image = self.image(names[0] if names else "image", digest, manifest)
        if not self.intact(image):
            raise absent(digest)
        return image

    def intact(self, image: Image) -> bool:
        """Return True if an image's files still match its digest; costs a stat each, mostly."""
        return all(self._artifacts.blobs.intact(path.name) for path in image.files().values())

    def name_path(self, entry: Mapping[str, str]) -> Path:
        """Return the path of the entry that names an image."""
        return self._root / "names" / f"{file_name(entry['name'])}-{entry['key'][:32]}.json"

    def names(self) -> list[tuple[Path, dict[str, str]]]:
        """Return all entries with their paths."""
        paths = sorted((self._root / "names").glob("*.json"))
        return [(path, entry) for path in paths if (entry := read_json(path)) and entry.keys() >= _NAME_KEYS]

    def forget_older(self, name: str) -> None:
        """Remove all but the newest images of a mirrored environment, which grows a layer with every change.

        Some older ones stay for runs that started before, and for kept machines.
        """
        paths = [path for path, entry in self.names() if entry["name"] == name]
        paths.sort(key=lambda path: path.stat().st_mtime_ns)
        if len(paths) > _KEPT_LAYERS:
            with contextlib.suppress(OSError), self._artifacts.publishing():
                for path in paths[:-_KEPT_LAYERS]:
                    path.unlink(missing_ok=True)
                self.drop_unnamed()

    def drop_unnamed(self) -> int:
        """Delete all manifests and artifacts without a name; return the bytes freed.

        The caller holds the publish lock.
        """
        digests = {entry["digest"] for _path, entry in self.names()}
        needed: set[str] = set()
        for path in (self._root / "manifests").glob("*.json"):
            manifest = self.manifest(path.stem) if path.stem in digests else None
            if manifest is None:
                path.unlink()
            else:
                needed |= {*manifest["files"].values(), *layers_of(manifest)}
        return self._artifacts.drop_all_but(needed)


def layers_of(manifest: Mapping[str, Any]) -> list[str]:
    """Return the digests of a manifest's layers, the lowest first; earlier versions had one, as a role."""
    one = manifest["files"].get(LAYER)
    return [*([] if one is None else [one]), *manifest.get("layers", [])]


def file_name(name: str) -> str:
    """Return an image's name as a part of a file's name; a reference contains slashes."""
    return name if _NAME.fullmatch(name) else f"image-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def absent(digest: str) -> ImageError:
    """Return the error for an image that is not stored whole."""
    return ImageError(
        f"image sha256:{digest[:12]}... is not in the cache, or is damaged",
        resolution="run again: it is fetched again, or built",
    )


def _start(values: Mapping[str, Any]) -> StartDefaults:
    return StartDefaults(
        entrypoint=tuple(values.get("entrypoint", ())),
        arguments=tuple(values.get("arguments", ())),
        workdir=values.get("workdir", ""),
        user=values.get("user", ""),
    )
