"""Symbolic links of a live mount: which ones a machine may make, and to where it may move them.

Whatever a machine makes or moves must keep a program of the host inside the directory: the name itself, and
every name that can be reached through it. Then it stays so, whatever names are made later by the same rule.
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
"""Names that are looked at for one judgement, some seconds; a directory counts as often as it is deep."""

_MAX_FOLLOWED = 40  # links in one path: the kernel follows no more (path_resolution(7))


class TooLarge(Exception):
    """There is more to be looked at than :data:`MAX_STEPS`."""


def leads_out(target: str, depth: int) -> bool:
    """Whether a link in a directory ``depth`` below the mounted one may lead out of that, as it is written.

    ``..`` is only taken where it cannot follow another link: at the beginning.
    """
    return target.startswith("/") or climbs(target) or _parts(target).count("..") > depth


def climbs(target: str) -> bool:
    """Whether ``..`` stands behind a name in a link: where that leads depends on what the name is."""
    parts = _parts(target)
    return ".." in parts[parts.count("..") :]


class Reach:
    """What can be reached in a directory, through links and directories.

    Args:
        root: A descriptor of the directory.
        moved: From where to where something is about to be moved: names are looked at as if it were there.
    """

    def __init__(self, root: int, moved: tuple[list[str], list[str]] | None = None) -> None:
        self._root = root
        self._moved = moved
        self._left = MAX_STEPS
        self.rises = False
        """Whether a link that was looked at leads nearer to the top than it is itself."""

    def check_link(self, above: list[str], target: str) -> None:
        """Refuse a link in the directory ``above`` if anything outside can be reached through it.

        Git's own files count as outside.

        Raises:
            OSError: It can be.
            TooLarge: It cannot be told.
        """
        place, is_folder = self._follow(above, target)
        if is_folder:
            self._check_below([place])

    def check(self, place: list[str]) -> None:
        """Refuse a link or a directory at a place if anything outside can be reached through it.

        Raises:
            OSError: It can be.
            TooLarge: It cannot be told.
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
        """Yield the links below a directory: in which directory each is, and where it points."""
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
                            continue  # what is there will be gone
                        if entry.is_dir(follow_symlinks=False):
                            pending.append([*here, entry.name])
                        elif entry.is_symlink() and self._real([*here, entry.name]) is not None:
                            yield here, os.readlink(entry.name, dir_fd=folder)

    def _check_below(self, pending: list[list[str]], done: list[list[str]] | None = None) -> None:
        """Refuse directories from which a link leads out, those included to which their links lead."""
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
        """Return where a link leads, as far as that exists, and whether it is a directory.

        Raises:
            OSError: It leads out, or through a link that does.
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
        """Return where the link at a place points; whether a directory is there, if it is no link."""
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
        """Return where what will be at a place is now; ``None`` if nothing will be."""
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
