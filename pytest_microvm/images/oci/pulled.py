"""Images of registries in the image store: found by their reference or by the user's name for them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_microvm.cache.disk import explained
from pytest_microvm.errors import ImageError, PullError, UsageError
from pytest_microvm.images.artifacts import Artifact, Artifacts
from pytest_microvm.images.blobs import canonical_json, read_json, write_atomically
from pytest_microvm.images.image import DEFAULT_RESOURCES, NAME, Image
from pytest_microvm.images.oci.built import check_image
from pytest_microvm.images.oci.layer import CONVERTER
from pytest_microvm.images.oci.pulling import TIMEOUT, Pulled, PulledBuilt, Puller
from pytest_microvm.images.oci.pushing import push
from pytest_microvm.images.oci.references import (
    Platform,
    Reference,
    parse_platform,
    parse_reference,
    platform_of,
)
from pytest_microvm.images.oci.signature_rules import SignatureRules, user_rules
from pytest_microvm.images.oci.signatures import verify
from pytest_microvm.images.oci.skopeo import Skopeo
from pytest_microvm.images.process import Progress
from pytest_microvm.images.records import ImageRecords, absent

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

    @cached_property
    def _rules(self) -> SignatureRules:
        return user_rules()

    def find(self, reference: Reference, platform: Platform, tell: Progress) -> Image | None:
        """Return the image that was last pulled by a reference, if it is stored whole."""
        return self._stored(self.record(reference, platform), tell)

    def record(self, reference: Reference, platform: Platform) -> dict[str, str] | None:
        """Return the record of the last pull by a reference; ``None`` if there is none."""
        return read_json(self._records.name_path(_entry(reference, platform)))

    def record_of(self, name: str) -> dict[str, str] | None:
        """Return the record of the pull that gave an image its name; ``None`` if there is none."""
        return read_json(self._records.name_path(_alias(name))) if self.has(name) else None

    def has(self, name: str) -> bool:
        """Return True if the user has pulled an image as ``name``."""
        return NAME.fullmatch(name) is not None and self._records.name_path(_alias(name)).is_file()

    def named(self, name: str, tell: Progress) -> Image:
        """Return the image that the user pulled as ``name``.

        Raises:
            ImageError: It is damaged, a part of it was removed, or it lacks a signature.
        """
        record = self.record_of(name)
        if record is not None and not self._accepted(record):
            raise ImageError(
                f"the pulled image {name!r} is refused: no signature of it that you demand has been verified",
                resolution=f"pull it again: pytest-microvm image pull REF --as {name}",
            )
        found = self._stored(record, tell)
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
        at: str = "",
    ) -> Image:
        """Pull an image; if the same one is stored, nothing of it is fetched.

        Args:
            reference: The image. One with a digest that is stored is not asked for again.
            platform: Its platform.
            tell: Called with messages about the progress.
            name: A name for it, besides its reference.
            timeout: Seconds without a byte after which a registry counts as hanging.
            at: The digest to pull in place of what the reference leads to now, which a registry must have.

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
        record = self.record(reference, platform) or {}
        pinned = at or reference.digest
        image = self._stored(record, tell) if pinned and _leads_to(record, pinned) else None
        while image is None:
            image = self._pulled(reference, platform, tell, timeout, at)
        if name:
            entry = self.record(reference, platform) or {}
            entry = {**entry, **_alias(name)}
            with explained(self._root), self._artifacts.publishing():
                write_atomically(self._records.name_path(entry), canonical_json(entry))
        return image

    def push(self, image: Image, target: Reference, tell: Progress, *, timeout: float = TIMEOUT) -> Reference:
        """Push an image to a registry; see :meth:`pytest_microvm.images.store.ImageStore.push`."""
        if not self._records.intact(image):
            raise absent(image.digest)
        manifest = self._records.manifest_path(image.digest).read_bytes()
        try:
            check_image(manifest)
        except PullError as error:
            raise UsageError(
                f"the image {image.name} cannot be pushed", details=error.brief, resolution=error.resolution
            ) from None
        with explained(self._root), self._artifacts.only_builder(f"push-{image.digest[:32]}", tell) as folder:
            skopeo = Skopeo(target, folder, platform_of(image.architecture), timeout, "pushed")
            return push(manifest, set(image.files().values()), target, skopeo, folder=folder, tell=tell)

    def _pulled(
        self, reference: Reference, platform: Platform, tell: Progress, timeout: float, at: str
    ) -> Image | None:
        """Pull an image and publish it; return ``None`` if a concurrent prune removed a part of it."""
        stored = self.record(reference, platform) or {}
        signed_by = ""

        def known(resolved: str) -> bool:  # called before anything of the image is fetched
            nonlocal signed_by
            signed_by = self._verified(reference, platform, resolved, timeout)
            return _leads_to(stored, resolved) and self._stored(stored, tell) is not None

        puller = Puller(self._artifacts, self._root, tell, timeout, self._format)
        pulled = puller.pull(reference.at(at) if at else reference, platform, known)
        if pulled is None:
            return self._stored(stored, tell)
        entry = {
            **_entry(reference, platform),
            "resolved": pulled.resolved,
            "manifest": pulled.manifest,
            "configuration": pulled.configuration_digest,
            "diff_ids": "",
            "converter": str(CONVERTER),
            "signed_by": signed_by,
        }
        if isinstance(pulled, PulledBuilt):
            manifest = pulled.image
            entry["built"] = "yes"
        else:
            entry["diff_ids"] = " ".join(pulled.configuration.diff_ids)
            manifest = self._manifest(pulled, platform, self._platform(platform, tell))
        image = self._records.publish(manifest, entry)
        return image if self._records.intact(image) else None

    def _verified(self, reference: Reference, platform: Platform, resolved: str, timeout: float) -> str:
        """Verify the signature that the user demands of an image.

        Returns:
            The key's fingerprint; empty if no signature is needed.

        Raises:
            PullError: There is no such signature.
        """
        keys = self._rules.required(reference)
        if keys is None:
            return ""
        with tempfile.TemporaryDirectory(prefix="pytest-microvm-") as folder:
            skopeo = Skopeo(reference, Path(folder), platform, timeout)
            return verify(skopeo, reference, resolved, keys).fingerprint

    def _accepted(self, record: Mapping[str, str]) -> bool:
        reference = parse_reference(record["reference"], Path("/"))
        return self._rules.accepts(reference, record.get("signed_by", ""))

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
        """Return the image of an entry if it is stored whole.

        A container image gets the kernel and runtime of this version; a built image has its own. One without
        the signature that the user demands does not count.
        """
        if entry and not self._accepted(entry):
            return None
        manifest = self._records.manifest(entry["digest"]) if entry else None
        if manifest is None or entry is None:
            return None
        if "built" in entry:
            image = self._records.image(entry["name"], entry["digest"], manifest)
            return image if self._records.intact(image) else None
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


def _leads_to(record: Mapping[str, str], resolved: str) -> bool:
    """Return True if a pull's record is of a digest, and says what this version's converter made of it."""
    return record.get("resolved") == resolved and record.get("converter") == str(CONVERTER)


def _alias(name: str) -> dict[str, str]:
    """Return the part of an entry that names an image after the user's name for it."""
    return {"name": name, "key": "alias"}
