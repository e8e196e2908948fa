"""Images of kits in the image store: kernel and root file system, and the layer that a kit's set-up makes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pytest_microvm.images.artifacts import Artifact, Artifacts, Built
from pytest_microvm.images.blobs import canonical_json
from pytest_microvm.images.build_keys import (
    BUILDER_VERSION,
    build_key,
    kit_key,
    platform_name_and_key,
    source_date_epoch,
)
from pytest_microvm.images.debian import default_mode
from pytest_microvm.images.image import Image
from pytest_microvm.images.kits import Kit, load_kit
from pytest_microvm.images.oci.references import Platform
from pytest_microvm.images.platform import build_platform
from pytest_microvm.images.process import Progress
from pytest_microvm.images.records import LAYER, ROLES, ImageRecords
from pytest_microvm.images.rootfs import build_rootfs
from pytest_microvm.images.set_up import RunSetUp, build_set_up_layer, merged_environment, set_up_of
from pytest_microvm.programs.needed import require, require_program


class KitImages:
    """Builds and publishes the images of kits.

    Args:
        records: The store's records.
        artifacts: Its artifacts.
        mode: mmdebstrap's mode; ``None``: the one available to this user.
        set_up: Runs the set-up of kits in a machine.
    """

    def __init__(
        self, records: ImageRecords, artifacts: Artifacts, mode: str | None, set_up: RunSetUp
    ) -> None:
        self._records = records
        self._artifacts = artifacts
        self._mode = mode
        self._set_up = set_up

    def build(
        self,
        kit: Kit,
        tell: Progress,
        *,
        project: Path | None,
        force: bool,
        container: Callable[[Kit], Image],
    ) -> Image:
        """Return a kit's image; what is missing or damaged of it is built.

        Args:
            kit: The kit.
            tell: Called with each stage.
            project: Root of the user's project, if it has one.
            force: Build everything again.
            container: Returns the container image that a kit is built on.

        Raises:
            BuildError: A step failed.
            HostError: This computer lacks something that a step needs.
        """
        below = container(kit) if kit.source else self._debian(kit.ground or kit, tell, force=force)
        layers = [self._layer(kit, below, tell, force=force)] if kit.needs_machine else []
        return self._publish(kit, below, layers, project)

    def platform_for(self, platform: Platform, tell: Progress) -> Artifact:
        """Return kernel, initramfs and runtime for machines of container images: those of the base kit."""
        return self._platform(replace(load_kit("base"), architecture=platform.machine), tell, force=False)

    def _debian(self, kit: Kit, tell: Progress, *, force: bool) -> Image:
        """Return the image of a kit without a set-up, which need not have a name in the store."""
        platform = self._platform(kit, tell, force=force)
        rootfs = self._rootfs(kit, platform, tell, force=force)
        manifest = _manifest(kit, kit.environment, {**platform.files, **rootfs.files})
        digest = hashlib.sha256(canonical_json(manifest)).hexdigest()
        return self._records.image(kit.name, digest, manifest)

    def _platform(self, kit: Kit, tell: Progress, *, force: bool) -> Artifact:
        def build(folder: Path) -> Built:
            require("images")
            made = build_platform(
                folder,
                suite=kit.suite,
                architecture=kit.architecture,
                mirror=kit.mirror,
                mode=self._mode or default_mode(),
                epoch=source_date_epoch(),
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
            for line in kit.replaced:
                tell(line)
            made = build_rootfs(
                folder,
                kit,
                python=platform.facts["python"],
                mode=self._mode or default_mode(),
                epoch=source_date_epoch(),
                progress=tell,
            )
            return Built({"rootfs": made}, {})

        return self._artifacts.get(f"rootfs-{kit.name}", build_key(kit.recipe()), build, tell, force=force)

    def _layer(self, kit: Kit, below: Image, tell: Progress, *, force: bool) -> str:
        """Return the digest of the layer that a kit's set-up makes, run on the image below."""
        set_up = set_up_of(kit, below, source_date_epoch())

        def build(folder: Path) -> Built:
            require_program("mksquashfs")
            return build_set_up_layer(folder, set_up, self._set_up, tell)

        key = build_key(set_up.recipe())
        return self._artifacts.get(f"set-up-{kit.name}", key, build, tell, force=force).files[LAYER]

    def _publish(self, kit: Kit, below: Image, own: Sequence[str], project: Path | None) -> Image:
        files = {role: below.files()[role].name for role in ROLES}
        manifest = _manifest(kit, merged_environment(kit, below), files)
        if layers := [*(path.name for path in below.layers), *own]:
            manifest["layers"] = layers
        if start := {key: value for key, value in asdict(below.start).items() if value}:
            manifest["start"] = start
        manifest |= kit.services_recipe()  # not of the machine in which the set-up runs
        entry = {"name": kit.name, "key": kit_key(kit), "kit": str(kit.path)}
        entry["project"] = str(project.resolve()) if project else ""
        return self._records.publish(manifest, entry)


def _manifest(kit: Kit, environment: Iterable[tuple[str, str]], files: dict[str, str]) -> dict[str, Any]:
    return {
        "format": BUILDER_VERSION,
        "architecture": kit.architecture,
        "environment": dict(environment),
        "files": files,
        "resources": dict(kit.resources),
        **({"network": list(kit.network)} if kit.network else {}),
    }
