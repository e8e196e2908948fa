"""The value :class:`Image`: a guest image's files and the defaults of its machines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Image:
    """Everything a machine boots from; images with the same digest are identical.

    Args:
        name: Name of the kit it was built from.
        digest: SHA-256 of its manifest, which lists the SHA-256 of every file.
        architecture: ``x86_64`` or ``aarch64``.
        kernel: Linux kernel.
        initramfs: First segment of the initramfs; the agent's code is appended to it at boot time.
        runtime: The agent's own Python, as squashfs.
        rootfs: Root file system, as squashfs.
        environment: Variables that every command in a machine gets.
        resources: Default limits of its machines, by the names of
            :class:`pytest_microvm.settings.spec.Limits`: at least ``cpus``, ``memory`` and ``disk``.
        network: Default network rules of its machines.
        layer: A file system laid over ``rootfs``, as squashfs: a mirrored Python environment.
        python: Description of that environment.
    """

    name: str
    digest: str
    architecture: str
    kernel: Path
    initramfs: Path
    runtime: Path
    rootfs: Path
    environment: tuple[tuple[str, str], ...]
    resources: Mapping[str, float] = field(hash=False)
    network: tuple[str, ...] = ()
    layer: Path | None = None
    python: str = ""

    def files(self) -> dict[str, Path]:
        """Return the files by role."""
        files = {
            "kernel": self.kernel,
            "initramfs": self.initramfs,
            "runtime": self.runtime,
            "rootfs": self.rootfs,
        }
        return files if self.layer is None else {**files, "layer": self.layer}
