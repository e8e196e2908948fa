"""FUSE nodes: the numbers by which a guest's kernel refers to paths in a mounted directory."""

from __future__ import annotations

import errno
import os
import stat

from pytest_microvm.mounts.live.messages import ROOT
from pytest_microvm.untrusted.manifest import MAX_PATHS
from pytest_microvm.untrusted.nofollow import MAX_DEPTH

Identity = tuple[int, int, int]
"""A file's identity: device, inode and file type."""


class Node:
    """A file known to the kernel, by its parent node and its name (``None`` once it is removed).

    A machine may refer to a node for a long time; its path is looked up anew each time, so that no
    descriptor is kept open.
    """

    __slots__ = ("identity", "known", "name", "number", "parent")

    def __init__(self, number: int, parent: Node | None, name: str | None, identity: Identity | None) -> None:
        self.number = number
        self.parent = parent
        self.name = name
        self.identity = identity
        self.known = 0  # FUSE's lookup count: references that the kernel holds

    @property
    def gone(self) -> bool:
        """True if the file has been removed or replaced."""
        return self.parent is not None and self.name is None

    def segments(self) -> list[str]:
        """Return the path from the mounted directory to this node, as a list of names.

        Raises:
            OSError: The file was removed, or its path is too deep.
        """
        names: list[str] = []
        here = self
        while here.parent is not None:
            if here.name is None:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            names.append(here.name)
            if len(names) > MAX_DEPTH:
                raise OSError(errno.ENAMETOOLONG, f"more than {MAX_DEPTH} directories inside each other")
            here = here.parent
        return names[::-1]


class Nodes:
    """All nodes that a guest's kernel holds references to."""

    def __init__(self) -> None:
        self._by_number = {ROOT: Node(ROOT, None, None, None)}
        self._by_place: dict[tuple[int, str], Node] = {}
        self._next = ROOT + 1

    def get(self, number: int) -> Node:
        """Return a node.

        Raises:
            OSError: The number is unknown.
        """
        try:
            return self._by_number[number]
        except KeyError:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None

    def tell(self, parent: Node, name: str, status: os.stat_result) -> Node:
        """Return the node of a file, created if necessary, and count a reference of the kernel.

        Raises:
            OSError: The kernel holds too many nodes.
        """
        node = self._by_place.get((parent.number, name))
        if node is not None and node.identity != identity(status):
            self.remove(parent, name)
            node = None
        if node is None:
            if len(self._by_number) > MAX_PATHS:
                raise OSError(errno.ENFILE, f"more than {MAX_PATHS} files are known at once")
            node = Node(self._next, parent, name, identity(status))
            self._next += 1
            self._by_number[node.number] = self._by_place[parent.number, name] = node
        node.known += 1
        return node

    def forget(self, number: int, times: int) -> None:
        """Drop ``times`` references of the kernel to a node."""
        node = self._by_number.get(number)
        if node is None or number == ROOT:
            return
        node.known -= times
        if node.known <= 0:
            del self._by_number[number]
            self._vacate(node)

    def remove(self, parent: Node, name: str) -> None:
        """Mark the node at a path as removed."""
        node = self._by_place.get((parent.number, name))
        if node is not None:
            self._vacate(node)
            node.name = None

    def move(self, parent: Node, name: str, new_parent: Node, new_name: str) -> None:
        """Update the node of a file that was renamed."""
        self.remove(new_parent, new_name)
        node = self._by_place.pop((parent.number, name), None)
        if node is not None:
            node.parent, node.name = new_parent, new_name
            self._by_place[new_parent.number, new_name] = node

    def _vacate(self, node: Node) -> None:
        if node.parent is not None and node.name is not None:
            place = (node.parent.number, node.name)
            if self._by_place.get(place) is node:
                del self._by_place[place]


def identity(status: os.stat_result) -> Identity:
    """Return a file's identity."""
    return status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)
