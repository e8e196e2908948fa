"""The host's side of a live mount: access to one directory, with its rules and its growth limit.

Symbolic links of the host are not followed, and links that lead out of the directory cannot be created: the
machine's kernel resolves links in the machine, but programs of the host resolve them here. Files that also
have a name outside the directory are not written to.
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
"""Bytes charged for a new file, link or directory, which limits their number, too."""

_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_MAX_LINK = 4095  # bytes


class Growth:
    """Budget of bytes that a machine may add to the directory.

    Args:
        limit: Bytes. Bytes that the machine removes are added to the budget again.
    """

    def __init__(self, limit: int) -> None:
        self.left = limit

    def take(self, size: int) -> None:
        """Charge ``size`` bytes to the budget.

        Raises:
            OSError: Fewer bytes are left.
        """
        if size > self.left:
            raise error(errno.EDQUOT)
        self.left -= max(0, size)

    def give(self, size: int) -> None:
        """Return ``size`` bytes to the budget."""
        self.left += size


class Folder:
    """A directory of the host that a machine works in.

    Args:
        root: A descriptor of the directory, which this object now owns.
        writable: Whether the machine may change anything.
        growth: The bytes that the machine may add.
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
        """Bytes that the machine may still add."""
        return max(0, self._growth.left) if self._writable else 0

    def close(self) -> None:
        """Close the directory and its lock."""
        self.lock.close()
        os.close(self.root)

    # Lookup

    def status(self, segments: list[str]) -> os.stat_result:
        """Return the status of the file, directory or link at a path.

        Raises:
            OSError: The path does not exist or is hidden from machines.
        """
        if not segments:
            return os.fstat(self.root)
        with self._above(segments) as (parent, name):
            return shown(parent, name)

    def target(self, segments: list[str]) -> bytes:
        """Return a link's target."""
        with self._above(segments) as (parent, name):
            return os.fsencode(os.readlink(name, dir_fd=parent))

    def names(self, segments: list[str], most: int) -> list[str]:
        """Return the names of a directory's files, directories and links.

        Raises:
            OSError: There are more than ``most`` names.
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
        """Open a file; return its descriptor, read-only if the file has names outside the directory.

        Args:
            segments: The file's path.
            flags: The flags of the machine's program; only the access mode is used.
        """
        wanted = flags & os.O_ACCMODE
        if wanted & _CHANGING:
            self._may_change(segments)
        with self._above(segments) as (parent, name):
            return self._opened(parent, name, segments, wanted)

    def create(self, segments: list[str], flags: int, mode: int) -> int:
        """Open a file, creating it if it does not exist; return its descriptor."""
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
        """Return True if all names of a file are inside the directory, verified at this moment.

        Args:
            status: The file's status.
            segments: The file's path, if known; ``None`` if it was removed.
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
        """Open a file for writing; if it has names outside the directory, replace it by a copy first.

        Args:
            segments: The file's path.
            status: The file's status from an earlier lookup.
            keep: Number of bytes to copy, as the file will be truncated to that size; ``None``: all.

        Raises:
            OSError: Another file is at the path; the copy exceeds the growth limit; a program of the host
                wrote to the file in the meantime.
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
        """Write to an open file; return the number of bytes written."""
        before = os.fstat(file).st_size
        grown = max(0, offset + len(data) - before)
        with self._added(grown):
            written = os.pwrite(file, data, offset)
        self._growth.give(grown - max(0, offset + written - before))
        return written

    def resize(self, file: int, size: int) -> None:
        """Truncate an open file, or extend it with zeros."""
        before = os.fstat(file).st_size
        with self._added(max(0, size - before)):
            os.ftruncate(file, size)
        self._growth.give(max(0, before - size))

    def set_mode(self, segments: list[str], mode: int) -> None:
        """Change permissions; neither group nor others get write permission."""
        self._may_change(segments)
        if not segments:
            os.fchmod(self.root, folder_mode(mode))
            return
        with self._above(segments) as (parent, name):
            status = shown(parent, name)
            if stat.S_ISLNK(status.st_mode):
                raise error(errno.EOPNOTSUPP)
            # fchmodat(2) follows links, and a link may have replaced the file since the check
            with reading(parent, name) as file:
                self._check_owned(file, segments)
                folder = stat.S_ISDIR(os.fstat(file).st_mode)
                os.fchmod(file, folder_mode(mode) if folder else file_mode(mode))

    def set_times(self, segments: list[str], accessed: int | None, modified: int | None) -> None:
        """Set access and modification time, in nanoseconds since 1970; ``None``: unchanged."""
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
        """Create a directory."""
        self._may_change(segments)
        with self._above(segments) as (parent, name), self._added(NEW_ENTRY):
            os.mkdir(name, folder_mode(mode), dir_fd=parent)

    def make_link(self, segments: list[str], target: bytes) -> None:
        """Create a symbolic link to a path within the directory.

        Raises:
            OSError: The link would lead out of the directory, or cannot be created.
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
        """Create a hard link to a file that has no names outside the directory."""
        self._may_change(segments)
        self._may_change(new)
        with (
            self.lock,
            self._above(segments) as (parent, name),
            self._above(new) as (new_parent, new_name),
        ):
            status = shown(parent, name)
            if not stat.S_ISREG(status.st_mode) or not self.only_here(status, segments):
                raise error(errno.EPERM)  # a symbolic link would lead to another target from the new place
            with self._added(NEW_ENTRY):
                os.link(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent, follow_symlinks=False)
            self._names.add(identity(status), segments, new)

    def remove(self, segments: list[str], *, folder: bool) -> os.stat_result:
        """Remove a file, a link or an empty directory; return its last status."""
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
        """Rename a file, directory or link; return the status of the file that it replaced, if any."""
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
        """Return the bytes of a deleted file, without names or open handles, to the growth budget."""
        self._growth.give(size)

    def _set_link_times(self, parent: int, name: str, times: tuple[int, int]) -> None:
        with self.lock:  # a link can only be changed by name, so nothing else may take that name
            if shown(parent, name).st_nlink > 1:
                raise error(errno.EPERM)
            os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _check_owned(self, file: int, segments: list[str]) -> None:
        """Check that an open file may be changed, as another file may have taken its name."""
        status = os.fstat(file)
        if stat.S_ISREG(status.st_mode) and not self.only_here(status, segments):
            raise error(errno.ESTALE)

    def _check_move(self, segments: list[str], new: list[str]) -> None:
        """Reject a move after which a link or directory would lead out of the mounted directory."""
        with _as_error(errno.EXDEV):  # so that mv(1) falls back to copying
            reach = Reach(self.root, (segments, new))
            reach.check(new)
            self._check_rise(reach)

    def _check_rise(self, reach: Reach) -> None:
        """Reject a link that leads upwards if a link of the host has ``..`` after a name.

        That name could be the rejected link, and ``..`` would then lead higher than before.
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
            wanted = os.O_RDONLY  # a file that is open for writing cannot be executed (ETXTBSY)
        return regular(os.open(name, wanted | ALWAYS, dir_fd=parent))

    def _copied(self, parent: int, name: str, file: int, size: int) -> int:
        """Replace an open file by a copy; return the copy's descriptor."""
        before = _version(os.fstat(file))
        temporary = f".microvm-{secrets.token_hex(8)}"
        copy = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | ALWAYS, 0o600, dir_fd=parent)
        try:
            hard_links.copy(file, copy, size)
            with self.lock:
                check_same(parent, {name: file, temporary: copy})
                if _version(os.fstat(file)) != before:
                    raise error(errno.EBUSY)  # noqa: TRY301 - the copy is removed below
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            os.close(copy)
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=parent)
            raise
        return copy

    # Paths

    @contextlib.contextmanager
    def _inside(self, segments: list[str]) -> Iterator[int]:
        """Open a directory without following links."""
        with folder_below(self.root, segments) as folder:
            if folder is None:
                raise error(errno.ENOENT)
            yield folder

    @contextlib.contextmanager
    def _above(self, segments: list[str]) -> Iterator[tuple[int, str]]:
        """Open a path's parent directory; yield its descriptor and the path's last segment."""
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
        """Charge ``size`` bytes to the growth budget; return them if the block fails."""
        self._growth.take(size)
        try:
            yield
        except BaseException:
            self._growth.give(size)
            raise


@contextlib.contextmanager
def _as_error(number: int) -> Iterator[None]:
    """Convert :class:`TooLarge` to the OSError with this number."""
    try:
        yield
    except TooLarge:
        raise error(number) from None


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
