"""File operations of a live mount: open, read, write, and get and set attributes."""

from __future__ import annotations

import errno
import os
import struct
import time

from pytest_microvm.mounts.live import messages
from pytest_microvm.mounts.live.messages import MAX_WRITE, FuseRequest, error
from pytest_microvm.mounts.live.names import place
from pytest_microvm.mounts.live.nodes import Node
from pytest_microvm.mounts.live.session import Handle, Session

READ = struct.Struct("<2Q2IQ2I")
"""Arguments of READ, WRITE and READDIR: handle, offset, size, and fields that are ignored."""

_OPEN = struct.Struct("<2I")  # flags
_CREATE = struct.Struct("<4I")  # flags, mode, umask
_RELEASE = struct.Struct("<Q2IQ")  # handle
_FSYNC = struct.Struct("<Q2I")  # handle
_FLUSH = struct.Struct("<Q")  # handle
_GETATTR = struct.Struct("<2IQ")  # flags, handle
_SETATTR = struct.Struct("<2I6Q8I")

_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _FH = (1 << bit for bit in range(7))
_ATIME_NOW, _MTIME_NOW = 1 << 7, 1 << 8
_GETATTR_FH = 1
_LAST_OFFSET = 2**63 - 1
_LAST_SECOND = 2**33  # limit of a file's time, in the year 2242
_SECOND = 10**9


def open_file(session: Session, request: FuseRequest) -> bytes:
    """Open a file."""
    flags, _open_flags = request.fields(_OPEN)
    session.handles.check_room()
    file = session.folder.open(session.where(request.node), flags)
    handle = Handle(session.nodes.get(request.node), file, _for_writing(flags))
    return messages.opened(session.handles.add(handle))


def create(session: Session, request: FuseRequest) -> bytes:
    """Open a file, creating it if it does not exist."""
    flags, mode, *_rest = request.fields(_CREATE)
    session.handles.check_room()
    parent, name = place(session, request, *request.names(1, _CREATE))
    file = session.folder.create([*parent.segments(), name], flags, mode)
    status = os.fstat(file)
    try:
        node = session.nodes.tell(parent, name, status)
    except OSError:
        os.close(file)
        raise
    handle = Handle(node, file, _for_writing(flags))
    opened = messages.opened(session.handles.add(handle))
    return messages.entry(node.number, status, session.owner) + opened


def read(session: Session, request: FuseRequest) -> bytes:
    """Read from an open file."""
    number, offset, size, *_rest = request.fields(READ)
    return os.pread(session.handles.file(number), min(size, MAX_WRITE), offset)


def write(session: Session, request: FuseRequest) -> bytes:
    """Write to an open file."""
    number, offset, size, *_rest = request.fields(READ)
    data = request.body[READ.size :]
    if size != len(data) or offset > _LAST_OFFSET - size:
        raise error(errno.EINVAL)
    return messages.written(session.folder.write(session.file_to_change(number), data, offset))


def fsync(session: Session, request: FuseRequest) -> bytes:
    """Flush a file to disk."""
    number, *_rest = request.fields(_FSYNC)
    os.fsync(session.handles.file(number))
    return b""


def flush(session: Session, request: FuseRequest) -> bytes:
    """Acknowledge that a descriptor of a file was closed; there is nothing to flush."""
    session.handles.get(*request.fields(_FLUSH))
    return b""


def release(session: Session, request: FuseRequest) -> bytes:
    """Close a file or a directory."""
    number, *_rest = request.fields(_RELEASE)
    status = session.handles.release(number)
    if status is not None and status.st_nlink == 0:
        session.removed(status)
    return b""


def statfs(session: Session, _request: FuseRequest) -> bytes:
    """Return file system statistics: total and free space."""
    return messages.space(os.fstatvfs(session.folder.root), session.folder.room)


def getattr_(session: Session, request: FuseRequest) -> bytes:
    """Return the attributes of a file, directory or link."""
    flags, _dummy, number = request.fields(_GETATTR)
    file = session.handles.file(number) if flags & _GETATTR_FH else None
    return _attributes(session, session.nodes.get(request.node), file)


def setattr_(session: Session, request: FuseRequest) -> bytes:
    """Set permissions, size or times; the owner is the mount's and cannot be changed."""
    (
        valid, _padding, number, size, _owner, accessed, modified, _changed,
        accessed_ns, modified_ns, _changed_ns, mode, _unused, uid, gid, _unused_too,
    ) = request.fields(_SETATTR)  # fmt: skip
    node = session.nodes.get(request.node)
    handle = number if valid & _FH else None
    file = None if handle is None else session.handles.file(handle)
    if (valid & _UID and uid != session.owner.uid) or (valid & _GID and gid != session.owner.gid):
        raise error(errno.EPERM)
    if valid & _MODE:
        session.own(node)
        session.folder.set_mode(session.where(request.node), mode)
    if valid & _SIZE:
        _resize(session, node, handle, size)
    if valid & (_ATIME | _MTIME):
        session.own(node)
        times = (
            _time(accessed, accessed_ns, valid, given=_ATIME, now=_ATIME_NOW),
            _time(modified, modified_ns, valid, given=_MTIME, now=_MTIME_NOW),
        )
        session.folder.set_times(session.where(request.node), *times)
    return _attributes(session, node, file)


def _attributes(session: Session, node: Node, file: int | None) -> bytes:
    if file is None and node.gone:  # removed, but possibly still open
        file = session.handles.file_of(node)
    status = session.status(node) if file is None else os.fstat(file)
    return messages.attributes_of_node(status, session.owner)


def _resize(session: Session, node: Node, handle: int | None, size: int) -> None:
    if size > _LAST_OFFSET:
        raise error(errno.EFBIG)
    if handle is not None:
        session.folder.resize(session.file_to_change(handle, size), size)
        return
    opened = session.own_file(node, session.status(node), size)
    try:
        session.folder.resize(opened, size)
    finally:
        os.close(opened)


def _for_writing(flags: int) -> bool:
    return flags & os.O_ACCMODE != os.O_RDONLY


def _time(seconds: int, rest: int, valid: int, *, given: int, now: int) -> int | None:
    """Return the time to set, in nanoseconds since 1970; ``None`` if the request does not set it."""
    if not valid & given:
        return None
    if valid & now:
        return time.time_ns()
    if seconds >= _LAST_SECOND or rest >= _SECOND:
        raise error(errno.EINVAL)
    return seconds * _SECOND + rest
