"""Build the files that all images of a suite share: kernel, initramfs, the agent's runtime disk.

One ``mmdebstrap --variant=extract`` unpacks the kernel, busybox and Python packages without running
any of their scripts; all files are taken from that tree.
"""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from pytest_microvm.errors import BuildError
from pytest_microvm.images import runtime
from pytest_microvm.images.debian import apt_options, mirror_lines, mmdebstrap_command
from pytest_microvm.images.initramfs import BOOT_MODULES, INIT, SCSI_MODULES, initramfs_archive
from pytest_microvm.images.kit_keys import ARCHITECTURES
from pytest_microvm.images.squashfs import run_mmdebstrap, squash_folder

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_microvm.images.process import Progress


@dataclass(frozen=True)
class PlatformFiles:
    """The files that :func:`build_platform` wrote, and their versions.

    Args:
        python: Version of the suite's Python, such as ``3.11``.
        kernel_version: Name of the kernel's modules folder.
    """

    kernel: Path
    initramfs: Path
    runtime: Path
    python: str
    kernel_version: str


def platform_recipe(suite: str, architecture: str, mirror: str) -> dict[str, object]:
    """Return all inputs of a platform, for its build key."""
    return {
        "suite": suite,
        "architecture": architecture,
        "mirror": mirror,
        "packages": _packages(architecture),
        "modules": (*BOOT_MODULES, *SCSI_MODULES),
        "init": INIT.read_text(encoding="utf-8"),
    }


def build_platform(
    folder: Path, *, suite: str, architecture: str, mirror: str, mode: str, epoch: int, progress: Progress
) -> PlatformFiles:
    """Build a platform in an empty folder.

    Args:
        folder: Where the files and everything temporary go.
        suite: Debian suite.
        architecture: ``x86_64`` or ``aarch64``.
        mirror: The kit's mirror; empty for this computer's.
        mode: mmdebstrap's mode.
        epoch: Newest time stamp of any file, in seconds.
        progress: Called with each stage.

    Raises:
        BuildError: A step failed.
    """
    archive = folder / "packages.tar"
    command = mmdebstrap_command(
        suite=suite,
        architecture=ARCHITECTURES[architecture],
        variant="extract",
        packages=_packages(architecture),
        mirrors=mirror_lines(suite, mirror),
        mode=mode,
        apt=apt_options(),
    )
    with archive.open("wb") as output:
        run_mmdebstrap(command, output, epoch=epoch, progress=progress)
    progress("picking the kernel, its modules and the agent's Python")
    tree = folder / "tree"
    _unpack(archive, tree)
    archive.unlink()
    modules = runtime.only(tree, "lib/modules/*", "usr/lib/modules/*")
    kernel = folder / "vmlinuz"
    shutil.move(runtime.only(tree, "boot/vmlinuz-*", "boot/vmlinux-*"), kernel)
    initramfs = folder / "initramfs"
    initramfs.write_bytes(initramfs_archive(runtime.only(tree, "bin/busybox", "usr/bin/busybox"), modules))
    python = runtime.lay_out_runtime(tree, folder / "runtime", epoch=epoch)
    runtime.lay_out_modules(tree, modules, folder / "runtime" / "modules")
    progress("packing the agent's runtime disk")
    disk = folder / "runtime.squashfs"
    squash_folder(folder / "runtime", disk, epoch=epoch)
    return PlatformFiles(kernel, initramfs, disk, python, modules.name)


def _packages(architecture: str) -> tuple[str, ...]:
    return (f"linux-image-cloud-{ARCHITECTURES[architecture]}", *runtime.PACKAGES)


def _unpack(archive: Path, tree: Path) -> None:
    """Unpack files, folders and symbolic links below ``tree``; other members are not needed."""
    with tarfile.open(archive, "r:") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if ".." in path.parts or path.is_absolute():
                raise BuildError(
                    f"the package archive holds the path {member.name!r}", resolution="build again"
                )
            target = tree / path
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
            elif member.isreg() and (content := tar.extractfile(member)) is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as output:
                    shutil.copyfileobj(content, output, 1 << 20)
                target.chmod(member.mode)
            elif member.issym():
                target.parent.mkdir(parents=True, exist_ok=True)
                # A leading slash means the tree's own root
                depth = len(path.parts) - 1
                link = member.linkname
                target.symlink_to("../" * depth + link[1:] if link.startswith("/") else link)
