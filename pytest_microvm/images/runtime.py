"""Lay out the agent's runtime disk: a Python that does not depend on the guest's root file system."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import BuildError
from pytest_microvm.images.process import build_environment, run

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("busybox-static", "python3-minimal", "libpython3-stdlib")

_MOUNTED_AT = "/run/microvm/runtime"  # where init.sh puts it
_LIBRARIES = {"libc", "libm", "libz", "libexpat", "libffi", "libdl", "libpthread", "librt", "libutil"}
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
    "import array, asyncio, ctypes, fcntl, grp, hashlib, json, mmap, os, pty, pwd, random, resource, select, "
    "selectors, shutil, signal, socket, struct, subprocess, tarfile, tempfile, termios, threading, zlib"
)


def lay_out_runtime(tree: Path, runtime: Path, *, epoch: int) -> str:
    """Copy the interpreter, its library and its C libraries from an unpacked tree, and compile the library.

    Args:
        tree: The unpacked packages.
        runtime: The folder to create.
        epoch: Value of ``SOURCE_DATE_EPOCH``.

    Returns:
        The Python version, such as ``3.11``.

    Raises:
        BuildError: Something is missing, or the result does not start.
    """
    interpreter = only(tree, "usr/bin/python3.[0-9]*")
    library = runtime / "lib" / interpreter.name
    shutil.copytree(
        tree / "usr/lib" / interpreter.name, library, ignore=_left_out, ignore_dangling_symlinks=True
    )
    (runtime / "bin").mkdir()
    (runtime / "lib64").mkdir()
    shutil.copy2(interpreter, runtime / "bin" / "python3")
    shutil.copy2(loader(tree).resolve(), runtime / "lib64" / loader(tree).name)
    for file in library_files(tree):
        shutil.copy2(file, runtime / "lib" / file.name)
    environment = build_environment(SOURCE_DATE_EPOCH=str(epoch), PYTHONHASHSEED="0")
    start = [str(loader(runtime)), "--library-path", str(runtime / "lib")]
    start += [str(runtime / "bin" / "python3"), "-I", "-S"]
    # Hash-based .pyc files that are not checked: valid whatever the time stamps, without the source.
    compile_all = ["-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash"]
    names = ["-s", str(library), "-p", f"{_MOUNTED_AT}/lib/{interpreter.name}"]
    run(
        [*start, *compile_all, *names, str(library)],
        what="compiling the agent's standard library", environment=environment,
    )  # fmt: skip
    run([*start, "-c", _SELF_TEST], what="starting the agent's Python", environment=environment)
    return interpreter.name.removeprefix("python")


def lay_out_modules(tree: Path, modules: Path, target: Path) -> None:
    """Index the kernel's modules with their own release's depmod, and move them to ``target``.

    Raises:
        BuildError: depmod failed.
    """
    libraries = ":".join(str(path) for path in library_folders(tree))
    depmod = only(tree, "sbin/depmod", "usr/sbin/depmod")
    index = [str(depmod), "-b", str(modules.parents[2]), modules.name]
    run(
        [str(loader(tree)), "--library-path", libraries, *index],
        what="depmod",
        environment=build_environment(),
    )
    for link in ("build", "source"):
        (modules / link).unlink(missing_ok=True)
    target.mkdir()
    modules.rename(target / modules.name)


def only(tree: Path, *patterns: str) -> Path:
    """Return the first match of the first pattern that has one.

    Raises:
        BuildError: There is none.
    """
    for pattern in patterns:
        for path in sorted(tree.glob(pattern)):
            return path
    raise BuildError(
        f"the suite's packages hold no {patterns[0]}",
        resolution="use a suite of Debian 12 (bookworm) or later",
    )


def loader(tree: Path) -> Path:
    """Return the dynamic loader, under the name that programs use for it."""
    return only(tree, *(f"{folder}/ld-linux-*" for folder in ("lib64", "usr/lib64", "lib", "usr/lib")))


def library_folders(tree: Path) -> Sequence[Path]:
    """Return the folders of the C libraries."""
    return [
        path
        for pattern in ("lib/*-linux-gnu*", "usr/lib/*-linux-gnu*")
        for path in sorted(tree.glob(pattern))
    ]


def library_files(tree: Path) -> Sequence[Path]:
    """Return the C libraries that the interpreter and its extension modules load."""
    files = [file for folder in library_folders(tree) for file in sorted(folder.glob("lib*.so.*"))]
    return [file for file in files if file.name.partition(".so")[0] in _LIBRARIES and file.exists()]


def _left_out(folder: str, names: list[str]) -> set[str]:
    inside = Path(folder).name
    if inside == "lib-dynload":
        return {name for name in names if _NOT_LOADABLE.match(name)}
    is_library = re.fullmatch(r"python3\.\d+", inside) is not None
    return {
        name
        for name in names
        if name in {"__pycache__", "test", "tests"}
        or (is_library and (name in _NOT_NEEDED or name.startswith("config-")))
    }
