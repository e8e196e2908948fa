"""The images of a store as a project's ``microvm.lock`` pins them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_microvm.errors import LockError
from pytest_microvm.images.build_keys import BUILDER_VERSION, kit_key
from pytest_microvm.images.image import Image
from pytest_microvm.images.kits import Kit, host_architecture, load_kit
from pytest_microvm.images.lock_file import FILE, ImageLock, PinDifference, Pins, differences, read_lock
from pytest_microvm.images.lock_pins import container_pins, kit_pins, recipe_pins
from pytest_microvm.images.oci.references import is_reference, parse_platform, parse_reference
from pytest_microvm.images.store import ImageStore
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from pytest_microvm.images.process import Progress

LockUse = Literal["ignore", "follow", "require"]
"""What a lock is for: nothing; the digests at which missing images are pulled; also which images count."""

_SHOWN = 20  # differences listed in an error


class LockedImages:
    """Images of a store, with a project's lock applied.

    Args:
        store: The store.
        project: The project's folder; ``None``: there is no project, and no lock.
        use: What its lock is for.
        lock_folder: The folder that has the lock, if it is not the project's.
    """

    def __init__(
        self,
        store: ImageStore,
        project: Path | None,
        use: LockUse = "follow",
        *,
        lock_folder: Path | None = None,
    ) -> None:
        self._store = store
        self._project = project
        self._use = use
        self._lock_folder = lock_folder or project

    @cached_property
    def lock(self) -> ImageLock | None:
        """The project's lock; ``None`` if it has none, or if it is ignored.

        Raises:
            UsageError: The file is invalid.
        """
        if self._lock_folder is None or self._use == "ignore":
            return None
        return read_lock(self._lock_folder)

    def get(self, name: str, *, progress: Progress | None = None) -> Image:
        """Return an image, built or pulled if it is missing; see :meth:`ImageStore.get`.

        A container image that is missing is pulled at the locked digest, not by its tag.

        Raises:
            LockError: The lock is required, and this is not the image that it pins.
            UsageError: The lock is invalid.
        """
        if self._use != "require" and self.lock is None:
            return self._store.get(name, project=self._project, progress=progress)
        architecture = self._architecture(name)
        pins = self.lock.pins(name, architecture) if self.lock else None
        if self._use == "require":
            known = None if self._store.is_container(name) else load_kit(name, project=self._project)
            self._check_before(name, self._required(name, pins, architecture), known)
        at = self._at(name, name, pins)
        image = self._store.get(name, project=self._project, progress=progress, at=at)
        if self._use == "require" and pins is not None:
            _check(name, differences(pins, self.pins(name, image)))
        return image

    def pull(
        self, reference: str, *, name: str = "", platform: str = "", timeout: float, progress: Progress | None
    ) -> Image:
        """Pull a container image at its locked digest, or by its tag if it is not locked.

        Args:
            reference: Its reference.
            name: A name for it; the lock may have it by this name.
            platform: Its platform; this computer's if empty.
            timeout: Seconds without a byte after which a registry counts as hanging.
            progress: Called with each stage as a line of text.

        Raises:
            LockError: The lock is required, and this is not the image that it pins.
            UsageError: The lock is invalid.
        """
        architecture = parse_platform(platform).machine if platform else host_architecture()
        known = name if self.lock and self.lock.pins(name, architecture) else reference
        pins = self.lock.pins(known, architecture) if self.lock else None
        if self._use == "require":
            self._check_before(known, self._required(known, pins, architecture), None)
        image = self._store.pull(
            reference, base=self._folder, platform=platform, name=name, timeout=timeout, progress=progress,
            at=self._at(known, reference, pins),
        )  # fmt: skip
        if self._use == "require" and pins is not None:
            _check(known, differences(pins, self._pulled_pins(reference, platform, image)))
        return image

    def pins(self, name: str, image: Image) -> Pins:
        """Return what a lock pins of an image.

        Args:
            name: Its name in the project.
            image: The image, as :meth:`get` returned it.

        Raises:
            LockError: The record of a container image is older than locks.
        """
        if self._store.is_container(name):
            return self._pulled_pins(name, "", image)
        kit = load_kit(name, project=self._project)
        return kit_pins(kit, BUILDER_VERSION, kit_key(kit), image)

    @property
    def _folder(self) -> Path:
        return self._project or Path.cwd()

    def _architecture(self, name: str) -> str:
        if self._store.is_container(name):
            return host_architecture()
        return load_kit(name, project=self._project).architecture

    def _pulled_pins(self, name: str, platform: str, image: Image) -> Pins:
        record = self._store.pull_record(name, self._folder, platform)
        if record is None or "diff_ids" not in record:
            raise LockError(
                f"image {sanitize_line(name)} cannot be locked: nothing is known about its pull",
                resolution="pull it again, by its reference: pytest-microvm image pull REF",
            )
        return container_pins(record, image, self._folder)

    def _required(self, name: str, pins: Pins | None, architecture: str) -> Pins:
        """Return pins, which must exist.

        Raises:
            LockError: There are none.
        """
        if pins is not None:
            return pins
        where = f"{(self._lock_folder or self._folder) / FILE}" + (
            "" if self.lock else ", which does not exist"
        )
        raise LockError(
            f"image {sanitize_line(name)} for {architecture} is not locked in {where}",
            resolution="lock it: pytest-microvm lock IMAGE; or do without --locked",
        )

    def _at(self, name: str, reference: str, pins: Pins | None) -> str:
        """Return the digest to pull an image at; empty: what its reference leads to.

        A registry can be asked for a digest, and is asked for one of the reference's own repository alone.
        """
        if pins is None or pins["kind"] != "container" or not is_reference(reference):
            return ""
        parsed = parse_reference(reference, self._folder)
        if parsed.transport != "docker" or parsed.digest:
            return ""
        if pins["reference"] != str(parsed):
            _check(name, [PinDifference("reference", pins["reference"], str(parsed))])
        return str(pins["index"] or pins["manifest"])

    def _check_before(self, name: str, pins: Pins, kit: Kit | None) -> None:
        """Check what can be checked before an image is built or pulled, which takes long.

        Args:
            name: The image's name.
            pins: Its pins.
            kit: Its kit; ``None``: it is a container image.

        Raises:
            LockError: The kit is another one, or a stored file of the image is damaged.
        """
        container = {"kind": "container"}
        known = container if kit is None else recipe_pins(kit, BUILDER_VERSION, kit_key(kit))
        _check(name, differences({key: pins.get(key) for key in known}, known))
        _check(name, list(self._damaged(pins)), "let it be repaired: use the image once without --locked")

    def _damaged(self, pins: Pins) -> list[PinDifference]:
        files = {role: pins[role] for role in ("kernel", "initramfs", "runtime")}
        files |= {f"file_systems[{number}]": digest for number, digest in enumerate(pins["file_systems"])}
        found = {role: self._store.damaged(digest.partition(":")[2]) for role, digest in files.items()}
        return [
            PinDifference(role, files[role], f"sha256:{digest}") for role, digest in found.items() if digest
        ]


def _check(name: str, found: Sequence[PinDifference], resolution: str = "") -> None:
    """Raise an error if an image differs from its pins.

    Raises:
        LockError: It does.
    """
    if not found:
        return
    lines = [str(difference) for difference in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"and {len(found) - _SHOWN} more")
    raise LockError(
        f"image {sanitize_line(name)} is not the one that {FILE} pins",
        details="\n".join(lines),
        resolution=resolution
        or "get the locked one (a container image: pytest-microvm image pull REF --locked), or lock this: "
        "pytest-microvm lock",
    )
