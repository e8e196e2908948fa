"""Directory operations of a live mount; a directory's names are read once, when it is opened."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable

from pytest_microvm.mounts.live import messages
from pytest_microvm.mounts.live.contents import READ
from pytest_microvm.mounts.live.messages import MAX_WRITE, NO_ENTRY, FuseRequest, error
from pytest_microvm.mounts.live.nodes import Node
from pytest_microvm.mounts.live.session import Handle, Session
from pytest_microvm.untrusted.manifest import MAX_PATHS

_DOTS = (".", "..")


def opendir(session: Session, request: FuseRequest) -> bytes:
    """Open a directory."""
    session.handles.check_room()
    names = session.folder.names(session.where(request.node), MAX_PATHS - session.handles.names)
    node = session.nodes.get(request.node)
    return messages.opened(session.handles.add(Handle(node, names=(*_DOTS, *names))))


def readdir(session: Session, request: FuseRequest) -> bytes:
    """Return names of a directory with their file types."""
    return _list(session, request, 0, _plain)


def readdirplus(session: Session, request: FuseRequest) -> bytes:
    """Return names of a directory with their attributes, which saves the kernel a lookup for each."""
    return _list(session, request, len(NO_ENTRY), _full)


def _list(
    session: Session, request: FuseRequest, more: int, record: Callable[[Session, Node, str, int], bytes]
) -> bytes:
    """Return as many records as fit into the reply, starting at the requested offset."""
    number, offset, size, *_rest = request.fields(READ)
    handle = session.handles.get(number)
    if handle.file is not None:
        raise error(errno.ENOTDIR)
    room = min(size, MAX_WRITE)
    records: list[bytes] = []
    for place, name in enumerate(handle.names[offset:], offset + 1):
        if messages.directory_entry_size(name) + more > room:
            break
        with contextlib.suppress(FileNotFoundError):  # removed since the directory was opened
            records.append(record(session, handle.node, name, place))
            room -= len(records[-1])
    return b"".join(records)


def _plain(session: Session, parent: Node, name: str, place: int) -> bytes:
    status = session.folder.status([*parent.segments(), *([] if name in _DOTS else [name])])
    return messages.directory_entry(name, status, place)


def _full(session: Session, parent: Node, name: str, place: int) -> bytes:
    plain = _plain(session, parent, name, place)
    return (NO_ENTRY if name in _DOTS else session.entry(parent, name)) + plain
