"""Build what all images of a suite share: the kernel, the initramfs and the agent's runtime disk.

One ``mmdebstrap --variant=extract`` unpacks the kernel, busybox and Python packages without running
any of their scripts; everything here is picked out of that tree.
"""

from __future__ import annotations

import lzma
import re
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_microvm.errors import BuildError
from pytest_microvm.images.cpio import CpioEntry, cpio_archive
from pytest_microvm.images.debian import apt_options, mirror_lines, mmdebstrap_command
from pytest_microvm.images.kits import ARCHITECTURES
from pytest_microvm.images.process import build_environment, run
from pytest_microvm.images.squashfs import run_mmdebstrap, squash_folder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_microvm.images.squashfs import Progress

INIT = Path(__file__).with_name("init.sh")

# What a machine needs to reach its disks and its host, whichever machine type the hypervisor chose.
BOOT_MODULES = ("virtio_mmio", "virtio_pci", "virtio_console", "virtio_blk", "squashfs", "overlay", "ext4")

_PACKAGES = ("busybox-static", "python3-minimal", "libpython3-stdlib")
_LIBRARIES = ("libc.so", "libm.so", "libz.so", "libexpat.so", "libffi.so", "libdl.so", "libpthread.so", "librt.so", "libutil.so")
# Parts of the standard library that the agent never uses.
_NOT_NEEDED = {
    "__phello__", "curses", "dbm", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "sqlite3",
    "test", "tests", "tkinter", "turtledemo", "unittest", "venv", "wsgiref", "xmlrpc",
}  # fmt: skip
# Extension modules whose libraries stay behind, and CPython's own test modules.
_NOT_LOADABLE = re.compile(
    r"(_bz2|_crypt|_curses|_curses_panel|_dbm|_gdbm|_hashlib|_lzma|_sqlite3|_ssl|_tkinter|_uuid|nis|readline"
    r"|_codecs_\w+|_test\w+|_ctypes_test|_xx\w+|xx\w+|ossaudiodev)\..*"
)
_SELF_TEST = (
    "import array, asyncio, ctypes, fcntl, grp, hashlib, json, os, pty, pwd, random, resource, select, selectors, "
    "shutil, signal, socket, struct, subprocess, tarfile, tempfile, termios, threading, zlib"
)


@dataclass(frozen=True)
class PlatformFiles:
    """What :func:`build_platform` wrote.

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
    """Return everything that shapes a platform, for its build key."""
    return {
        "suite": suite,
        "architecture": architecture,
        "mirror": mirror,
        "packages": _packages(architecture),
        "modules": BOOT_MODULES,
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
        progress: Told each stage.

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
    modules = _only(tree, "lib/modules/*", "usr/lib/modules/*")
    kernel = folder / "vmlinuz"
    shutil.move(_only(tree, "boot/vmlinuz-*", "boot/vmlinux-*"), kernel)
    initramfs = folder / "initramfs"
    initramfs.write_bytes(initramfs_archive(_only(tree, "bin/busybox", "usr/bin/busybox"), modules))
    python = _lay_out_runtime(tree, folder / "runtime", epoch)
    _lay_out_modules(tree, modules, folder / "runtime" / "modules")
    progress("packing the agent's runtime disk")
    runtime = folder / "runtime.squashfs"
    squash_folder(folder / "runtime", runtime, epoch=epoch)
    return PlatformFiles(kernel, initramfs, runtime, python, modules.name)


def _packages(architecture: str) -> tuple[str, ...]:
    return (f"linux-image-cloud-{ARCHITECTURES[architecture]}", *_PACKAGES)


def _unpack(archive: Path, tree: Path) -> None:
    """Unpack files, folders and links that stay below ``tree``; nothing else is needed from it."""
    with tarfile.open(archive, "r:") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if ".." in path.parts or path.is_absolute():
                raise BuildError(f"the package archive holds the path {member.name!r}", resolution="build again")
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


def _only(tree: Path, *patterns: str) -> Path:
    found = [path for pattern in patterns for path in sorted(tree.glob(pattern))]
    if not found:
        raise BuildError(
            f"the suite's packages hold no {patterns[0]}", resolution="use a suite of Debian 12 (bookworm) or later"
        )
    return found[0]


# -- initramfs ----------------------------------------------------------------------------------------


def initramfs_archive(busybox: Path, modules: Path) -> bytes:
    """Return the initramfs: busybox, the boot modules in loading order, and the init script.

    It is not compressed: the kernel unpacks it under emulation, where copying beats inflating.
    """
    entries = [CpioEntry.directory(name) for name in ("bin", "dev", "mnt", "mods", "newroot", "proc", "sys")]
    entries += [CpioEntry.directory(f"mnt/{name}") for name in ("root", "scratch")]
    entries.append(CpioEntry.character_device("dev/console", 5, 1))
    entries.append(CpioEntry.file("bin/busybox", busybox.read_bytes(), 0o755))
    order = loading_order(modules, BOOT_MODULES)
    entries += [CpioEntry.file(f"mods/{name}.ko", _module_bytes(path)) for name, path in order]
    names = "".join(f"{name}.ko\n" for name, _path in order)
    entries.append(CpioEntry.file("mods/order", names.encode()))
    entries.append(CpioEntry.file("init", INIT.read_bytes(), 0o755))
    return cpio_archive(entries)


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
    return path.rsplit("/", 1)[-1].split(".ko")[0].replace("-", "_")


def _dependencies(module: Path) -> list[str]:
    match = re.search(rb"\0depends=([^\0]*)\0", _module_bytes(module))
    return [name.replace("-", "_") for name in match[1].decode().split(",") if name] if match else []


def _module_bytes(module: Path) -> bytes:
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


# -- runtime ------------------------------------------------------------------------------------------


def _lay_out_runtime(tree: Path, runtime: Path, epoch: int) -> str:
    """Lay out an interpreter that needs nothing of the root file system it runs on.

    Returns:
        The Python version, such as ``3.11``.
    """
    interpreter = _only(tree, "usr/bin/python3.[0-9]*")
    python = interpreter.name.removeprefix("python")
    (runtime / "bin").mkdir(parents=True)
    (runtime / "lib64").mkdir()
    shutil.copy2(interpreter, runtime / "bin" / "python3")
    shutil.copytree(
        tree / "usr/lib" / interpreter.name, runtime / "lib" / interpreter.name, ignore=_left_out, symlinks=False,
        ignore_dangling_symlinks=True,
    )  # fmt: skip
    loader = _loader(tree)
    shutil.copy2(loader.resolve(), runtime / "lib64" / loader.name)
    for pattern in ("lib/*-linux-gnu*/lib*.so*", "usr/lib/*-linux-gnu*/lib*.so*"):
        for library in sorted(tree.glob(pattern)):
            soname = library.name.partition(".so")[0] + ".so"
            if soname in _LIBRARIES and library.exists():
                shutil.copy2(library, runtime / "lib" / library.name)
    start = [str(runtime / "lib64" / loader.name), "--library-path", str(runtime / "lib"), str(runtime / "bin/python3")]
    inside = f"/run/microvm/runtime/lib/{interpreter.name}"
    library = runtime / "lib" / interpreter.name
    environment = build_environment(SOURCE_DATE_EPOCH=str(epoch), PYTHONHASHSEED="0")
    run(
        [*start, "-I", "-S", "-m", "compileall", "-q", "-f", "-o", "0", "--invalidation-mode", "unchecked-hash",
         "-s", str(library), "-p", inside, str(library)],
        what="compiling the agent's standard library", environment=environment,
    )  # fmt: skip
    run([*start, "-I", "-S", "-c", _SELF_TEST], what="starting the agent's Python", environment=environment)
    return python


def _loader(tree: Path) -> Path:
    return _only(tree, "lib64/ld-linux-*", "usr/lib64/ld-linux-*", "lib/ld-linux-*", "usr/lib/ld-linux-*")


def _lay_out_modules(tree: Path, modules: Path, target: Path) -> None:
    """Index the kernel's modules with their own release's depmod, and put them where the guest binds them."""
    libraries = ":".join(str(path) for path in (*tree.glob("lib/*-linux-gnu*"), *tree.glob("usr/lib/*-linux-gnu*")))
    depmod = _only(tree, "sbin/depmod", "usr/sbin/depmod")
    run(
        [str(_loader(tree)), "--library-path", libraries, str(depmod), "-b", str(modules.parents[2]), modules.name],
        what="depmod", environment=build_environment(),
    )  # fmt: skip
    for link in ("build", "source"):
        (modules / link).unlink(missing_ok=True)
    target.mkdir()
    modules.rename(target / modules.name)


def _left_out(folder: str, names: list[str]) -> set[str]:
    in_library = re.fullmatch(r"python3\.\d+", Path(folder).name) is not None
    return {
        name
        for name in names
        if name == "__pycache__"
        or (in_library and (name in _NOT_NEEDED or name.startswith("config-")))
        or (Path(folder).name == "lib-dynload" and _NOT_LOADABLE.match(name))
        or (Path(folder).name != "lib-dynload" and name in {"test", "tests"})
    }
