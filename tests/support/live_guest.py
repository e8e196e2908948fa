"""A kernel that uses a live mount, without a machine: requests written by hand, and their answers."""

import os
import struct

from pytest_microvm.mounts.live.folder import Folder, Growth
from pytest_microvm.mounts.live.messages import ROOT, Op
from pytest_microvm.mounts.live.server import Server

ENTRY = struct.Struct("<4Q2I")
"""What an answer about a name begins with: the node, and for how long it is known."""

SETATTR = struct.Struct("<2I6Q8I")
"""The body of SETATTR."""

NOREPLACE, EXCHANGE = 1, 2
"""Flags of renameat2(2)."""

_MODE, _SIZE, _MTIME, _FH = 1 << 0, 1 << 3, 1 << 5, 1 << 6  # what SETATTR sets; with a handle
_SECOND = 10**9


def numbers(*values):
    """Return numbers of 64 bits as a request has them."""
    return struct.pack(f"<{len(values)}Q", *values)


class Guest:
    """A kernel that asks by hand.

    Each request returns what came, or the number of an error.

    Args:
        folder: What is mounted.
        writable: Whether it may be changed.
        limit: Bytes by which it may grow.
    """

    def __init__(self, folder, *, writable=True, limit=2**40):
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.server = Server(Folder(root, Growth(limit), writable=writable))

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.server.close()

    def ask(self, op, node=ROOT, body=b""):
        """Return the body of the answer, or the error's number."""
        length = 40 + len(body)
        answer = self.server.answer(struct.pack("<IIQQIIIHH", length, op, 77, node, 0, 0, 0, 0, 0) + body)
        if answer is None:
            return None
        size, failure, unique = struct.unpack_from("<IiQ", answer)
        assert (size, unique) == (len(answer), 77)
        assert failure <= 0
        assert not failure or size == 16
        return -failure if failure else answer[16:]

    def lookup(self, name, node=ROOT):
        """Return the node that is called so, or the error's number."""
        answer = self.ask(Op.LOOKUP, node, name + b"\0")
        return answer if isinstance(answer, int) else (ENTRY.unpack_from(answer)[0],)

    def open(self, node, flags=os.O_RDONLY):
        """Return the handle of a file, or the error's number."""
        answer = self.ask(Op.OPEN, node, struct.pack("<2I", flags, 0))
        return answer if isinstance(answer, int) else struct.unpack_from("<Q", answer)

    # By paths, as a program asks its kernel; a path that is not there is node 0, which no kernel was told of.

    def node(self, path):
        """Return the node at a path."""
        here = ROOT
        for name in filter(None, path.split("/")):
            found = self.lookup(os.fsencode(name), here)
            if isinstance(found, int):
                return 0
            (here,) = found
        return here

    def mkdir(self, path):
        """Make a directory."""
        return self._named(Op.MKDIR, path, struct.pack("<2I", 0o755, 0))

    def create(self, path, flags=os.O_RDWR):
        """Open a file, which is made if it is not there; return the handle."""
        answer = self._named(Op.CREATE, path, struct.pack("<4I", flags, 0o644, 0, 0))
        return answer if isinstance(answer, int) else struct.unpack_from("<Q", answer, 128)

    def symlink(self, target, path):
        """Make a symbolic link."""
        return self._named(Op.SYMLINK, path, b"", os.fsencode(target) + b"\0")

    def link(self, old, path):
        """Give what is at ``old`` one more name."""
        return self._named(Op.LINK, path, numbers(self.node(old)))

    def unlink(self, path):
        """Remove a file or a link."""
        return self._named(Op.UNLINK, path)

    def rmdir(self, path):
        """Remove a directory."""
        return self._named(Op.RMDIR, path)

    def rename(self, old, new, flags=0):
        """Move what is at ``old``."""
        above, _slash, name = new.rpartition("/")
        fields = numbers(self.node(above)) + (struct.pack("<2I", flags, 0) if flags else b"")
        return self._named(Op.RENAME2 if flags else Op.RENAME, old, fields, os.fsencode(name) + b"\0")

    def write(self, handle, data, offset=0):
        """Write to an open file."""
        fields = numbers(handle, offset) + struct.pack("<2IQ2I", len(data), 0, 0, 0, 0)
        return self.ask(Op.WRITE, 4711, fields + data)

    def read(self, handle, offset=0):
        """Read from an open file."""
        return self.ask(Op.READ, 4711, numbers(handle, offset) + struct.pack("<2IQ2I", 2**16, 0, 0, 0, 0))

    def truncate(self, path, size, handle=None):
        """Cut a file off; by an open handle if one is given."""
        valid = _SIZE | (0 if handle is None else _FH)
        return self._set(path, valid, handle=handle or 0, size=size)

    def chmod(self, path, mode):
        """Change permission bits."""
        return self._set(path, _MODE, mode=mode)

    def utime(self, path, seconds):
        """Change the time of a file's content."""
        return self._set(path, _MTIME, modified=seconds)

    def _set(self, path, valid, *, handle=0, size=0, modified=0, mode=0):
        fields = SETATTR.pack(valid, 0, handle, size, 0, 0, modified, 0, 0, 0, 0, mode, *[0] * 4)
        return self.ask(Op.SETATTR, self.node(path), fields)

    def _named(self, op, path, before=b"", after=b""):
        above, _slash, name = path.rpartition("/")
        return self.ask(op, self.node(above), before + os.fsencode(name) + b"\0" + after)
