"""Make the initramfs: busybox, the kernel modules a machine needs to boot, and the init script."""

from __future__ import annotations

import lzma
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import BuildError
from pytest_microvm.images.cpio import CpioEntry, cpio_archive

if TYPE_CHECKING:
    from collections.abc import Iterable

INIT = Path(__file__).with_name("init.sh")

# For access to disks and host, whichever machine type the hypervisor chose; tun, which receives packets that
# go nowhere; fuse, for live mounts.
BOOT_MODULES = (
    "virtio_mmio", "virtio_pci", "virtio_console", "virtio_blk", "squashfs", "overlay", "ext4", "tun", "fuse"
)  # fmt: skip

# For disks on a SCSI controller: loaded only if there are some, and the last one after the disks were found,
# since loading it then waits until each has its block device.
SCSI_MODULES = ("virtio_scsi", "sd_mod")

_FOLDERS = (
    "bin", "dev", "l", "mnt", "mnt/root", "mnt/scratch", "mods", "newroot", "proc", "sys",
    "devices", "devices/pts",  # copied to the machine's /dev
    "run", "run/microvm", "run/microvm/code", "run/microvm/runtime",  # copied to its /run
)  # fmt: skip
_SHARED_FOLDERS = ("devices/shm", "run/lock")  # for every user, sticky
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}


def initramfs_archive(busybox: Path, modules: Path) -> bytes:
    """Return the initramfs archive; the agent's code is appended as a second one at boot time.

    It is not compressed: the kernel unpacks it under emulation, where copying beats inflating.

    Args:
        busybox: A static busybox.
        modules: The kernel's folder ``lib/modules/<version>``.

    Raises:
        BuildError: The kernel lacks a module that machines need.
    """
    order = loading_order(modules, BOOT_MODULES)
    scsi = [one for one in loading_order(modules, SCSI_MODULES) if one not in order]
    return cpio_archive(
        [
            *(CpioEntry.directory(name) for name in _FOLDERS),
            *(CpioEntry.directory(name, 0o1777) for name in _SHARED_FOLDERS),
            *(CpioEntry.symlink(f"devices/{name}", target) for name, target in _DEVICE_LINKS.items()),
            CpioEntry.character_device("dev/console", 5, 1),
            CpioEntry.file("bin/busybox", busybox.read_bytes(), 0o755),
            *(CpioEntry.file(f"mods/{name}.ko", _module_bytes(path)) for name, path in (*order, *scsi)),
            CpioEntry.file("mods/order", "".join(f"{name}.ko\n" for name, _path in order).encode()),
            CpioEntry.file("mods/scsi", "".join(f"{name}.ko\n" for name, _path in scsi).encode()),
            CpioEntry.file("init", INIT.read_bytes(), 0o755),
        ]
    )


def loading_order(modules: Path, wanted: Iterable[str]) -> list[tuple[str, Path]]:
    """Return the wanted modules and all they depend on, dependencies first, without built-in ones.

    The dependencies come from each module's own ``depends=`` record, which is what depmod reads too.

    Args:
        modules: The kernel's folder ``lib/modules/<version>``.
        wanted: Names of modules.

    Raises:
        BuildError: The kernel has no such module.
    """
    files = {_module_name(path.name): path for path in modules.rglob("*.ko*")}
    builtin = {_module_name(line) for line in (modules / "modules.builtin").read_text().splitlines()}
    order: dict[str, Path] = {}

    def visit(name: str) -> None:
        if name in order or (name in builtin and name not in files):
            return
        if name not in files:
            raise BuildError(f"the kernel has no module {name}", resolution="use a suite with a cloud kernel")
        for dependency in _dependencies(files[name]):
            visit(dependency)
        order[name] = files[name]

    for name in wanted:
        visit(name)
    return list(order.items())


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _dependencies(module: Path) -> list[str]:
    match = re.search(rb"\0depends=([^\0]*)\0", _module_bytes(module))
    return [name.replace("-", "_") for name in match[1].decode().split(",") if name] if match else []


def _module_bytes(module: Path) -> bytes:
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data
