"""Select the files of a Python environment that a machine gets, and notice when one of them changes."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_microvm.errors import UsageError
from pytest_microvm.images.mirror.environment import is_own

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_microvm.images.mirror.environment import PythonEnvironment

CREDENTIALS = (
    "pip.conf", "pip.ini", "uv.toml", ".pypirc", ".netrc", "_netrc", ".npmrc", ".yarnrc*", ".git-credentials",
    ".condarc", "condarc", ".env", ".env.*", ".envrc", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519",
    ".pgpass", ".my.cnf", ".docker", ".aws", ".azure", ".kube", ".ssh", ".gnupg", "*.kdbx", "*.keytab",
    "*.p12", "*.pfx",
)  # fmt: skip
"""Names of files and folders that may hold a credential; no layer contains them."""

_CACHES = frozenset([
    ".git", ".hg", ".svn", ".cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".tox",
    ".nox",
])  # fmt: skip
_ARCHIVES = (".a", ".la")
_CONDA = frozenset(["pkgs", "envs", "conda-meta", "locks"])
# tox's own files in an environment have variables of this computer, and addresses of package indexes.
_TOX_RECORD = ".tox-info.json"
_TOX = frozenset([_TOX_RECORD, "log", "tmp", "constraints.txt", "pylock.txt"])
# Parts of the standard library that no suite but CPython's own uses.
_NOT_LIBRARY = frozenset(["test", "site-packages", "dist-packages", "turtledemo"])
_TESTS = frozenset(["idle_test", "tests"])
_NOT_SOURCE = frozenset(["node_modules", "build", "dist", ".venv", "venv"])
_SHEBANG = 128  # bytes of a script that are read to see whether it is Python's
_LARGEST_SCRIPT = 256 * 1024
_SYSTEM = frozenset(
    f"/{name}".rstrip("/")
    for name in ("", "bin", "boot", "dev", "etc", "home", "lib", "lib64", "media", "mnt", "opt", "proc",
                 "root", "run", "sbin", "srv", "sys", "tmp", "usr", "usr/bin", "usr/lib", "usr/lib64",
                 "usr/share", "var", "var/tmp", "var/lib")
)  # fmt: skip


class MirroredFile(NamedTuple):
    """A file, link or folder: its mode, bytes, time of change in nanoseconds, and a link's target."""

    mode: int
    size: int
    mtime_ns: int
    target: str = ""


@dataclass
class MirroredFiles:
    """The files of an environment by absolute path; no folder of a path is a link.

    Args:
        entries: The files, links and folders.
        editable: Folders outside the environment from which its editable installations import.
        links: The paths of the links, in the order in which they were added.
    """

    entries: dict[str, MirroredFile] = field(default_factory=dict)
    editable: list[Path] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    @cached_property
    def digest(self) -> str:
        """A SHA-256 over names, modes, sizes and times; compiled modules (.pyc) do not count.

        Python writes those as a program runs, and they only save time.
        """
        total = hashlib.sha256()
        for path, entry in sorted(self.entries.items()):
            if path.endswith((".pyc", "/__pycache__")):
                continue
            time = 0 if stat.S_ISDIR(entry.mode) else entry.mtime_ns
            size = 0 if stat.S_ISDIR(entry.mode) else entry.size
            total.update(
                f"{path}\0{entry.mode:o}\0{size}\0{time}\0{entry.target}\0".encode(errors="surrogateescape")
            )
        return total.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.entries.values() if stat.S_ISREG(entry.mode))

    def add(self, path: str) -> str | None:
        """Add one file, link or folder, and the links on the way to it.

        Returns:
            Its path without links on the way; ``None`` if it does not exist or is none of the three.
        """
        folder, name = os.path.split(os.path.normpath(path))
        real = os.path.join(self.reach(folder), name) if name else "/"
        try:
            found = os.lstat(real)
        except OSError:
            return None
        return real if self.take(real, found) else None

    def take(self, path: str, found: os.stat_result) -> bool:
        """Record the file with this path and status; return False for devices, sockets and pipes."""
        if stat.S_ISLNK(found.st_mode):
            entry = MirroredFile(found.st_mode, 0, found.st_mtime_ns, os.readlink(path))
            if path not in self.entries:
                self.links.append(path)
        elif stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
            entry = MirroredFile(found.st_mode, found.st_size, found.st_mtime_ns)
        else:
            return False
        self.entries[path] = entry
        return True

    def reach(self, folder: str) -> str:
        """Return a folder's path without links; add the links on the way, so that the given path works."""
        real = os.path.realpath(folder)
        if real != folder and folder not in ("/", ""):
            above, name = os.path.split(folder)
            parent = self.reach(above)
            link = os.path.join(parent, name)
            if os.path.islink(link) and link not in self.entries:
                self.take(link, os.lstat(link))
                self.reach(os.path.normpath(os.path.join(parent, os.readlink(link))))
        return real


def select(environment: PythonEnvironment, *, without: Path | None = None) -> MirroredFiles:
    """Return the files of ``environment`` that a machine gets.

    Args:
        environment: The environment.
        without: A folder whose editable sources the machine gets another way: the workspace.

    Raises:
        UsageError: An editable installation imports from a folder that must not be copied whole.
    """
    return _Selecting(environment).select(without)


class _Selecting:
    def __init__(self, environment: PythonEnvironment) -> None:
        self._environment = environment
        self._selection = MirroredFiles()
        self._libraries = frozenset(os.path.realpath(path) for path in environment.standard_libraries)
        self._sites = frozenset(os.path.realpath(path) for path in environment.sites)
        self._prefix = os.path.realpath(environment.prefix)
        self._programs = os.path.realpath(environment.base / "bin")
        self._headers = environment.base / "include" / environment.library
        major, minor = environment.version.split(".")[:2]
        self._compiled = f".cpython-{major}{minor}"

    def select(self, without: Path | None) -> MirroredFiles:
        environment, selection = self._environment, self._selection
        if environment.whole:
            self._tree(environment.prefix)
        else:
            self._scripts(environment.prefix / "bin")
            self._scripts(Path("/usr/local/bin"))
        for folder in (*environment.standard_libraries, *environment.sites):
            self._tree(folder)
        self._tree(self._headers)
        for program in sorted((environment.base / "bin").glob("python*")):
            selection.add(str(program))
        self._editable(without)
        self._follow_links()
        return selection

    def _tree(self, top: Path) -> None:
        real = self._selection.add(str(top))
        if real is not None and stat.S_ISDIR(self._selection.entries[real].mode):
            self._walk(real)

    def _walk(self, folder: str, *, source: bool = False) -> None:
        selection = self._selection
        todo = [folder]
        while todo:
            above = todo.pop()
            try:
                with os.scandir(above) as listing:
                    found = [(e.name, e.path, e.is_dir(follow_symlinks=False), e) for e in listing]
            except OSError:  # unreadable for this user: so it is for its suite
                continue
            for name, path, is_folder, entry in found:
                if path in selection.entries and not is_folder:
                    continue
                if self._left_out(above, name, is_folder=is_folder, source=source):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:  # deleted since it was listed
                    continue
                if selection.take(path, status) and is_folder:
                    todo.append(path)

    def _left_out(self, above: str, name: str, *, is_folder: bool, source: bool) -> bool:
        if name.endswith(".pyc"):
            return self._compiled not in name or not above.endswith("__pycache__")
        if name in _CACHES or name.endswith(_ARCHIVES) or _CREDENTIAL.match(name):
            return True
        if above.endswith(("/site-packages", "/dist-packages")) and is_own(name):
            return True
        left = False
        if above in self._libraries:
            left = name in _NOT_LIBRARY or name.startswith("config-")
            left = left and os.path.join(above, name) not in self._sites
        elif is_folder and source:
            left = name in _NOT_SOURCE or os.path.exists(os.path.join(above, name, "pyvenv.cfg"))
        elif above == self._prefix:
            left = name in _CONDA and os.path.isdir(os.path.join(above, "conda-meta"))
            left = left or (name in _TOX and os.path.lexists(os.path.join(above, _TOX_RECORD)))
        elif name in _TESTS:
            left = os.path.dirname(above) in self._libraries
        return left

    def _scripts(self, folder: Path) -> None:
        """Add the programs in a folder that are Python scripts, and the interpreters."""
        try:
            with os.scandir(folder) as listing:
                found = list(listing)
        except OSError:
            return
        for entry in found:
            if entry.name.startswith("python") or (entry.is_file() and _is_script(entry.path)):
                self._selection.add(entry.path)

    def _editable(self, without: Path | None) -> None:
        if self._environment.confined:
            return
        inside = None if without is None else without.resolve()
        for path in dict.fromkeys(self._environment.editable_sources()):
            real = path.resolve()
            if (inside is not None and real.is_relative_to(inside)) or str(real) in self._selection.entries:
                continue
            if real.is_dir() and not self._may_follow(str(real)):
                raise UsageError(
                    f"invalid editable installation in {self._environment.prefix}: expected a project's "
                    f"folder, got {path}, which would be copied whole into machines",
                    resolution="install that project from a folder of its own, or say --microvm-python=image",
                )
            self._selection.editable.append(path)
            added = self._selection.add(str(path))
            if added is not None and real.is_dir():
                self._selection.add(str(real))
                self._walk(str(real), source=True)

    def _follow_links(self) -> None:
        """Add the targets of links that lead out of the selection."""
        entries = self._selection.entries
        for link in self._selection.links:  # grows as targets are added that are, or contain, links
            target = os.path.normpath(os.path.join(os.path.dirname(link), entries[link].target))
            if target in entries:
                continue
            if self._environment.confined and not self._is_base(link):
                self._confine(link, target)
                continue
            target = os.path.join(self._selection.reach(os.path.dirname(target)), os.path.basename(target))
            is_folder = os.path.isdir(target) and not os.path.islink(target)
            if target not in entries and (not is_folder or self._may_follow(target)):
                added = self._selection.add(target)
                if added is not None and is_folder:
                    self._walk(added)

    def _is_base(self, link: str) -> bool:
        """Return True for a link of the base installation: its owner decides where it leads."""
        if link.startswith(f"{self._prefix}/"):
            return False
        folders = (*self._libraries, *self._sites, os.path.realpath(self._headers))
        return os.path.dirname(link) == self._programs or link.startswith(tuple(f"{f}/" for f in folders))

    def _confine(self, link: str, target: str) -> None:
        """Check a link that a stranger may have made: it adds no file, only other names of added ones.

        Raises:
            UsageError: It leads to a file of this computer that the machine does not get.
        """
        real, own = os.path.realpath(target), f"{self._prefix}/"
        if real in self._selection.entries:
            self._selection.add(target)
        elif link.startswith(own) and not real.startswith(own) and os.path.exists(real):
            raise UsageError(
                f"{link} leads out of the environment and of its Python: it is a link to {target}",
                resolution="replace the link with the file itself, or use the image's Python",
            )

    def _may_follow(self, folder: str) -> bool:
        return not (
            folder in _SYSTEM
            or Path(self._prefix).is_relative_to(folder)
            or Path.home().resolve().is_relative_to(folder)
            or folder.startswith(("/proc/", "/sys/", "/dev/", "/run/"))
        )


def compiled_is_valid(path: str, entries: dict[str, MirroredFile]) -> bool:
    """Return True if a .pyc file was compiled from its source as the source is now (PEP 3147, PEP 552)."""
    folder, name = os.path.split(path)
    source = entries.get(os.path.join(os.path.dirname(folder), name.partition(".")[0] + ".py"))
    if source is None:
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    flags = int.from_bytes(head[4:8], "little")
    made_from = (int.from_bytes(head[8:12], "little"), int.from_bytes(head[12:16], "little"))
    return flags != 0 or made_from == (source.mtime_ns // 10**9 & 0xFFFFFFFF, source.size & 0xFFFFFFFF)


def candidates(entries: dict[str, MirroredFile]) -> Iterator[Path]:
    """Yield the files that may be ELF files: executable ones, and those named like shared libraries."""
    for path, entry in entries.items():
        if stat.S_ISREG(entry.mode) and (entry.mode & 0o111 or ".so" in os.path.basename(path)):
            yield Path(path)


_CREDENTIAL = re.compile("|".join(fnmatch.translate(name) for name in CREDENTIALS))


def _is_script(path: str) -> bool:
    try:
        if os.stat(path).st_size > _LARGEST_SCRIPT:
            return False
        with open(path, "rb") as file:
            head = file.read(_SHEBANG)
    except OSError:
        return False
    return head.startswith(b"#!") and b"python" in head.partition(b"\n")[0]
