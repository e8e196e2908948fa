"""The host's side of a live mount: one directory, what a machine may do in it, and how much it may add.

No symbolic link of the host is followed, and none is made that leads out: the machine's kernel follows links
in the machine, but programs of the host follow them here. No file is written that has a name elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator

from pytest_microvm.mounts.live import hard_links
from pytest_microvm.mounts.live.links import Reach, TooLarge, climbs
from pytest_microvm.mounts.live.lock import FolderLock
from pytest_microvm.mounts.live.messages import error
from pytest_microvm.mounts.live.nodes import identity
from pytest_microvm.mounts.live.opening import ALWAYS, check_same, reading, regular, same, shown
from pytest_microvm.untrusted.manifest import file_mode, folder_mode, is_git
from pytest_microvm.untrusted.nofollow import MAX_DEPTH, folder_below

NEW_ENTRY = 4096
"""Bytes that a new file, link or directory counts as, so that their number is limited, too."""

_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_MAX_LINK = 4095  # bytes


class Growth:
    """How much larger a machine may make the directory.

    Args:
        limit: Bytes. What it removes, it may add again.
    """

    def __init__(self, limit: int) -> None:
        self.left = limit

    def take(self, size: int) -> None:
        """Take note that so many bytes are added.

        Raises:
            OSError: They are more than are left.
        """
        if size > self.left:
            raise error(errno.EDQUOT)
        self.left -= max(0, size)

    def give(self, size: int) -> None:
        """Take note that so many bytes are gone."""
        self.left += size


class Folder:
    """A directory of the host.

    Args:
        root: A descriptor of it, owned from here on.
        writable: Whether the machine may change anything.
        growth: How much it may add.
    """

    def __init__(self, root: int, growth: Growth, *, writable: bool) -> None:
        self.root = root
        self.lock = FolderLock(root)
        self._growth = growth
        self._writable = writable
        self._names = hard_links.KnownNames()
        self._climbing: bool | None = None

    @property
    def room(self) -> int:
        """How many bytes the machine may still add."""
        return max(0, self._growth.left) if self._writable else 0

    def close(self) -> None:
        """Let go of it."""
        self.lock.close()
        os.close(self.root)

    # Looking

    def status(self, segments: list[str]) -> os.stat_result:
        """Return what is at a place: a file, a directory or a link.

        Raises:
            OSError: Nothing is, or something that no machine is shown.
        """
        if not segments:
            return os.fstat(self.root)
        with self._above(segments) as (parent, name):
            return shown(parent, name)

    def target(self, segments: list[str]) -> bytes:
        """Return where a link points."""
        with self._above(segments) as (parent, name):
            return os.fsencode(os.readlink(name, dir_fd=parent))

    def names(self, segments: list[str], most: int) -> list[str]:
        """Return what is in a directory, as far as a machine is shown it.

        Raises:
            OSError: It has more than ``most`` names.
        """
        with self._inside(segments) as folder, os.scandir(folder) as entries:
            found = []
            for one in entries:
                if (
                    one.is_symlink()
                    or one.is_dir(follow_symlinks=False)
                    or one.is_file(follow_symlinks=False)
                ):
                    found.append(one.name)
                if len(found) > most:
                    raise error(errno.ENFILE)
            return found

    # Files

    def open(self, segments: list[str], flags: int) -> int:
        """Open a file; return its descriptor, which cannot write yet if the file has names elsewhere.

        Args:
            segments: Where it is.
            flags: As the machine's program gave them; how it is opened counts, and nothing else.
        """
        wanted = flags & os.O_ACCMODE
        if wanted & _CHANGING:
            self._may_change(segments)
        with self._above(segments) as (parent, name):
            return self._opened(parent, name, segments, wanted)

    def create(self, segments: list[str], flags: int, mode: int) -> int:
        """Make a file if there is none, and open it; return its descriptor."""
        self._may_change(segments)
        wanted = flags & os.O_ACCMODE
        with self._above(segments) as (parent, name):
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(shown(parent, name).st_mode) or flags & os.O_EXCL:
                    raise error(errno.EEXIST)
                return self._opened(parent, name, segments, wanted)
            with self._added(NEW_ENTRY):
                return regular(
                    os.open(name, wanted | ALWAYS | os.O_CREAT | os.O_EXCL, file_mode(mode), dir_fd=parent)
                )

    def only_here(self, status: os.stat_result, segments: list[str] | None) -> bool:
        """Whether all names of a file are known to be in the directory: now, and not only once.

        Args:
            status: What the file is like.
            segments: Where it is, as far as it is known; ``None``: it was removed.
        """
        places = self._names.of(identity(status)) + ([] if segments is None else [segments])
        found: set[tuple[int, int, str]] = set()
        for place in places:
            if len(found) >= status.st_nlink:
                break
            with contextlib.suppress(OSError), self._above(place) as (parent, name):
                if identity(shown(parent, name)) == identity(status):
                    found.add(hard_links.one_name(parent, name))
        return len(found) >= status.st_nlink

    def own(self, segments: list[str], status: os.stat_result, keep: int | None = None) -> int:
        """Open a file to write to it; if it has names elsewhere, put a copy in its place first.

        Args:
            segments: Where it is.
            status: What it was like when it was looked at.
            keep: Bytes that are needed of it, because it is about to be cut off there; ``None``: all.

        Raises:
            OSError: Something else is there; the copy is larger than what may be added; a program of the host
                wrote to it meanwhile.
        """
        self._may_change(segments)
        with self._above(segments) as (parent, name), reading(parent, name) as file:
            found = os.fstat(file)
            if identity(found) != identity(status):
                raise error(errno.ESTALE)
            if self.only_here(found, segments):
                return same(os.open(name, os.O_RDWR | ALWAYS, dir_fd=parent), found)
            size = found.st_size if keep is None else min(keep, found.st_size)
            with self._added(size):
                return self._copied(parent, name, file, size)

    def write(self, file: int, data: bytes, offset: int) -> int:
        """Write to an open file; return how much was."""
        before = os.fstat(file).st_size
        grown = max(0, offset + len(data) - before)
        with self._added(grown):
            written = os.pwrite(file, data, offset)
        self._growth.give(grown - max(0, offset + written - before))
        return written

    def resize(self, file: int, size: int) -> None:
        """Cut an open file off, or fill it up with zeros."""
        before = os.fstat(file).st_size
        with self._added(max(0, size - before)):
            os.ftruncate(file, size)
        self._growth.give(max(0, before - size))

    def set_mode(self, segments: list[str], mode: int) -> None:
        """Change who may do what; neither group nor others get the right to write."""
        self._may_change(segments)
        if not segments:
            os.fchmod(self.root, folder_mode(mode))
            return
        with self._above(segments) as (parent, name):
            status = shown(parent, name)
            if stat.S_ISLNK(status.st_mode):
                raise error(errno.EOPNOTSUPP)
            # fchmodat(2) follows links, and what a machine sees as a file may be one by now
            with reading(parent, name) as file:
                self._check_owned(file, segments)
                folder = stat.S_ISDIR(os.fstat(file).st_mode)
                os.fchmod(file, folder_mode(mode) if folder else file_mode(mode))

    def set_times(self, segments: list[str], accessed: int | None, modified: int | None) -> None:
        """Change times, in nanoseconds since 1970; ``None``: as it is."""
        self._may_change(segments)
        status = self.status(segments)
        times = (
            status.st_atime_ns if accessed is None else accessed,
            status.st_mtime_ns if modified is None else modified,
        )
        if not segments:
            os.utime(self.root, ns=times)
            return
        with self._above(segments) as (parent, name):
            if stat.S_ISLNK(status.st_mode):
                self._set_link_times(parent, name, times)
                return
            with reading(parent, name) as file:
                self._check_owned(file, segments)
                os.utime(file, ns=times)

    # Names

    def make_folder(self, segments: list[str], mode: int) -> None:
        """Make a directory."""
        self._may_change(segments)
        with self._above(segments) as (parent, name), self._added(NEW_ENTRY):
            os.mkdir(name, folder_mode(mode), dir_fd=parent)

    def make_link(self, segments: list[str], target: bytes) -> None:
        """Make a symbolic link, to a place within the directory.

        Raises:
            OSError: It would lead out, or cannot be made.
        """
        self._may_change(segments)
        if not target or len(target) > _MAX_LINK:
            raise error(errno.ENAMETOOLONG if target else errno.ENOENT)
        with self.lock, self._above(segments) as (parent, name):
            with _as_error(errno.EPERM):
                reach = Reach(self.root)
                reach.check_link(segments[:-1], os.fsdecode(target))
                self._check_rise(reach)
            with self._added(NEW_ENTRY):
                os.symlink(target, name, dir_fd=parent)

    def make_name(self, segments: list[str], new: list[str]) -> None:
        """Give a file one more name, if it has none elsewhere."""
        self._may_change(segments)
        self._may_change(new)
        with (
            self.lock,
            self._above(segments) as (parent, name),
            self._above(new) as (new_parent, new_name),
        ):
            status = shown(parent, name)
            if not stat.S_ISREG(status.st_mode) or not self.only_here(status, segments):
                raise error(errno.EPERM)  # a link would lead elsewhere from there
            with self._added(NEW_ENTRY):
                os.link(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent, follow_symlinks=False)
            self._names.add(identity(status), segments, new)

    def remove(self, segments: list[str], *, folder: bool) -> os.stat_result:
        """Remove a file or a link, or an empty directory; return what it was like."""
        self._may_change(segments)
        with self._above(segments) as (parent, name):
            status = shown(parent, name)
            if folder:
                os.rmdir(name, dir_fd=parent)
            else:
                os.unlink(name, dir_fd=parent)
        if status.st_nlink == 1:
            self._names.forget(identity(status))
        self._growth.give(NEW_ENTRY)
        return status

    def move(self, segments: list[str], new: list[str]) -> os.stat_result | None:
        """Give something another name; return what what was called so before was like."""
        self._may_change(segments)
        self._may_change(new)
        with (
            self.lock,
            self._above(segments) as (parent, name),
            self._above(new) as (new_parent, new_name),
        ):
            status = shown(parent, name)
            if not stat.S_ISREG(status.st_mode):
                self._check_move(segments, new)
            replaced = None
            with contextlib.suppress(FileNotFoundError):
                replaced = shown(new_parent, new_name)
            os.rename(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)
        self._names.move(segments, new)
        if replaced is None or (replaced.st_dev, replaced.st_ino) == (status.st_dev, status.st_ino):
            return None
        self._growth.give(NEW_ENTRY)
        return replaced

    def gone(self, size: int) -> None:
        """Take note that the content of a file is no more: it has no name, and nobody has it open."""
        self._growth.give(size)

    def _set_link_times(self, parent: int, name: str, times: tuple[int, int]) -> None:
        with self.lock:  # by its name alone can a link be changed: no other may come there
            if shown(parent, name).st_nlink > 1:
                raise error(errno.EPERM)
            os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _check_owned(self, file: int, segments: list[str]) -> None:
        """Check that an open file may be changed: another may have come to its place."""
        status = os.fstat(file)
        if stat.S_ISREG(status.st_mode) and not self.only_here(status, segments):
            raise error(errno.ESTALE)

    def _check_move(self, segments: list[str], new: list[str]) -> None:
        """Refuse to move a link or a directory to where something outside could be reached through it."""
        with _as_error(errno.EXDEV):  # so that mv(1) copies it
            reach = Reach(self.root, (segments, new))
            reach.check(new)
            self._check_rise(reach)

    def _check_rise(self, reach: Reach) -> None:
        """Refuse a link that leads nearer to the top if a link of the host has ``..`` behind a name.

        That name could be the refused link, and ``..`` would then lead higher than it did.
        """
        if not reach.rises:
            return
        if self._climbing is None:
            try:
                self._climbing = any(climbs(target) for _above, target in Reach(self.root).links([]))
            except TooLarge:
                self._climbing = True
        if self._climbing:
            raise error(errno.EPERM)

    def _opened(self, parent: int, name: str, segments: list[str], wanted: int) -> int:
        status = shown(parent, name)
        if not stat.S_ISREG(status.st_mode):
            raise error(errno.EISDIR)
        if status.st_nlink > 1 and not self.only_here(status, segments):
            wanted = os.O_RDONLY  # what is open for writing cannot be executed, under any of its names
        return regular(os.open(name, wanted | ALWAYS, dir_fd=parent))

    def _copied(self, parent: int, name: str, file: int, size: int) -> int:
        """Put a copy of an open file in its place; return its descriptor."""
        before = _version(os.fstat(file))
        temporary = f".microvm-{secrets.token_hex(8)}"
        copy = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | ALWAYS, 0o600, dir_fd=parent)
        try:
            hard_links.copy(file, copy, size)
            with self.lock:
                check_same(parent, {name: file, temporary: copy})
                if _version(os.fstat(file)) != before:
                    raise error(errno.EBUSY)  # noqa: TRY301 - what was made is removed below
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            os.close(copy)
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=parent)
            raise
        return copy

    # Places

    @contextlib.contextmanager
    def _inside(self, segments: list[str]) -> Iterator[int]:
        """Open a directory, without following links."""
        with folder_below(self.root, segments) as folder:
            if folder is None:
                raise error(errno.ENOENT)
            yield folder

    @contextlib.contextmanager
    def _above(self, segments: list[str]) -> Iterator[tuple[int, str]]:
        """Open the directory in which something is; give it and what that is called."""
        if not segments:
            raise error(errno.EBUSY)
        if len(segments) > MAX_DEPTH:
            raise error(errno.ENAMETOOLONG)
        with self._inside(segments[:-1]) as folder:
            yield folder, segments[-1]

    def _may_change(self, segments: list[str]) -> None:
        if not self._writable:
            raise error(errno.EROFS)
        if is_git("/".join(segments)):
            raise error(errno.EPERM)

    @contextlib.contextmanager
    def _added(self, size: int) -> Iterator[None]:
        """Count what is added inside, unless that fails."""
        self._growth.take(size)
        try:
            yield
        except BaseException:
            self._growth.give(size)
            raise


@contextlib.contextmanager
def _as_error(number: int) -> Iterator[None]:
    """Raise what is too large to be judged as an error of the system."""
    try:
        yield
    except TooLarge:
        raise error(number) from None


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
