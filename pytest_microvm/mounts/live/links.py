"""Symbolic links of a live mount: validate links that a machine creates, and links that it moves.

A name that a machine creates or moves must not lead a program of the host out of the directory, neither by
itself nor through any name reachable from it. This invariant then also holds for all later names that
follow the same rule.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from pytest_microvm.mounts.live.messages import error
from pytest_microvm.untrusted.manifest import is_git
from pytest_microvm.untrusted.nofollow import MAX_DEPTH, folder_below

MAX_STEPS = 1_000_000
"""Maximum names inspected per check, which takes some seconds; a directory counts once per level of depth."""

_MAX_FOLLOWED = 40  # links in one path: the kernel's limit (path_resolution(7))


class TooLarge(Exception):
    """A check needs more than :data:`MAX_STEPS` steps."""


def leads_out(target: str, depth: int) -> bool:
    """Return True if the text of a link, ``depth`` levels below the mounted directory, may lead out of it.

    ``..`` is accepted only at the beginning, where it cannot follow another link.
    """
    return target.startswith("/") or climbs(target) or _parts(target).count("..") > depth


def climbs(target: str) -> bool:
    """Return True if a link has ``..`` after a name; its target then depends on the type of that name."""
    parts = _parts(target)
    return ".." in parts[parts.count("..") :]


class Reach:
    """Checker for the paths that are reachable in a directory through links and directories.

    Args:
        root: A descriptor of the directory.
        moved: Source and target of a planned move; names are resolved as if it were done.
    """

    def __init__(self, root: int, moved: tuple[list[str], list[str]] | None = None) -> None:
        self._root = root
        self._moved = moved
        self._left = MAX_STEPS
        self.rises = False
        """True if an inspected link leads to a path nearer to the root than the link itself."""

    def check_link(self, above: list[str], target: str) -> None:
        """Reject a link in the directory ``above`` if it leads, directly or indirectly, out of the root.

        Git's own files count as outside.

        Raises:
            OSError: The link leads out.
            TooLarge: The check takes too many steps.
        """
        place, is_folder = self._follow(above, target)
        if is_folder:
            self._check_below([place])

    def check(self, place: list[str]) -> None:
        """Reject a link or a directory if it leads, directly or indirectly, out of the root.

        Raises:
            OSError: It leads out.
            TooLarge: The check takes too many steps.
        """
        found = self._look(place)
        if isinstance(found, str):
            self.check_link(place[:-1], found)
        elif found:
            ends = []
            for above, target in self.links(place):
                end, is_folder = self._follow(above, target)
                if is_folder:
                    ends.append(end)
            self._check_below(ends, [place])

    def links(self, place: list[str]) -> Iterator[tuple[list[str], str]]:
        """Yield the parent directory and the target of each link below a directory."""
        pending = [place]
        while pending:
            here = pending.pop()
            real = self._real(here)
            if real is None:
                continue
            if len(here) > MAX_DEPTH:
                raise TooLarge
            self._spend(len(real) + 1)
            with folder_below(self._root, real) as folder:
                if folder is None:
                    continue
                with os.scandir(folder) as entries:
                    for entry in entries:
                        self._spend(1)
                        if self._moved and [*here, entry.name] == self._moved[1]:
                            continue  # the move replaces this entry
                        if entry.is_dir(follow_symlinks=False):
                            pending.append([*here, entry.name])
                        elif entry.is_symlink() and self._real([*here, entry.name]) is not None:
                            yield here, os.readlink(entry.name, dir_fd=folder)

    def _check_below(self, pending: list[list[str]], done: list[list[str]] | None = None) -> None:
        """Reject directories with a link that leads out; also check directories reached through links."""
        seen = {tuple(place) for place in done or ()}
        while pending:
            place = pending.pop()
            if any(tuple(place[:length]) in seen for length in range(len(place) + 1)):
                continue
            for above, target in self.links(place):
                end, is_folder = self._follow(above, target)
                if is_folder:
                    pending.append(end)
            seen.add(tuple(place))

    def _follow(self, above: list[str], target: str) -> tuple[list[str], bool]:
        """Return a link's resolved path, which need not exist, and whether it is a directory.

        Raises:
            OSError: The link leads out, or through a link that does.
        """
        place, is_folder = self._end(above, target)
        self.rises = self.rises or len(place) <= len(above)
        return place, is_folder

    def _end(self, above: list[str], target: str) -> tuple[list[str], bool]:
        here = list(above)
        left = _checked(target, len(here))[::-1]
        followed = 1
        while left:
            part = left.pop()
            if part == "..":
                here.pop()
                continue
            here.append(part)
            found = self._look(here)
            if isinstance(found, str):
                here.pop()
                left += _checked(found, len(here))[::-1]
                followed += 1
            if not found or followed > _MAX_FOLLOWED:
                return here + left[::-1], False
        return here, True

    def _look(self, place: list[str]) -> str | bool:
        """Return the target of the link at a path; for any other path, whether it is a directory."""
        real = self._real(place)
        if not real:
            return real is not None
        self._spend(len(real))
        with folder_below(self._root, real[:-1]) as folder:
            if folder is None:
                return False
            try:
                mode = os.stat(real[-1], dir_fd=folder, follow_symlinks=False).st_mode
                return os.readlink(real[-1], dir_fd=folder) if stat.S_ISLNK(mode) else stat.S_ISDIR(mode)
            except FileNotFoundError:
                return False

    def _real(self, place: list[str]) -> list[str] | None:
        """Return the current path of the file at ``place`` after the move; ``None`` if there will be none."""
        if self._moved is None:
            return place
        old, new = self._moved
        if place[: len(new)] == new:
            return [*old, *place[len(new) :]]
        return None if place[: len(old)] == old else place

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise TooLarge


def _parts(target: str) -> list[str]:
    return [part for part in target.split("/") if part not in ("", ".")]


def _checked(target: str, depth: int) -> list[str]:
    if leads_out(target, depth) or is_git(target):
        raise error(errno.EPERM)
    return _parts(target)
