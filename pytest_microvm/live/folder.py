"""The host's side of a live mount: one directory, what a machine may do in it, and how much it may add.

No symbolic link of the host is followed, and none is made that leads out: the machine's kernel follows links
in the machine, but programs of the host follow them here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from pytest_microvm.errors import UsageError
from pytest_microvm.manifest import MAX_DEPTH, file_mode, folder_below, folder_mode, is_git, links

NEW_ENTRY = 4096
"""Bytes that a new file, link or directory counts as, so that their number is limited, too."""

_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_ALWAYS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_MAX_NAME = 255  # bytes
_MAX_LINK = 4095  # bytes


def error(number: int) -> OSError:
    """Return the error of the system with a number of :mod:`errno`."""
    return OSError(number, os.strerror(number))


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
        self._growth = growth
        self._writable = writable

    @property
    def room(self) -> int:
        """How many bytes the machine may still add."""
        return max(0, self._growth.left) if self._writable else 0

    def close(self) -> None:
        """Let go of it."""
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
            return _shown(parent, name)

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
        """Open a file; return its descriptor.

        Args:
            segments: Where it is.
            flags: As the machine's program gave them; how it is opened counts, and nothing else.
        """
        wanted = flags & os.O_ACCMODE
        if wanted & _CHANGING:
            self._may_change(segments)
        with self._above(segments) as (parent, name):
            if not stat.S_ISREG(_shown(parent, name).st_mode):
                raise error(errno.EISDIR)
            return _regular(os.open(name, wanted | _ALWAYS, dir_fd=parent))

    def create(self, segments: list[str], flags: int, mode: int) -> int:
        """Make a file if there is none, and open it; return its descriptor."""
        self._may_change(segments)
        wanted = flags & (os.O_ACCMODE | os.O_EXCL)
        with self._above(segments) as (parent, name):
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(_shown(parent, name).st_mode) or wanted & os.O_EXCL:
                    raise error(errno.EEXIST)
                return _regular(os.open(name, wanted | _ALWAYS, dir_fd=parent))
            with self._added(NEW_ENTRY):
                return _regular(
                    os.open(name, wanted | _ALWAYS | os.O_CREAT | os.O_EXCL, file_mode(mode), dir_fd=parent)
                )

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
            status = _shown(parent, name)
            if stat.S_ISLNK(status.st_mode):
                raise error(errno.EOPNOTSUPP)
            if stat.S_ISDIR(status.st_mode):
                _change_mode(name, folder_mode(mode), os.O_DIRECTORY, parent)
            else:
                _change_mode(name, file_mode(mode), 0, parent)

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
            os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

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
        if leads_out(os.fsdecode(target), len(segments) - 1):
            raise error(errno.EPERM)
        with self._above(segments) as (parent, name), self._added(NEW_ENTRY):
            os.symlink(target, name, dir_fd=parent)

    def make_name(self, segments: list[str], new: list[str]) -> None:
        """Give a file one more name."""
        self._may_change(segments)
        self._may_change(new)
        with self._above(segments) as (parent, name), self._above(new) as (new_parent, new_name):
            if not stat.S_ISREG(_shown(parent, name).st_mode):
                raise error(errno.EPERM)  # a link would lead elsewhere from there
            with self._added(NEW_ENTRY):
                os.link(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent, follow_symlinks=False)

    def remove(self, segments: list[str], *, folder: bool) -> os.stat_result:
        """Remove a file or a link, or an empty directory; return what it was like."""
        self._may_change(segments)
        with self._above(segments) as (parent, name):
            status = _shown(parent, name)
            if folder:
                os.rmdir(name, dir_fd=parent)
            else:
                os.unlink(name, dir_fd=parent)
        self._growth.give(NEW_ENTRY)
        return status

    def move(self, segments: list[str], new: list[str]) -> os.stat_result | None:
        """Give something another name; return what what was called so before was like."""
        self._may_change(segments)
        self._may_change(new)
        with self._above(segments) as (parent, name), self._above(new) as (new_parent, new_name):
            status = _shown(parent, name)
            self._check_links(parent, name, status, len(segments) - len(new), len(new) - 1)
            replaced = None
            with contextlib.suppress(FileNotFoundError):
                replaced = _shown(new_parent, new_name)
            os.rename(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)
        if replaced is None or (replaced.st_dev, replaced.st_ino) == (status.st_dev, status.st_ino):
            return None
        self._growth.give(NEW_ENTRY)
        return replaced

    def gone(self, size: int) -> None:
        """Take note that the content of a file is no more: it has no name, and nobody has it open."""
        self._growth.give(size)

    def _check_links(self, parent: int, name: str, status: os.stat_result, rise: int, depth: int) -> None:
        """Refuse to bring links to where they lead out: nearer to the top they may do."""
        if rise <= 0:
            return
        if stat.S_ISLNK(status.st_mode) and leads_out(os.readlink(name, dir_fd=parent), depth):
            raise error(errno.EPERM)
        if not stat.S_ISDIR(status.st_mode):
            return
        with folder_below(parent, [name]) as folder:
            if folder is None:
                raise error(errno.ENOENT)
            try:
                targets = links(folder)
            except UsageError:  # too deep to be looked at
                raise error(errno.EPERM) from None
        if any(leads_out(target, depth + 1 + path.count("/")) for path, target in targets.items()):
            raise error(errno.EPERM)

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


def checked_name(name: bytes) -> str:
    """Return a name that a machine gave, if it is one.

    Raises:
        OSError: It is a path, or too long.
    """
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise error(errno.EINVAL)
    if len(name) > _MAX_NAME:
        raise error(errno.ENAMETOOLONG)
    return os.fsdecode(name)


def leads_out(target: str, depth: int) -> bool:
    """Whether a link in a directory ``depth`` below the mounted one may lead out of that.

    ``..`` is only taken where it cannot follow another link: at the beginning.
    """
    if target.startswith("/"):
        return True
    parts = [part for part in target.split("/") if part not in ("", ".")]
    up = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    return up > depth or ".." in parts[up:]


def _shown(parent: int, name: str) -> os.stat_result:
    """Return what is called ``name``, if a machine is shown it: no devices, pipes and sockets."""
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
        raise error(errno.ENOENT)
    return status


def _regular(file: int) -> int:
    """Return a descriptor if it is a regular file's; what else took its place is closed."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise error(errno.ENXIO)
    return file


def _change_mode(name: str, mode: int, flags: int, parent: int) -> None:
    # fchmodat(2) follows links, and what a machine sees as a file may be one by now.
    file = os.open(name, os.O_RDONLY | flags | _ALWAYS, dir_fd=parent)
    try:
        os.fchmod(file, mode)
    finally:
        os.close(file)
