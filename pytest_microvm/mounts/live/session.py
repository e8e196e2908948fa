"""The state of one live mount: its directory, nodes and open handles."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from dataclasses import dataclass, field

from pytest_microvm.mounts.live import messages
from pytest_microvm.mounts.live.folder import Folder
from pytest_microvm.mounts.live.messages import Owner, error
from pytest_microvm.mounts.live.nodes import Node, Nodes, identity

MAX_HANDLES = 256
"""Maximum open files and directories of a machine in one mount; each file is a descriptor on the host."""


@dataclass
class Handle:
    """An open file, or the names of a directory as they were when it was opened.

    Args:
        node: The node of the file or directory.
        file: A descriptor of the file.
        writable: Whether the machine opened the file for writing.
        names: The directory's names.
    """

    node: Node
    file: int | None = None
    writable: bool = False
    names: tuple[str, ...] = ()


class Handles:
    """The open handles of a mount."""

    def __init__(self) -> None:
        self.names = 0  # total of all handles
        self._handles: dict[int, Handle] = {}
        self._next = 1

    def check_room(self) -> None:
        """Check that another handle may be opened.

        Raises:
            OSError: Too many handles are open.
        """
        if len(self._handles) >= MAX_HANDLES:
            raise error(errno.ENFILE)

    def add(self, handle: Handle) -> int:
        """Add a handle and return its number."""
        number = self._next
        self._next += 1
        self._handles[number] = handle
        self.names += len(handle.names)
        return number

    def get(self, number: int) -> Handle:
        """Return the handle with a number.

        Raises:
            OSError: There is no such handle.
        """
        try:
            return self._handles[number]
        except KeyError:
            raise error(errno.EBADF) from None

    def file(self, number: int) -> int:
        """Return the descriptor of an open file.

        Raises:
            OSError: The handle is unknown, or is a directory's.
        """
        file = self.get(number).file
        if file is None:
            raise error(errno.EISDIR)
        return file

    def file_of(self, node: Node) -> int | None:
        """Return a descriptor of a node's file; ``None`` if the file is not open."""
        files = (one.file for one in self._handles.values() if one.node is node and one.file is not None)
        return next(files, None)

    def replace(self, node: Node, file: int) -> None:
        """Redirect all open handles of a node to the file that replaced it."""
        for one in self._handles.values():
            if one.node is node and one.file is not None:
                os.dup2(file, one.file, inheritable=False)

    def has_open(self, status: os.stat_result) -> bool:
        """Return True if a file is open under any name."""
        files = (one.file for one in self._handles.values() if one.file is not None)
        return any(identity(os.fstat(file)) == identity(status) for file in files)

    def release(self, number: int) -> os.stat_result | None:
        """Close a handle; return a file's last status, ``None`` for a directory.

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
        """Close all handles."""
        for number in list(self._handles):
            self.release(number)


@dataclass
class Session:
    """The state that the operations of a mount share.

    Args:
        folder: The mounted directory.
        owner: To whom everything in it belongs in the machine.
        nodes: The nodes that the kernel holds references to.
        handles: The files and directories that programs in the machine have open.
    """

    folder: Folder
    owner: Owner = field(default_factory=Owner)
    nodes: Nodes = field(default_factory=Nodes)
    handles: Handles = field(default_factory=Handles)

    def entry(self, parent: Node, name: str) -> bytes:
        """Return the packed node and attributes of a name, and count a reference of the kernel.

        Raises:
            OSError: The name does not exist, or the kernel holds too many nodes.
        """
        status = self.folder.status([*parent.segments(), name])
        return messages.entry(self.nodes.tell(parent, name, status).number, status, self.owner)

    def status(self, node: Node) -> os.stat_result:
        """Return the status of a node's file.

        Raises:
            OSError: The file was removed or replaced; the kernel then looks up the name again.
        """
        status = self.folder.status(node.segments())
        if node.parent is not None and node.identity != identity(status):
            raise error(errno.ESTALE)
        return status

    def where(self, number: int) -> list[str]:
        """Return the path of a node after checking that its file is still there.

        Raises:
            OSError: The file was removed or replaced, or the node is unknown.
        """
        node = self.nodes.get(number)
        self.status(node)
        return node.segments()

    def own(self, node: Node, keep: int | None = None) -> None:
        """Make a file safe to change: if it has names outside the directory, replace it by a copy.

        Args:
            node: The node of the file; other types are left alone.
            keep: Number of bytes to copy; ``None``: all.

        Raises:
            OSError: The file was removed or replaced, or cannot be copied.
        """
        status = self.status(node)
        if stat.S_ISREG(status.st_mode) and not self.folder.only_here(status, node.segments()):
            os.close(self.own_file(node, status, keep))

    def file_to_change(self, number: int, keep: int | None = None) -> int:
        """Return an open file's descriptor for writing; copy a file with names outside the directory first.

        Args:
            number: The number of the handle.
            keep: Number of bytes to copy; ``None``: all.

        Raises:
            OSError: The file was not opened for writing, was moved out of the directory, or cannot be copied.
        """
        file, handle = self.handles.file(number), self.handles.get(number)
        if not handle.writable:
            raise error(errno.EBADF)
        status = os.fstat(file)
        if not self.folder.only_here(status, self._place(handle.node)) or not _writes(file):
            os.close(self.own_file(handle.node, status, keep))
        return file

    def own_file(self, node: Node, status: os.stat_result, keep: int | None) -> int:
        """Open a file for writing, copied first if necessary (:meth:`Folder.own`), and update its handles."""
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
        """Return the bytes of a file without names to the growth budget, unless it is still open.

        Args:
            status: The file's last status; ``None``: no file was removed.
        """
        if status is None or not stat.S_ISREG(status.st_mode) or self.handles.has_open(status):
            return  # an open file still occupies space
        self.folder.gone(status.st_size)


def _writes(file: int) -> bool:
    return fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
