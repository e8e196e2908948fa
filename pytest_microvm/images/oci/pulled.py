"""Container images in the image store: found by their reference or by the user's name for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytest_microvm.cache.disk import explained
from pytest_microvm.errors import ImageError, UsageError
from pytest_microvm.images.artifacts import Artifact, Artifacts
from pytest_microvm.images.blobs import canonical_json, read_json, write_atomically
from pytest_microvm.images.image import DEFAULT_RESOURCES, NAME, Image
from pytest_microvm.images.oci.pulling import TIMEOUT, Pulled, Puller
from pytest_microvm.images.oci.references import Platform, Reference, parse_platform
from pytest_microvm.images.process import Progress
from pytest_microvm.images.records import ImageRecords

_PATH = (
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of an image that sets none; as Docker
)


class PulledImages:
    """The container images in a store.

    Args:
        root: The folder of the image store.
        records: Its records.
        artifacts: Its artifacts.
        platform: Returns kernel, initramfs and the agent's runtime for a platform.
        format: The format of manifests.
    """

    def __init__(
        self,
        root: Path,
        records: ImageRecords,
        artifacts: Artifacts,
        platform: Callable[[Platform, Progress], Artifact],
        format: int,  # noqa: A002 - the manifest's word
    ) -> None:
        self._root = root
        self._records = records
        self._artifacts = artifacts
        self._platform = platform
        self._format = format

    def find(self, reference: Reference, platform: Platform, tell: Progress) -> Image | None:
        """Return the image that was last pulled by a reference, if it is stored whole."""
        return self._stored(read_json(self._records.name_path(_entry(reference, platform))), tell)

    def has(self, name: str) -> bool:
        """Return True if the user has pulled an image as ``name``."""
        return NAME.fullmatch(name) is not None and self._records.name_path(_alias(name)).is_file()

    def named(self, name: str, tell: Progress) -> Image:
        """Return the image that the user pulled as ``name``.

        Raises:
            ImageError: It is damaged, or a part of it was removed.
        """
        found = self._stored(read_json(self._records.name_path(_alias(name))), tell)
        if found is None:
            raise ImageError(
                f"the pulled image {name!r} is damaged, or a part of it was removed",
                resolution=f"pull it again: pytest-microvm image pull REF --as {name}",
            )
        return found

    def pull(
        self,
        reference: Reference,
        platform: Platform,
        tell: Progress,
        *,
        name: str = "",
        timeout: float = TIMEOUT,
    ) -> Image:
        """Pull an image; if the same one is stored, nothing of it is fetched.

        Args:
            reference: The image. One with a digest that is stored is not asked for again.
            platform: Its platform.
            tell: Called with messages about the progress.
            name: A name for it, besides its reference.
            timeout: Seconds without a byte after which a registry counts as hanging.

        Raises:
            UsageError: The name is invalid.
            PullError: The image cannot be had, or is refused.
            HostError: A program is missing, or the disk is full.
        """
        if name and not NAME.fullmatch(name):
            raise UsageError(
                f"invalid name of an image: expected small letters, digits, dots, dashes and underscores, "
                f"got {name[:100]!r}",
                resolution="write it like my-image",
            )
        image = self.find(reference, platform, tell) if reference.digest else None
        while image is None:
            image = self._pulled(reference, platform, tell, timeout)
        if name:
            entry = read_json(self._records.name_path(_entry(reference, platform))) or {}
            entry = {**entry, **_alias(name)}
            with explained(self._root), self._artifacts.publishing():
                write_atomically(self._records.name_path(entry), canonical_json(entry))
        return image

    def _pulled(
        self, reference: Reference, platform: Platform, tell: Progress, timeout: float
    ) -> Image | None:
        """Pull an image and publish it; return ``None`` if a concurrent prune removed a part of it."""
        stored = read_json(self._records.name_path(_entry(reference, platform))) or {}

        def known(resolved: str) -> bool:
            return stored.get("resolved") == resolved and self._stored(stored, tell) is not None

        pulled = Puller(self._artifacts, self._root, tell, timeout).pull(reference, platform, known)
        if pulled is None:
            return self._stored(stored, tell)
        entry = {
            **_entry(reference, platform),
            "resolved": pulled.resolved,
            "manifest": pulled.manifest,
        }
        manifest = self._manifest(pulled, platform, self._platform(platform, tell))
        image = self._records.publish(manifest, entry)
        return image if self._records.intact(image) else None

    def _manifest(self, pulled: Pulled, platform: Platform, base: Artifact) -> Mapping[str, Any]:
        rootfs, *layers = pulled.layers
        configuration = pulled.configuration
        start = {
            "entrypoint": list(configuration.entrypoint),
            "arguments": list(configuration.arguments),
            "workdir": configuration.workdir,
            "user": configuration.user,
        }
        return {
            "format": self._format,
            "architecture": platform.machine,
            "environment": {"PATH": _PATH, **dict(configuration.environment)},
            "files": {**base.files, "rootfs": rootfs},
            "resources": dict(DEFAULT_RESOURCES),
            "start": {key: value for key, value in start.items() if value},
            **({"layers": layers} if layers else {}),
        }

    def _stored(self, entry: Mapping[str, Any] | None, tell: Progress) -> Image | None:
        """Return the image of an entry if it is stored whole, with the kernel and runtime of this version."""
        manifest = self._records.manifest(entry["digest"]) if entry else None
        if manifest is None or entry is None:
            return None
        base = self._platform(parse_platform(entry["platform"]), tell)
        files = {**base.files, "rootfs": manifest["files"]["rootfs"]}
        if files == manifest["files"]:
            image = self._records.image(entry["name"], entry["digest"], manifest)
        else:
            image = self._records.publish({**manifest, "files": files}, entry)
        return image if self._records.intact(image) else None


def _entry(reference: Reference, platform: Platform) -> dict[str, str]:
    """Return the entry that names an image by its reference, without what was found there."""
    key = hashlib.sha256(f"{reference} {platform}".encode()).hexdigest()
    return {
        "name": str(reference), "key": key, "kit": "", "project": "",
        "reference": str(reference), "platform": str(platform),
    }  # fmt: skip


def _alias(name: str) -> dict[str, str]:
    """Return the part of an entry that names an image after the user's name for it."""
    return {"name": name, "key": "alias"}
