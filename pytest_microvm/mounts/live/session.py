"""One live mount as its kernel knows it: the directory, nodes, and handles."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from dataclasses import dataclass, field

from pytest_microvm.mounts.live import messages
from pytest_microvm.mounts.live.folder import Folder
from pytest_microvm.mounts.live.messages import error
from pytest_microvm.mounts.live.nodes import Node, Nodes, identity

MAX_HANDLES = 256
"""Files and directories that a machine may have open at once in one mount: a file is a descriptor here."""


@dataclass
class Handle:
    """An open file, or the names of a directory as they were when it was opened.

    Args:
        node: What was opened.
        file: A descriptor of the file.
        writable: Whether the machine opened the file for writing.
        names: The names.
    """

    node: Node
    file: int | None = None
    writable: bool = False
    names: tuple[str, ...] = ()


class Handles:
    """All that is open."""

    def __init__(self) -> None:
        self.names = 0  # in all of them together
        self._handles: dict[int, Handle] = {}
        self._next = 1

    def check_room(self) -> None:
        """Refuse to open one more, if too many are.

        Raises:
            OSError: They are.
        """
        if len(self._handles) >= MAX_HANDLES:
            raise error(errno.ENFILE)

    def add(self, handle: Handle) -> int:
        """Return the number by which the kernel means it."""
        number = self._next
        self._next += 1
        self._handles[number] = handle
        self.names += len(handle.names)
        return number

    def get(self, number: int) -> Handle:
        """Return what a number means.

        Raises:
            OSError: Nothing.
        """
        try:
            return self._handles[number]
        except KeyError:
            raise error(errno.EBADF) from None

    def file(self, number: int) -> int:
        """Return the descriptor of an open file.

        Raises:
            OSError: It is none.
        """
        file = self.get(number).file
        if file is None:
            raise error(errno.EISDIR)
        return file

    def file_of(self, node: Node) -> int | None:
        """Return a descriptor of what was at a place, if it is open."""
        files = (one.file for one in self._handles.values() if one.node is node and one.file is not None)
        return next(files, None)

    def replace(self, node: Node, file: int) -> None:
        """Let all that is open of a node be another file, which has taken its place."""
        for one in self._handles.values():
            if one.node is node and one.file is not None:
                os.dup2(file, one.file, inheritable=False)

    def has_open(self, status: os.stat_result) -> bool:
        """Whether a file is open, whatever it was called."""
        files = (one.file for one in self._handles.values() if one.file is not None)
        return any(identity(os.fstat(file)) == identity(status) for file in files)

    def release(self, number: int) -> os.stat_result | None:
        """Close it; return what a file is like then.

        Raises:
            OSError: There is no such handle.
        """
        handle = self.get(number)
        del self._handles[number]
        self.names -= len(handle.names)
        if handle.file is None:
            return None
        status = os.fstat(handle.file)
        os.close(handle.file)
        return status

    def close(self) -> None:
        """Close all."""
        for number in list(self._handles):
            self.release(number)


@dataclass
class Session:
    """What the operations of a mount work on.

    Args:
        folder: What is mounted.
        nodes: The places that the kernel knows.
        handles: What its programs have open.
    """

    folder: Folder
    nodes: Nodes = field(default_factory=Nodes)
    handles: Handles = field(default_factory=Handles)

    def entry(self, parent: Node, name: str) -> bytes:
        """Return the node of what is at a place, and what it is like; the kernel knows it from now on.

        Raises:
            OSError: Nothing is there, or the kernel knows too many.
        """
        status = self.folder.status([*parent.segments(), name])
        return messages.entry(self.nodes.tell(parent, name, status).number, status)

    def status(self, node: Node) -> os.stat_result:
        """Return what a node is like.

        Raises:
            OSError: It is not there any more; the kernel then looks what is.
        """
        status = self.folder.status(node.segments())
        if node.parent is not None and node.identity != identity(status):
            raise error(errno.ESTALE)
        return status

    def where(self, number: int) -> list[str]:
        """Return the place of a node, at which it still is.

        Raises:
            OSError: It is not.
        """
        node = self.nodes.get(number)
        self.status(node)
        return node.segments()

    def own(self, node: Node, keep: int | None = None) -> None:
        """Make sure that a file has no names elsewhere, so that it may be changed.

        Args:
            node: The file, or anything else.
            keep: Bytes that are needed of it; ``None``: all.

        Raises:
            OSError: It is not there any more, or it cannot be copied.
        """
        status = self.status(node)
        if stat.S_ISREG(status.st_mode) and not self.folder.only_here(status, node.segments()):
            os.close(self.own_file(node, status, keep))

    def file_to_change(self, number: int, keep: int | None = None) -> int:
        """Return the descriptor of an open file, to write to it; it has no names elsewhere.

        Args:
            number: The handle.
            keep: Bytes that are needed of it; ``None``: all.

        Raises:
            OSError: It was not opened for writing; it was moved out of the directory; it cannot be copied.
        """
        file, handle = self.handles.file(number), self.handles.get(number)
        if not handle.writable:
            raise error(errno.EBADF)
        status = os.fstat(file)
        if not self.folder.only_here(status, self._place(handle.node)) or not _writes(file):
            os.close(self.own_file(handle.node, status, keep))
        return file

    def own_file(self, node: Node, status: os.stat_result, keep: int | None) -> int:
        """Open a file that is about to be changed, or the copy in its place; see :meth:`Folder.own`."""
        own = self.folder.own(node.segments(), status, keep)
        node.identity = identity(os.fstat(own))
        self.handles.replace(node, own)
        return own

    def _place(self, node: Node) -> list[str] | None:
        try:
            return node.segments()
        except OSError:
            return None

    def removed(self, status: os.stat_result | None) -> None:
        """Take note that a file lost a name, or that it was closed.

        Args:
            status: What it was like; ``None``: there was none.
        """
        if status is None or not stat.S_ISREG(status.st_mode) or self.handles.has_open(status):
            return  # what is open still takes room
        self.folder.gone(status.st_size)


def _writes(file: int) -> bool:
    return fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
