"""Pack a selection of files, with the shared libraries they load, as a read-only squashfs layer."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_microvm.errors import BuildError
from pytest_microvm.images.mirror.libraries import LibrarySearch, glibc_version
from pytest_microvm.images.mirror.selection import MirroredFiles, candidates, compiled_is_valid
from pytest_microvm.images.process import build_environment
from pytest_microvm.images.squashfs import squash_stream
from pytest_microvm.untrusted.nofollow import OpenTree

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_microvm.images.mirror.environment import PythonEnvironment
    from pytest_microvm.images.mirror.selection import MirroredFile

_C_LIBRARY = "libc.so.6"
_LOADER = "ld-linux"
# An overlay file system does not merge such a folder with the one below it (Linux: filesystems/overlayfs).
_OPAQUE = {"SCHILY.xattr.trusted.overlay.opaque": "y"}
_USR_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# A line of `unsquashfs -ll` about a top folder, or a link in its place.
_TOP_LINE = re.compile(rf"(\S)\S{{9}} \S+ +\d+ \S+ \S+ squashfs-root/({'|'.join(_USR_MERGED)})(?: -> .*)?")
_BUFFER = 1 << 16  # bytes; tarfile copies what is in its buffer with each header that it adds


def build_layer(
    folder: Path, environment: PythonEnvironment, selection: MirroredFiles, file_systems: Sequence[Path]
) -> tuple[Path, str]:
    """Pack an environment for machines of one image.

    Args:
        folder: The empty folder for the result and everything temporary.
        environment: The environment.
        selection: Its files.
        file_systems: The layers of the image's root file system, the lowest first: if its C library is newer
            than this computer's, its libraries are used where it has them.

    Returns:
        The layer, and a description of the shared libraries outside the environment that it contains, for
        :func:`libraries_unchanged`.

    Raises:
        BuildError: Packing failed, or a file changed meanwhile.
    """
    confined = environment.prefix if environment.confined else None
    base = [environment.base / "lib", environment.base / "lib64"]
    found = LibrarySearch(confined=confined, base=base).closure(candidates(selection.entries))
    libraries = _for_image(found, _libraries_of(file_systems))
    described = json.dumps({str(path): _stamp(path) for path in libraries.values()}, sort_keys=True)
    packed = MirroredFiles(dict(selection.entries))
    for path in libraries.values():
        real = packed.add(str(path))
        while real is not None and (target := packed.entries[real].target):
            real = packed.add(os.path.join(os.path.dirname(real), target))
    opaque = {os.path.realpath(path) for path in (*environment.standard_libraries, *environment.sites)}
    own = _own_folders(file_systems)
    for name in own:  # this computer's link in its place would hide it
        packed.entries.pop(f"/{name}", None)
    links = _links(libraries, own)
    layer = folder / "layer.squashfs"
    with _Files(environment.prefix) as files:
        squash_stream(lambda stream: _write_tar(stream, files, packed.entries, opaque, links), layer)
    return layer, described


def libraries_unchanged(described: str) -> bool:
    """Return True if the libraries that a layer contains are still the same files."""
    return all(_stamp(Path(path)) == stamp for path, stamp in json.loads(described).items())


def _stamp(path: Path) -> list[int]:
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _for_image(found: dict[str, Path], image: dict[str, int]) -> dict[str, Path]:
    """Return the libraries to bring along; ``image`` has the names of the image's own.

    glibc is compatible with programs made for older versions of it: the newer one of the two serves both.
    """
    own = image.get(_C_LIBRARY, 0)
    here = glibc_version(found[_C_LIBRARY].read_bytes()) if _C_LIBRARY in found else 0
    if here >= own:
        return found
    return {name: path for name, path in found.items() if name not in image}


def _libraries_of(file_systems: Sequence[Path]) -> dict[str, int]:
    """Return the names of an image's shared libraries; the value of ``libc.so.6`` is its minor version."""
    folders = [f"usr/lib/{_multiarch()}", f"lib/{_multiarch()}", "usr/lib64", "lib64"]
    found: dict[str, int] = {}
    for layer in map(str, file_systems):
        listed = _unsquashfs("-l", layer, *folders).decode(errors="replace").splitlines()
        paths = [line.partition("/")[2] for line in listed if re.search(r"\.so(\.[^/]*)?$", line)]
        found |= {path.rpartition("/")[2]: 0 for path in paths if path.rpartition("/")[0] in folders}
        for path in paths:
            if path in [f"{folder}/{_C_LIBRARY}" for folder in folders]:
                found[_C_LIBRARY] = glibc_version(_unsquashfs("-cat", layer, path))
    return found


def _own_folders(file_systems: Sequence[Path]) -> set[str]:
    """Return the top folders that an image has itself, and does not have in /usr with a link to there."""
    found: dict[str, str] = {}
    for layer in map(str, file_systems):
        for line in _unsquashfs("-ll", layer, *_USR_MERGED).decode(errors="replace").splitlines():
            if match := _TOP_LINE.fullmatch(line):
                found[match[2]] = match[1]
    return {name for name, kind in found.items() if kind == "d"}


def _links(libraries: dict[str, Path], own: set[str]) -> dict[str, str]:
    """Return links by their paths: to the layer's libraries, where the image's programs look for theirs.

    Args:
        libraries: The libraries that the layer contains, by name.
        own: The image's own top folders. The kernel looks for the loader of programs in one of them.
    """
    place = f"usr/lib/{_multiarch()}"
    found = {f"{place}/{name}": str(path) for name, path in libraries.items() if not _is_default(path.parent)}
    if "lib" in own:
        found |= {f"lib/{_multiarch()}/{name}": f"/{place}/{name}" for name in libraries}
    if "lib64" in own:
        found |= {f"lib64/{name}": f"/{place}/{name}" for name in libraries if name.startswith(_LOADER)}
    return found


def _unsquashfs(*words: str) -> bytes:
    result = subprocess.run(["unsquashfs", *words], capture_output=True, check=False, env=build_environment())
    if result.returncode not in (0, 2):  # 2: a name is missing in it
        raise BuildError(
            f"unsquashfs failed (exit code {result.returncode})",
            details=result.stderr.decode(errors="replace"),
            resolution="build the image again: pytest-microvm image build KIT --force",
        )
    return result.stdout


def _multiarch() -> str:
    return f"{os.uname().machine}-linux-gnu"


def _is_default(folder: Path) -> bool:
    return os.path.realpath(folder) in (f"/usr/lib/{_multiarch()}", f"/lib/{_multiarch()}")


class _Files:
    """Opens files for an archive; those of the environment without following links, as it may change.

    Args:
        prefix: The environment's folder.
    """

    def __init__(self, prefix: Path) -> None:
        self._top = os.path.realpath(prefix) + os.sep
        self._tree = OpenTree(Path(self._top))

    def __enter__(self) -> _Files:  # noqa: PYI034 - Self is new in Python 3.11
        return self

    def __exit__(self, *_error: object) -> None:
        self._tree.close()

    def open(self, path: str) -> IO[bytes]:
        """Open a regular file by its path without links.

        Raises:
            OSError: It is none, or cannot be read.
        """
        if not path.startswith(self._top):
            return open(path, "rb")
        file = self._tree.open(path[len(self._top) :])
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "no regular file any more", path)
        return file


def _write_tar(
    stream: IO[bytes],
    files: _Files,
    entries: dict[str, MirroredFile],
    opaque: set[str],
    links: dict[str, str],
) -> None:
    """Write the archive: owner root, no set-user-id bits, time stamps as they are.

    Args:
        stream: Takes the archive.
        files: Opens the files.
        entries: The files by absolute path.
        opaque: Folders that hide the image's folders of the same path.
        links: The targets of more links, by their paths.
    """
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_BUFFER) as archive:
        for path in sorted({*entries, *_parents(entries)}):
            entry = entries.get(path)
            if entry is not None and path.endswith(".pyc") and not compiled_is_valid(path, entries):
                continue
            _add(archive, files, path, above=entry is None, opaque=path in opaque)
        for path, target in sorted(links.items()):
            info = tarfile.TarInfo(path)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)


def _add(archive: tarfile.TarFile, files: _Files, path: str, *, above: bool, opaque: bool) -> None:
    """Add one file; of a folder ``above`` the environment, the time stamp does not count."""
    try:
        found = os.lstat(path)
        info = tarfile.TarInfo(_in_image(path))
        info.mode = stat.S_IMODE(found.st_mode) & 0o1777
        info.mtime = 0 if above else found.st_mtime_ns // 10**9
        if stat.S_ISDIR(found.st_mode):
            info.type = tarfile.DIRTYPE
            info.pax_headers = dict(_OPAQUE) if opaque else {}
            archive.addfile(info)
        elif stat.S_ISLNK(found.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
            archive.addfile(info)
        elif stat.S_ISREG(found.st_mode):
            with files.open(path) as content:
                info.size = os.fstat(content.fileno()).st_size
                archive.addfile(info, content)
    except PermissionError:
        return  # this user's Python cannot read it either
    except OSError as error:
        raise BuildError(
            f"{path} changed while it was copied", details=str(error), resolution="run again"
        ) from error


def _in_image(path: str) -> str:
    """Return the archive's name for a path; an image has /usr/lib for the /lib of an older system."""
    first, _slash, rest = path.lstrip("/").partition("/")
    if first in _USR_MERGED and rest and not os.path.islink("/" + first):
        return f"usr/{first}/{rest}"
    return path.lstrip("/")


def _parents(paths: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for path in paths:
        folder = os.path.dirname(path)
        while folder not in ("/", "") and folder not in seen:
            seen.add(folder)
            yield folder
            folder = os.path.dirname(folder)
