"""The value :class:`Image`: a guest image's files and the defaults of its machines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Names of kits, and of pulled images."""

DEFAULT_RESOURCES = {"cpus": 1, "memory": 512 * 1024**2, "disk": 2 * 1024**3}
"""Resources of machines whose image sets none."""


@dataclass(frozen=True)
class StartDefaults:
    """What a container image says about its command; images of kits say nothing.

    Args:
        entrypoint: The beginning of the command line.
        arguments: The rest of it, unless the user gives another one.
        workdir: The working directory; empty: ``/``.
        user: ``USER`` or ``USER:GROUP``, names or numbers; empty: root.
    """

    entrypoint: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""


@dataclass(frozen=True)
class Service:
    """A server that is started in the template of a kit's machines, so that it runs in each of them.

    Args:
        name: Its name, also of its log.
        start: Shell command that starts it, as root; the server may stay in the foreground or not.
        ready: Shell command that succeeds once it serves.
    """

    name: str
    start: str
    ready: str


@dataclass(frozen=True)
class Image:
    """Everything a machine boots from; images with the same digest are identical.

    Args:
        name: Name of the kit it was built from; of a container image its reference, or its name after
            ``image pull --as``.
        digest: SHA-256 of its manifest, which lists the SHA-256 of every file.
        architecture: ``x86_64`` or ``aarch64``.
        kernel: Linux kernel.
        initramfs: First segment of the initramfs; the agent's code is appended to it at boot time.
        runtime: The agent's own Python, as squashfs.
        rootfs: Lowest layer of the root file system, as squashfs.
        environment: Variables that every command in a machine gets.
        resources: Default limits of its machines, by the names of
            :class:`pytest_microvm.settings.spec.Limits`: at least ``cpus``, ``memory`` and ``disk``.
        network: Default network rules of its machines.
        layers: File systems laid over ``rootfs``, the lowest first, as squashfs. A mirrored Python
            environment is the last one.
        python: Description of that environment.
        start: The command of a container image.
        services: Servers that run in every machine, in the order in which they start.
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
    layers: tuple[Path, ...] = ()
    python: str = ""
    start: StartDefaults = field(default=StartDefaults())
    services: tuple[Service, ...] = ()

    @property
    def file_systems(self) -> tuple[Path, ...]:
        """All layers of the root file system, the lowest first."""
        return (self.rootfs, *self.layers)

    def files(self) -> dict[str, Path]:
        """Return the files by role."""
        return {
            "kernel": self.kernel,
            "initramfs": self.initramfs,
            "runtime": self.runtime,
            "rootfs": self.rootfs,
            **{f"layer{number}": path for number, path in enumerate(self.layers, 1)},
        }
