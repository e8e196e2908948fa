"""Find the shared libraries that ELF files load, by their headers.

``ldd`` would run what it is asked about. The search is that of ld.so(8): DT_RPATH of the file and of its
loaders, ``LD_LIBRARY_PATH``, DT_RUNPATH, the folders of /etc/ld.so.conf, then the default folders.
"""

from __future__ import annotations

import os
import re
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.untrusted.nofollow import open_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_MAGIC = b"\x7fELF"
_MAX_SEGMENTS = 256  # of a file; programs have about a dozen
_MAX_TAGS = 4096  # of a segment
_MAX_TEXT = 64 * 1024  # characters of a name or a list of folders
_C_LIBRARY = "libc.so.6"
# The parts of glibc must all be of one version; programs load some of them only at run time.
_GLIBC = re.compile(
    r"(ld-linux[-.\w]*|lib(c|m|mvec|dl|rt|pthread|util|resolv|anl|thread_db|BrokenLocale|nss_(compat|db|dns|files|hesiod)))\.so\.\d+"
)
_VERSIONS = re.compile(rb"\0GLIBC_2\.(\d{1,4})(?=\0)")


@dataclass(frozen=True)
class Dynamic:
    """What an ELF file says about the libraries that it loads."""

    machine: str
    needed: tuple[str, ...] = ()
    rpath: tuple[str, ...] = ()
    runpath: tuple[str, ...] = ()
    interpreter: str = ""


def read_dynamic(path: Path) -> Dynamic | None:
    """Return the dynamic section of an ELF file; ``None`` for other files and damaged ones."""
    # Imported here: every run looks whether an environment has changed, and few of them read a library.
    from elftools.common.exceptions import ELFError  # noqa: PLC0415
    from elftools.elf.dynamic import DynamicSegment  # noqa: PLC0415
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415
    from elftools.elf.segments import InterpSegment  # noqa: PLC0415

    try:
        with open_named(path) as file:
            if file.read(4) != _MAGIC:
                return None
            elf = ELFFile(file)
            found: dict[str, list[str]] = {"DT_NEEDED": [], "DT_RPATH": [], "DT_RUNPATH": []}
            interpreter = ""
            for segment in islice(elf.iter_segments(), _MAX_SEGMENTS):
                if isinstance(segment, InterpSegment):
                    interpreter = segment.get_interp_name()
                elif isinstance(segment, DynamicSegment):
                    for tag in islice(segment.iter_tags(), _MAX_TAGS):
                        if tag.entry.d_tag in found:
                            found[tag.entry.d_tag].append(getattr(tag, tag.entry.d_tag[3:].lower()))
                            if len(found[tag.entry.d_tag][-1]) > _MAX_TEXT:
                                return None
            origin = str(path.resolve().parent)
            paths = {
                key: tuple(re.sub(r"\$(ORIGIN\b|\{ORIGIN\})", lambda _m: origin, part)
                           for text in found[key] for part in text.split(":") if part)
                for key in ("DT_RPATH", "DT_RUNPATH")
            }  # fmt: skip
            runpath = paths["DT_RUNPATH"]
            rpath = () if runpath else paths["DT_RPATH"]
            return Dynamic(elf["e_machine"], tuple(found["DT_NEEDED"]), rpath, runpath, interpreter)
    except (OSError, ELFError, ValueError, OverflowError, AssertionError):  # all of them from damaged files
        return None


def glibc_version(content: bytes) -> int:
    """Return the minor version of the glibc 2 in ``libc.so.6``'s content; 0 if it is another library."""
    return max((int(minor) for minor in _VERSIONS.findall(content)), default=0)


class LibrarySearch:
    """The libraries of this computer as its dynamic loader finds them.

    Args:
        configuration: The loader's list of folders.
        confined: A folder with files of a stranger: libraries for them are found in this folder, in ``base``
            and in the loader's folders only, whatever their headers say. ``None``: there is none.
        base: Folders with libraries of the installation that they belong to.
    """

    def __init__(
        self,
        configuration: Path = Path("/etc/ld.so.conf"),
        confined: Path | None = None,
        base: Sequence[Path] = (),
    ) -> None:
        self._configuration = configuration
        self._confined = None if confined is None else os.path.realpath(confined) + os.sep
        self._base = tuple(map(str, base))
        self._dynamic: dict[Path, Dynamic | None] = {}

    def closure(self, files: Iterable[Path]) -> dict[str, Path]:
        """Return the libraries outside ``files`` that these load, directly or not: paths by file name.

        Libraries that are missing here are left out: the files do without them on this computer, too.
        """
        given = sorted(files, key=self._is_confined)  # trusted files first: a library is found once
        inside = {os.path.realpath(path) for path in given}
        found: dict[str, Path] = {}
        todo: deque[tuple[Path, tuple[str, ...], bool]] = deque((p, (), self._is_confined(p)) for p in given)
        while todo:
            path, inherited, confined = todo.popleft()
            dynamic = self._read(path)
            if dynamic is None:
                continue
            rpath = (*dynamic.rpath, *inherited)
            wanted = [*dynamic.needed, *([dynamic.interpreter] if dynamic.interpreter else [])]
            for name in wanted:
                library = self._find(name, dynamic, rpath, confined)
                if library is None or library.name in found or os.path.realpath(library) in inside:
                    continue
                found[library.name] = library
                todo.append((library, rpath, confined))
        if _C_LIBRARY in found:
            folder = found[_C_LIBRARY].parent
            for name in sorted(os.listdir(folder)):
                if _GLIBC.fullmatch(name):
                    found.setdefault(name, folder / name)
        return found

    def _find(self, name: str, dynamic: Dynamic, rpath: tuple[str, ...], confined: bool) -> Path | None:
        if "/" in name:
            path = Path(name)
            return path if path.is_absolute() and self._fits(path, dynamic, confined) else None
        for folder in [*rpath, *self._preset, *dynamic.runpath, *self.folders]:
            path = Path(folder, name)
            if self._fits(path, dynamic, confined):
                return path
        return None

    def _fits(self, path: Path, wanted: Dynamic, confined: bool) -> bool:
        if confined and not self._is_allowed(path):
            return False
        found = self._read(path)
        return found is not None and found.machine == wanted.machine

    def _read(self, path: Path) -> Dynamic | None:
        if path not in self._dynamic:
            self._dynamic[path] = read_dynamic(path)
        return self._dynamic[path]

    def _is_confined(self, path: Path) -> bool:
        return self._confined is not None and os.path.realpath(path).startswith(self._confined)

    def _is_allowed(self, path: Path) -> bool:
        return path.is_absolute() and (
            os.path.realpath(path.parent) in self._allowed or self._is_confined(path)
        )

    @cached_property
    def _allowed(self) -> frozenset[str]:
        return frozenset(os.path.realpath(path) for path in (*self._base, *self._preset, *self.folders))

    @property
    def _preset(self) -> list[str]:
        return [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """The folders in which the loader looks without being told."""
        multiarch = f"{os.uname().machine}-linux-gnu"
        default = [f"/lib/{multiarch}", f"/usr/lib/{multiarch}", "/lib64", "/usr/lib64", "/lib", "/usr/lib"]
        return tuple(dict.fromkeys([*_configured(self._configuration, set()), *default]))


def _configured(file: Path, seen: set[Path]) -> Iterator[str]:
    """Yield the folders in a configuration of the loader, with those that it includes (ldconfig(8))."""
    if file in seen:
        return
    seen.add(file)
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        text = line.partition("#")[0].strip()
        if text.startswith("include") and text[7:8].isspace():
            pattern = text[8:].strip()
            base = Path("/") if pattern.startswith("/") else file.parent
            for included in sorted(base.glob(pattern.lstrip("/"))):
                yield from _configured(included, seen)
        elif text.startswith("/"):
            yield text
