"""Handle FUSE requests of a guest's kernel for a live mount: at most one response per request."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from pytest_microvm.mounts.live import contents, listing, messages, names
from pytest_microvm.mounts.live.folder import Folder
from pytest_microvm.mounts.live.messages import FuseRequest, Op, Owner, error
from pytest_microvm.mounts.live.session import Session

_FORGET = struct.Struct("<Q")  # number of references to drop
_BATCH = struct.Struct("<2I")  # number of entries that follow
_BATCH_ONE = struct.Struct("<2Q")  # node, number of references to drop
_SILENT = frozenset([Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT])


class Server:
    """The FUSE server of one live mount.

    Args:
        folder: The mounted directory, which this object now owns.
        owner: To whom everything in it belongs in the machine.
    """

    def __init__(self, folder: Folder, owner: Owner = Owner()) -> None:  # noqa: B008 - immutable
        self._session = Session(folder, owner)

    def answer(self, data: bytes) -> bytes | None:
        """Return the response to one request; ``None`` if the operation has no response.

        Raises:
            BadRequest: The request is not valid FUSE; stop serving the mount.
        """
        request = messages.parse(data)
        try:
            said = messages.answer(request.unique, self._do(request))
        except OSError as failure:
            said = messages.refusal(request.unique, failure.errno or errno.EIO)
        return None if request.op in _SILENT else said

    def close(self) -> None:
        """Close all handles and the directory."""
        self._session.handles.close()
        self._session.folder.close()

    def _do(self, request: FuseRequest) -> bytes:
        operation = _OPERATIONS.get(request.op)
        if operation is None:
            raise error(errno.ENOSYS)
        try:
            return operation(self._session, request)
        except (ValueError, OverflowError):  # a number or a name that the system does not accept
            raise error(errno.EINVAL) from None


def _welcome(_session: Session, request: FuseRequest) -> bytes:
    return messages.welcome(request)


def _nothing(_session: Session, _request: FuseRequest) -> bytes:
    return b""


def _forget(session: Session, request: FuseRequest) -> bytes:
    session.nodes.forget(request.node, *request.fields(_FORGET))
    return b""


def _forget_many(session: Session, request: FuseRequest) -> bytes:
    request.fields(_BATCH)
    rest = request.body[_BATCH.size :]
    for number, times in _BATCH_ONE.iter_unpack(rest[: len(rest) // _BATCH_ONE.size * _BATCH_ONE.size]):
        session.nodes.forget(number, times)
    return b""


_OPERATIONS: dict[int, Callable[[Session, FuseRequest], bytes]] = {
    Op.BATCH_FORGET: _forget_many,
    Op.CREATE: contents.create,
    Op.DESTROY: _nothing,
    Op.FLUSH: contents.flush,
    Op.FORGET: _forget,
    Op.FSYNC: contents.fsync,
    Op.FSYNCDIR: _nothing,
    Op.GETATTR: contents.getattr_,
    Op.INIT: _welcome,
    Op.INTERRUPT: _nothing,
    Op.LINK: names.link,
    Op.LOOKUP: names.lookup,
    Op.MKDIR: names.mkdir,
    Op.MKNOD: names.mknod,
    Op.OPEN: contents.open_file,
    Op.OPENDIR: listing.opendir,
    Op.READ: contents.read,
    Op.READDIR: listing.readdir,
    Op.READDIRPLUS: listing.readdirplus,
    Op.READLINK: names.readlink,
    Op.RELEASE: contents.release,
    Op.RELEASEDIR: contents.release,
    Op.RENAME: names.rename,
    Op.RENAME2: names.rename2,
    Op.RMDIR: names.rmdir,
    Op.SETATTR: contents.setattr_,
    Op.STATFS: contents.statfs,
    Op.SYMLINK: names.symlink,
    Op.UNLINK: names.unlink,
    Op.WRITE: contents.write,
}
