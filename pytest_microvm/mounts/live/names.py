"""Name operations of a live mount: look up, create, rename, remove, read links."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable

from pytest_microvm.mounts.live.messages import FuseRequest, error
from pytest_microvm.mounts.live.nodes import Node
from pytest_microvm.mounts.live.opening import checked_name
from pytest_microvm.mounts.live.session import Session

_MKNOD = struct.Struct("<4I")  # mode, device, umask
_MKDIR = struct.Struct("<2I")  # mode, umask
_RENAME = struct.Struct("<Q")  # the new directory
_RENAME2 = struct.Struct("<Q2I")  # the new directory, flags
_LINK = struct.Struct("<Q")  # the node to link


def place(session: Session, request: FuseRequest, name: bytes) -> tuple[Node, str]:
    """Return the directory node of a request, and a validated name in it.

    Raises:
        OSError: The name is invalid, or the node is unknown.
    """
    return session.nodes.get(request.node), checked_name(name)


def _made(session: Session, request: FuseRequest, name: bytes, make: Callable[[list[str]], object]) -> bytes:
    parent, text = place(session, request, name)
    make([*parent.segments(), text])
    return session.entry(parent, text)


def lookup(session: Session, request: FuseRequest) -> bytes:
    """Look up a name in a directory; return its node and attributes."""
    return session.entry(*place(session, request, *request.names(1)))


def symlink(session: Session, request: FuseRequest) -> bytes:
    """Create a symbolic link."""
    name, target = request.names(2)
    return _made(session, request, name, lambda segments: session.folder.make_link(segments, target))


def mknod(session: Session, request: FuseRequest) -> bytes:
    """Create an empty file; reject devices, pipes and sockets."""
    mode, *_rest = request.fields(_MKNOD)
    if not stat.S_ISREG(mode):
        raise error(errno.EPERM)
    flags = os.O_RDONLY | os.O_EXCL
    (name,) = request.names(1, _MKNOD)
    return _made(
        session, request, name, lambda segments: os.close(session.folder.create(segments, flags, mode))
    )


def mkdir(session: Session, request: FuseRequest) -> bytes:
    """Create a directory."""
    mode, _umask = request.fields(_MKDIR)
    (name,) = request.names(1, _MKDIR)
    return _made(session, request, name, lambda segments: session.folder.make_folder(segments, mode))


def link(session: Session, request: FuseRequest) -> bytes:
    """Create a hard link to a file."""
    (number,) = request.fields(_LINK)
    session.own(session.nodes.get(number))
    old = session.where(number)
    (name,) = request.names(1, _LINK)
    return _made(session, request, name, lambda segments: session.folder.make_name(old, segments))


def unlink(session: Session, request: FuseRequest) -> bytes:
    """Remove a file or a link."""
    return _remove(session, request, folder=False)


def rmdir(session: Session, request: FuseRequest) -> bytes:
    """Remove an empty directory."""
    return _remove(session, request, folder=True)


def _remove(session: Session, request: FuseRequest, *, folder: bool) -> bytes:
    parent, name = place(session, request, *request.names(1))
    status = session.folder.remove([*parent.segments(), name], folder=folder)
    session.nodes.remove(parent, name)
    _lost(session, status)
    return b""


def rename(session: Session, request: FuseRequest) -> bytes:
    """Rename a file, directory or link."""
    (number,) = request.fields(_RENAME)
    return _move(session, request, number, *request.names(2, _RENAME))


def rename2(session: Session, request: FuseRequest) -> bytes:
    """Rename without flags; reject flags (exchange, no replace), which programs can do without."""
    number, flags, _padding = request.fields(_RENAME2)
    if flags:
        raise error(errno.EINVAL)
    return _move(session, request, number, *request.names(2, _RENAME2))


def _move(session: Session, request: FuseRequest, number: int, old: bytes, new: bytes) -> bytes:
    parent, name = place(session, request, old)
    new_parent, new_name = session.nodes.get(number), checked_name(new)
    replaced = session.folder.move([*parent.segments(), name], [*new_parent.segments(), new_name])
    session.nodes.move(parent, name, new_parent, new_name)
    _lost(session, replaced)
    return b""


def _lost(session: Session, status: os.stat_result | None) -> None:
    """Update accounting after a name was removed; a file without names is deleted when it is closed."""
    if status is not None and status.st_nlink == 1:
        session.removed(status)


def readlink(session: Session, request: FuseRequest) -> bytes:
    """Return the target of a symbolic link."""
    return session.folder.target(session.where(request.node))
