"""Parse FUSE requests of a guest's kernel and build the responses, without I/O.

Source: include/uapi/linux/fuse.h, protocol 7.31 (Linux 5.4 and later). Requests are untrusted: every field
is bounded or validated before use.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from enum import IntEnum
from typing import NamedTuple

MAX_WRITE = 128 * 1024
"""Maximum bytes of a file that one request reads or writes."""

MAX_REQUEST = MAX_WRITE + 4096
"""Maximum bytes of a request; the names in it are shorter than a page."""

ROOT = 1
"""The node number of the mounted directory itself."""

MAJOR, MINOR = 7, 31
_OLDEST_MINOR = 28  # the first with these response formats and with MAX_PAGES

_IN_HEADER = struct.Struct("<IIQQIIIHH")
_OUT_HEADER = struct.Struct("<IiQ")
HEADER_SIZE = _IN_HEADER.size
LENGTH = struct.Struct("<I")
"""The first field of a request: its length."""

_ATTRIBUTES = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4Q2I")
_ATTR_OUT = struct.Struct("<Q2I")
_OPEN_OUT = struct.Struct("<Q2I")
_STATFS = struct.Struct("<5Q4I24x")
_INIT_IN = struct.Struct("<4I")
_INIT_OUT = struct.Struct("<4I2H2I2HI28x")
_DIRENT = struct.Struct("<QQII")

_ASYNC_READ, _BIG_WRITES, _AUTO_INVAL_DATA = 1 << 0, 1 << 5, 1 << 12
_DO_READDIRPLUS, _READDIRPLUS_AUTO, _PARALLEL_DIROPS, _MAX_PAGES = 1 << 13, 1 << 14, 1 << 18, 1 << 22
_WANTED = (
    _ASYNC_READ | _BIG_WRITES | _AUTO_INVAL_DATA | _DO_READDIRPLUS | _READDIRPLUS_AUTO | _PARALLEL_DIROPS
    | _MAX_PAGES
)  # fmt: skip
_BACKGROUND = 12  # maximum background requests of the kernel: its default
_PAGE = 4096

SECONDS_KNOWN = 1
"""Seconds for which a guest's kernel may cache names and attributes: the delay of changes by the host."""


class Owner(NamedTuple):
    """The numbers of the user and the group to whom all files of a mount belong in the machine."""

    uid: int = 0
    gid: int = 0


class Op(IntEnum):
    """Supported operations; all others are answered with "function not implemented"."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44
    RENAME2 = 45


def error(number: int) -> OSError:
    """Return the OSError for a number from :mod:`errno`."""
    return OSError(number, os.strerror(number))


class BadRequest(Exception):
    """A request is not valid FUSE; the mount must end."""


class FuseRequest(NamedTuple):
    """One request.

    Args:
        op: The number of the operation.
        unique: The request's ID, repeated in its response.
        node: The number of the node to operate on.
        body: The bytes after the header.
    """

    op: int
    unique: int
    node: int
    body: bytes

    def fields(self, form: struct.Struct) -> tuple[int, ...]:
        """Unpack the fixed fields at the beginning of the body.

        Raises:
            BadRequest: The body is too short.
        """
        if len(self.body) < form.size:
            raise BadRequest(f"request {self.op} is too short")
        return form.unpack_from(self.body)

    def names(self, count: int, after: struct.Struct | None = None) -> list[bytes]:
        """Return the ``count`` zero-terminated strings at the end of the body, after the fields ``after``.

        Raises:
            BadRequest: The body has fewer or more strings.
        """
        parts = self.body[0 if after is None else after.size :].split(b"\0")
        if len(parts) != count + 1 or parts[-1]:
            raise BadRequest(f"request {self.op} has not {count} names")
        return parts[:count]


def parse(data: bytes) -> FuseRequest:
    """Parse a request.

    Raises:
        BadRequest: ``data`` is not one complete request.
    """
    if len(data) < HEADER_SIZE:
        raise BadRequest("a request without a header")
    length, op, unique, node, *_who = _IN_HEADER.unpack_from(data)
    if length != len(data):
        raise BadRequest("a request of another length than it says")
    return FuseRequest(op, unique, node, data[HEADER_SIZE:])


def answer(unique: int, body: bytes = b"") -> bytes:
    """Return a successful response."""
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), 0, unique) + body


def refusal(unique: int, number: int) -> bytes:
    """Return an error response with an :mod:`errno` number."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, -number, unique)


def welcome(request: FuseRequest) -> bytes:
    """Return the response body of INIT.

    Raises:
        OSError: The kernel's protocol version is not supported.
    """
    major, minor, readahead, offered = request.fields(_INIT_IN)
    if major != MAJOR or minor < _OLDEST_MINOR:
        raise OSError(errno.EPROTO, f"the guest's kernel speaks FUSE {major}.{minor}")
    return _INIT_OUT.pack(
        MAJOR, MINOR, min(readahead, MAX_WRITE), _WANTED & offered,
        _BACKGROUND, _BACKGROUND * 3 // 4, MAX_WRITE, 1, MAX_WRITE // _PAGE, 0, 0,
    )  # fmt: skip


def attributes(status: os.stat_result, owner: Owner) -> bytes:
    """Return the packed attributes of a file, with its owner in the machine."""
    times = [divmod(time, 10**9) for time in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)]
    mode = stat.S_IFMT(status.st_mode) | status.st_mode & 0o777
    return _ATTRIBUTES.pack(
        status.st_ino, status.st_size, status.st_blocks, *(seconds & 2**64 - 1 for seconds, _rest in times),
        *(rest for _seconds, rest in times), mode, status.st_nlink & 2**32 - 1,
        owner.uid, owner.gid, 0, _PAGE, 0,
    )  # fmt: skip


def entry(node: int, status: os.stat_result, owner: Owner) -> bytes:
    """Return a packed node entry with its attributes."""
    return _ENTRY.pack(node, 0, SECONDS_KNOWN, SECONDS_KNOWN, 0, 0) + attributes(status, owner)


def attributes_of_node(status: os.stat_result, owner: Owner) -> bytes:
    """Return the response body of GETATTR and SETATTR."""
    return _ATTR_OUT.pack(SECONDS_KNOWN, 0, 0) + attributes(status, owner)


def opened(handle: int) -> bytes:
    """Return the response body with a handle; the kernel drops its cached pages of the file."""
    return _OPEN_OUT.pack(handle, 0, 0)


def written(size: int) -> bytes:
    """Return the response body of WRITE: the number of bytes written."""
    return struct.pack("<II", size, 0)


def space(status: os.statvfs_result, free: int) -> bytes:
    """Return the response body of STATFS.

    Args:
        status: The file system's status.
        free: Bytes that the machine may still add.
    """
    blocks = min(status.f_bavail, free // status.f_frsize)
    return _STATFS.pack(
        status.f_blocks, blocks, blocks, status.f_files, status.f_favail,
        status.f_bsize, status.f_namemax, status.f_frsize, 0,
    )  # fmt: skip


def directory_entry(name: str, status: os.stat_result, place: int) -> bytes:
    """Return one packed entry of READDIR.

    Args:
        name: The entry's name.
        status: The entry's status.
        place: The offset of the next entry.
    """
    text = os.fsencode(name)
    record = _DIRENT.pack(status.st_ino, place, len(text), stat.S_IFMT(status.st_mode) >> 12) + text
    return record + bytes(-len(record) % 8)


def directory_entry_size(name: str) -> int:
    """Return the size of a :func:`directory_entry` in bytes."""
    size = _DIRENT.size + len(os.fsencode(name))
    return size + -size % 8


NO_ENTRY = bytes(_ENTRY.size + _ATTRIBUTES.size)
"""The node entry in READDIRPLUS that makes the kernel ignore the node."""
