"""The workspace: which files of a project a machine gets, their digest, and them as a tar stream."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pytest_microvm.errors import UsageError
from pytest_microvm.spec import format_size

DEFAULT_LIMIT = 1024**3
_CACHES = frozenset(["__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"])
_LEFT_OUT = _CACHES | {".git", ".hg", ".venv", "venv", ".tox", ".nox", "node_modules", ".eggs"}
_SYSTEM = frozenset(
    f"/{name}"
    for name in (
        *("", "bin", "boot", "dev", "etc", "home", "lib", "lib64", "media", "mnt", "opt", "proc", "root"),
        *("run", "sbin", "srv", "sys", "tmp", "usr", "usr/local", "var", "var/tmp"),
    )
)


@dataclass(frozen=True)
class Entry:
    """One file, link or directory of a workspace: ``path`` below its top, bytes of ``size``."""

    path: str
    mode: int
    size: int
    mtime_ns: int
    target: str = ""


@dataclass(frozen=True)
class Workspace:
    """What is copied into a machine, to the same absolute path.

    Args:
        top: The directory copied.
        entries: What is in it, sorted by path.
    """

    top: Path
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.entries)

    def digest(self) -> str:
        """Return a SHA-256 over every path, permission, content and link target."""
        total = hashlib.sha256(os.fsencode(self.top) + b"\0")
        for entry in self.entries:
            head = f"{entry.path}\0{entry.mode:o}\0{entry.target}\0"
            total.update(head.encode("utf-8", "surrogateescape"))
            if stat.S_ISREG(entry.mode):
                total.update(_file_digest(self.top / entry.path))
        return total.hexdigest()

    def write_tar(self, file: BinaryIO) -> None:
        """Write a tar (paths below the top, owner root, time stamps kept): same files, same bytes."""
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            for entry in self.entries:
                self._add(archive, entry)

    def _add(self, archive: tarfile.TarFile, entry: Entry) -> None:
        info = tarfile.TarInfo(entry.path)
        info.mode = stat.S_IMODE(entry.mode)
        info.mtime = entry.mtime_ns // 10**9
        if entry.target:
            info.type, info.linkname = tarfile.SYMTYPE, entry.target
            archive.addfile(info)
        elif stat.S_ISDIR(entry.mode):
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        else:
            with contextlib.suppress(FileNotFoundError), (self.top / entry.path).open("rb") as content:
                info.size = os.fstat(content.fileno()).st_size  # it may have changed since it was listed
                archive.addfile(info, content)


def scan(top: Path, *, limit: int = DEFAULT_LIMIT) -> Workspace:
    """Return the workspace below ``top``: what git tracks or would add, or all but caches without git.

    Args:
        top: The directory to copy.
        limit: Bytes it may have.

    Raises:
        UsageError: ``top`` is not a project's directory, or too large.
    """
    if os.fspath(top) in _SYSTEM or os.fspath(top.resolve()) in _SYSTEM or not top.is_dir():
        raise UsageError(
            f"{top} is not a project's directory: it would be copied whole into every machine",
            resolution="start pytest in the project's directory, or name it with --rootdir",
        )
    entries = tuple(entry for path in sorted(_paths(top)) if (entry := _entry(top, path)) is not None)
    workspace = Workspace(top, entries)
    if workspace.size > limit:
        largest = max(entries, key=lambda entry: entry.size)
        raise UsageError(
            f"the workspace {top} has {format_size(workspace.size)} bytes, more than {format_size(limit)}",
            details=f"the largest file is {largest.path} with {format_size(largest.size)} bytes",
            resolution="name what the tests do not need in .gitignore",
        )
    return workspace


def _paths(top: Path) -> Iterator[str]:
    """Yield the paths to copy, below ``top``: no caches, no virtual environments."""
    listed = _tracked(top)
    if listed is None:
        yield from _walk(top)
        return
    environments = tuple(path[: -len("pyvenv.cfg")] for path in listed if path.endswith("/pyvenv.cfg"))
    for path in listed:
        if path.endswith(".pyc") or not _CACHES.isdisjoint(path.split("/")):
            continue
        if environments and path.startswith(environments):
            continue
        inside = top / path
        if inside.is_dir() and not inside.is_symlink():  # a submodule, or a repository inside this one
            yield from (f"{path}/{below}" for below in _paths(inside))
        else:
            yield path


def _tracked(top: Path) -> list[str] | None:
    """Return the files that git knows or would add, ``None`` where ``top`` is no git work tree.

    The options keep a repository's own configuration from running programs.
    """
    if not any((folder / ".git").exists() for folder in (top, *top.parents)):
        return None
    safe = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
    command = ["git", *safe, "-C", os.fspath(top), "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:  # no git here
        return None
    if done.returncode:
        return None
    return sorted({os.fsdecode(path).rstrip("/") for path in done.stdout.split(b"\0") if path})


def _walk(top: Path) -> Iterator[str]:
    for folder, names, files in os.walk(top):
        here = Path(folder)
        names[:] = [
            name for name in names if name not in _LEFT_OUT and not (here / name / "pyvenv.cfg").exists()
        ]
        links = [name for name in names if (here / name).is_symlink()]
        for name in [*links, *(name for name in files if not name.endswith(".pyc"))]:
            yield os.fspath((here / name).relative_to(top))
        if not names and not files and here != top:
            yield os.fspath(here.relative_to(top))


def _entry(top: Path, path: str) -> Entry | None:
    """Return what lies at ``path``, ``None`` for what is gone or cannot be copied (sockets, devices)."""
    try:
        status = (top / path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(status.st_mode):
        return Entry(path, status.st_mode, 0, status.st_mtime_ns, os.readlink(top / path))  # noqa: PTH115
    if stat.S_ISREG(status.st_mode):
        return Entry(path, status.st_mode, status.st_size, status.st_mtime_ns)
    if stat.S_ISDIR(status.st_mode):  # empty, or a repository inside this one
        return Entry(path, status.st_mode, 0, status.st_mtime_ns)
    return None


def _file_digest(path: Path) -> bytes:
    """Return a file's SHA-256; one that has gone since it was listed counts as empty."""
    digest = hashlib.sha256()
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        while block := file.read(1024 * 1024):
            digest.update(block)
    return digest.digest()
