"""The agent's file operations: on single paths, and on trees packed and unpacked as tar."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tarfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_ENTRIES = 10_000
_PIECE = 256 * 1024  # bytes
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MNT_DETACH = 1, 32, 4096, 2  # include/uapi/linux/mount.h


class StreamReader:
    """A file object over ``read(size) -> bytes``, for tarfile and copying."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self._buffer = bytearray()
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        """Return exactly ``size`` bytes, fewer only at the end."""
        while not self._ended and (size < 0 or len(self._buffer) < size):
            data = self._read()
            self._ended = not data
            self._buffer += data
        if size < 0:
            size = len(self._buffer)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


class StreamWriter:
    """A file object over ``write(data)``, for tarfile and copying."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write

    def write(self, data: bytes) -> int:
        """Send all of ``data``."""
        self._write(bytes(data))
        return len(data)


def unpack(reader: StreamReader, target: str) -> None:
    """Unpack a tar stream from the host into the folder ``target``, which is created if needed.

    The host is trusted; the archive's owners and times are kept.
    """
    make_folders(target)
    with tarfile.open(fileobj=reader, mode="r|", bufsize=_PIECE, copybufsize=_PIECE) as archive:  # type: ignore[call-overload]
        for member in archive:
            if hasattr(tarfile, "fully_trusted_filter"):
                archive.extract(member, target, filter="fully_trusted")
            else:
                archive.extract(member, target)
            archive.members.clear()  # tarfile would keep all members in memory
    while reader.read(65536):  # tar's padding, up to the stream's end
        pass


def pack(path: str, writer: StreamWriter) -> None:
    """Write ``path`` as a tar stream: a folder's contents, or a single file under its own name."""
    with tarfile.open(fileobj=writer, mode="w|", bufsize=_PIECE, copybufsize=_PIECE) as archive:  # type: ignore[call-overload]

        def forget(member: tarfile.TarInfo) -> tarfile.TarInfo:
            archive.members.clear()  # tarfile would keep all members in memory
            return member

        if os.path.isdir(path):
            for name in sorted(os.listdir(path)):
                archive.add(os.path.join(path, name), arcname=name, filter=forget)
        else:
            archive.add(os.path.realpath(path), arcname=os.path.basename(path))


def make_folders(path: str, mode: int = 0o777) -> None:
    """Make a folder and those above it, if missing; each belongs to the owner of the folder that it is in.

    In the home folder of a user, folders that belong to root would be in the user's way.
    """
    if os.path.isdir(path):
        return
    above = os.path.dirname(path.rstrip("/")) or "/"
    make_folders(above)
    os.mkdir(path, mode)
    owner = os.stat(above)
    if owner.st_uid and not os.geteuid():
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:  # by its descriptor: the owner may have put a link there by now
            os.fchown(folder, owner.st_uid, owner.st_gid)
        finally:
            os.close(folder)


def path_operation(request: dict[str, Any]) -> dict[str, Any]:
    """Perform the operation on a path that ``do`` names (a key of :data:`OPERATIONS`)."""
    return OPERATIONS[request["do"]](request["path"], request)


def _stat(path: str, request: dict[str, Any]) -> dict[str, Any]:
    found = os.stat(path, follow_symlinks=request.get("follow", True))
    return {
        "mode": found.st_mode, "size": found.st_size, "uid": found.st_uid, "gid": found.st_gid,
        "mtime": found.st_mtime, "kind": _kind(found.st_mode),
    }  # fmt: skip


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISLNK(mode):
        return "symlink"
    return "file" if stat.S_ISREG(mode) else "other"


def _list(path: str, _request: dict[str, Any]) -> dict[str, Any]:
    names = sorted(os.listdir(path))
    if len(names) > MAX_ENTRIES:
        raise OSError(f"{path} has {len(names)} entries, more than {MAX_ENTRIES}")
    return {"names": names}


def _mkdir(path: str, request: dict[str, Any]) -> dict[str, Any]:
    mode = request.get("mode", 0o777)
    if request.get("parents") and not os.path.lexists(path):
        make_folders(path, mode)
    else:
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            if not request.get("exist_ok") or not os.path.isdir(path):
                raise
    return {}


def _unlink(path: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        os.unlink(path)
    except FileNotFoundError:
        if not request.get("missing_ok"):
            raise
    return {}


def _rmtree(path: str, _request: dict[str, Any]) -> dict[str, Any]:
    shutil.rmtree(path)
    return {}


def _chmod(path: str, request: dict[str, Any]) -> dict[str, Any]:
    os.chmod(path, request["mode"])
    return {}


def _symlink(path: str, request: dict[str, Any]) -> dict[str, Any]:
    os.symlink(request["target"], path)
    return {}


def _readlink(path: str, _request: dict[str, Any]) -> dict[str, Any]:
    return {"target": os.readlink(path)}


def _rename(path: str, request: dict[str, Any]) -> dict[str, Any]:
    os.replace(path, request["target"])
    return {}


def _own(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Give a path, and everything below it, from root to a user, the deepest entries first.

    So nothing is changed in a folder that the user can already write to, where an entry could have become
    another name of root's own files.
    """
    uid, gid = request["uid"], request["gid"]
    if os.path.islink(path) or not os.path.isdir(path):
        _own_file(path, uid, gid)
        return {}
    for folder, folders, files, descriptor in os.fwalk(path, topdown=False):
        if os.fstat(descriptor).st_uid == os.geteuid():
            for name in (*folders, *files):
                os.chown(name, uid, gid, dir_fd=descriptor, follow_symlinks=False)
        if folder == path:
            os.fchown(descriptor, uid, gid)
    return {}


def _own_file(path: str, uid: int, gid: int) -> None:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if os.fstat(file).st_nlink > 1:
            raise PermissionError(errno.EPERM, "the file has other names", path)
        os.fchown(file, uid, gid)
    finally:
        os.close(file)


def _freeze(path: str, _request: dict[str, Any]) -> dict[str, Any]:
    """Mount a path read-only over itself: a guard against mistakes, since root can undo it."""
    _mount(path, path, _MS_BIND)
    _mount(None, path, _MS_BIND | _MS_REMOUNT | _MS_RDONLY)
    return {}


def _thaw(path: str, _request: dict[str, Any]) -> dict[str, Any]:
    import ctypes  # noqa: PLC0415

    if ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(path), _MNT_DETACH):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    return {}


def _sync(_path: str, _request: dict[str, Any]) -> dict[str, Any]:
    os.sync()
    return {}


def _mount(source: str | None, target: str, flags: int) -> None:
    import ctypes  # noqa: PLC0415 - loaded only when needed

    what = None if source is None else os.fsencode(source)
    if ctypes.CDLL(None, use_errno=True).mount(what, os.fsencode(target), None, ctypes.c_ulong(flags), None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def _rmdir(path: str, _request: dict[str, Any]) -> dict[str, Any]:
    os.rmdir(path)
    return {}


OPERATIONS: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    "chmod": _chmod, "freeze": _freeze, "list": _list, "mkdir": _mkdir, "own": _own, "readlink": _readlink,
    "rename": _rename, "rmdir": _rmdir, "rmtree": _rmtree, "stat": _stat, "symlink": _symlink,
    "sync": _sync, "thaw": _thaw, "unlink": _unlink,
}  # fmt: skip
