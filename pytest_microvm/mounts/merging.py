"""Merge a machine's changes into a directory of the host, except where the host changed it too.

Three versions are compared: the one handed to the machine, the machine's current one (received into a
private staging directory), and the host's at the moment of the change. New files are put in place by
link(2), which fails if the name exists; changed files by rename(2).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from pytest_microvm.untrusted.manifest import Difference, Entry, Manifest, differences, is_git, look
from pytest_microvm.untrusted.nofollow import FOLDER_FLAGS, folder_below, open_file

_MAX_NAME = 255  # bytes; NAME_MAX of Linux
_MAX_COPIES = 1000
_PRIVATE = 0o700
_CHANGED_HERE = "it was changed on the host meanwhile"
_NEW_HERE = "something of that name was made on the host meanwhile"
_GONE_HERE = "it was removed on the host meanwhile"


class Conflict(NamedTuple):
    """A change that was not applied.

    Args:
        path: The path, relative to the directory.
        why: The reason, for people.
        saved: The path of the machine's version on the host; ``None`` if there is none.
    """

    path: str
    why: str
    saved: str | None = None


class _FileStatus(NamedTuple):
    """The part of a file's status that reveals changes (all but the access time)."""

    device: int
    inode: int
    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    uid: int
    gid: int


@dataclass
class Result:
    """Changes that were applied and that were not, as paths relative to the directory.

    ``links`` holds new links that lead out of the directory; nothing of the host is affected.
    ``unsaved`` holds the conflicts whose machine version exists only in the machine.
    """

    created: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    links: list[Conflict] = field(default_factory=list)
    unsaved: set[str] = field(default_factory=set)


class TakeOver:
    """One merge of a machine's changes.

    Args:
        root: Descriptor of the host's directory.
        content: Descriptor of the staging directory with the machine's current version.
        spare: Descriptor of another staging directory, empty.
        suffix: Suffix for the name of the machine's version in a conflict.
    """

    def __init__(self, root: int, content: int, spare: int, suffix: str) -> None:
        self.result = Result()
        self._root = root
        self._content = content
        self._spare = spare
        self._suffix = suffix
        self._blocked: set[str] = set()  # paths that, with everything below, are skipped from now on
        self._cleared: set[str] = set()  # paths where a file of another type was removed
        self._beside: dict[str, str] = {}  # directories missing on the host -> their substitutes

    def run(self, before: Manifest, after: Manifest, left_out: dict[str, str]) -> Result:
        """Apply the differences between ``before`` and ``after``, except the paths in ``left_out``."""
        self._blocked.update(left_out)
        self.result.conflicts += [Conflict(path, why) for path, why in sorted(left_out.items())]
        wanted = []
        for difference in differences(before, after):
            if is_git(difference.path):
                self.result.left.append(difference.path)
            elif not self._is_blocked(difference.path):
                wanted.append(difference)
        for difference in reversed(wanted):  # a directory's content before the directory
            if difference.before is not None and not _replaceable(difference):
                self._try(self._remove, difference)
        for difference in wanted:
            if difference.after is not None and not self._is_blocked(difference.path):
                self._try(self._put, difference)
        return self.result

    def _try(self, do: Callable[[Difference], None], difference: Difference) -> None:
        """Apply one difference; record a conflict if the host cannot, so that the others go on."""
        try:
            do(difference)
        except OSError as error:
            self._conflict(difference, f"the host cannot change it: {error.strerror}")

    def _is_blocked(self, path: str) -> bool:
        return is_below(path, self._blocked)

    # Removing

    def _remove(self, difference: Difference) -> None:
        segments = difference.path.split("/")
        with folder_below(self._root, segments[:-1]) as parent:
            there, status = _see(parent, segments[-1])
            if there is None:
                if difference.after is not None:
                    self._conflict(difference, _GONE_HERE)
            elif parent is None or there != difference.before:
                self._conflict(difference, _CHANGED_HERE)
            elif there.kind == "folder":
                self._remove_folder(difference, parent, segments[-1])
            elif _status(parent, segments[-1]) != status:
                self._conflict(difference, _CHANGED_HERE)
            else:
                os.unlink(segments[-1], dir_fd=parent)
                self._removed(difference)

    def _remove_folder(self, difference: Difference, parent: int, name: str) -> None:
        try:
            os.rmdir(name, dir_fd=parent)
        except OSError:
            below = difference.path + "/"
            if difference.after is not None or not any(
                conflict.path.startswith(below) for conflict in self.result.conflicts
            ):
                self._conflict(difference, "it is not empty on the host")
        else:
            self._removed(difference)

    def _removed(self, difference: Difference) -> None:
        if difference.after is None:
            self.result.deleted.append(difference.path)
        else:
            self._cleared.add(difference.path)

    # Putting in place

    def _put(self, difference: Difference) -> None:
        path, after = difference.path, difference.after
        assert after is not None, "only what is there is put"
        expected = None if path in self._cleared else difference.before
        *above, name = path.split("/")
        with folder_below(self._root, above) as parent:
            there, status = _see(parent, name)
            if parent is None:
                self._conflict(difference, "its directory was removed on the host meanwhile")
            elif there == after or (there and there.kind == after.kind == "folder" and there != expected):
                pass  # both sides did the same; a directory keeps the host's permissions
            elif there != expected:
                why = _GONE_HERE if there is None else _NEW_HERE if expected is None else _CHANGED_HERE
                self._conflict(difference, why)
            elif after.kind == "folder":
                self._put_folder(difference, parent, name)
            elif _status(parent, name) != status:
                self._conflict(difference, _CHANGED_HERE)
            else:
                self._put_content(difference, parent, name, status)

    def _put_folder(self, difference: Difference, parent: int, name: str) -> None:
        assert difference.after is not None, "only what is there is put"
        if difference.before is None or difference.path in self._cleared:
            os.mkdir(name, _PRIVATE, dir_fd=parent)
            self.result.created.append(difference.path)
        else:
            self.result.changed.append(difference.path)
        folder = os.open(name, FOLDER_FLAGS, dir_fd=parent)
        try:
            os.fchmod(folder, difference.after.mode)
        finally:
            os.close(folder)

    def _put_content(
        self, difference: Difference, parent: int, name: str, status: _FileStatus | None
    ) -> None:
        """Put a file or a link in place atomically."""
        before, after = difference.before, difference.after
        if status is None:
            try:
                self._move(difference.path, parent, partial(_link_or_move, parent=parent, name=name))
            except FileExistsError:
                self._conflict(difference, _NEW_HERE)
                return
            self.result.created.append(difference.path)
            return
        keep = bool(before and after and before.mode == after.mode and before.kind == after.kind == "file")

        def exchange(folder: int, received: str) -> None:
            _take_rights(folder, received, status, rights=keep)
            os.rename(received, name, src_dir_fd=folder, dst_dir_fd=parent)

        self._move(difference.path, parent, exchange)
        self.result.changed.append(difference.path)

    def _move(self, path: str, parent: int, put: Callable[[int, str], None]) -> None:
        """Call ``put(folder, name)`` to move the machine's version of ``path`` from staging to ``parent``.

        A file with several names (hard links) is copied, so that a change under one name does not show under
        another. So is a file that goes to another file system, which may be mounted within the directory.
        """
        *above, name = path.split("/")
        with folder_below(self._content, above) as folder:
            assert folder is not None, "nobody else can enter staging"
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                with _copied(folder, name, self._spare) as copy:
                    _move_or_copy(self._spare, copy, parent, put)
            else:
                _move_or_copy(folder, name, parent, put)

    # Conflicts

    def _conflict(self, difference: Difference, why: str) -> None:
        """Record a conflict: keep the host's version and store the machine's beside it."""
        saved = None
        if difference.after is not None:
            try:
                saved = self._save(difference.path)
            except OSError as error:
                self.result.unsaved.add(difference.path)
                why += f"; the machine's version could not be put beside it: {error.strerror}"
        self._blocked.add(difference.path)
        self.result.conflicts.append(Conflict(difference.path, why, saved))

    def _save(self, path: str) -> str:
        """Store the machine's version of ``path``, including a directory's content; return its new path."""
        *above, name = path.split("/")
        depth = self._depth(above)
        with folder_below(self._root, above[:depth]) as parent:
            if parent is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if depth < len(above):
                return self._save_in(parent, depth, [*above, name])
            new = _new_name(parent, name, self._suffix)
            self._move(path, parent, partial(_link_or_move, parent=parent, name=new))
            return "/".join([*above, new])

    def _depth(self, segments: list[str]) -> int:
        """Return the number of leading directories of a path that still exist on the host."""
        for depth in range(len(segments)):
            with folder_below(self._root, segments[: depth + 1]) as folder:
                if folder is None:
                    return depth
        return len(segments)

    def _save_in(self, parent: int, depth: int, segments: list[str]) -> str:
        """Save a path of which only ``depth`` directories exist, in a substitute for the next directory."""
        gone = "/".join(segments[: depth + 1])
        if gone not in self._beside:
            self._beside[gone] = _new_name(parent, segments[depth], self._suffix)
            os.mkdir(self._beside[gone], _PRIVATE, dir_fd=parent)
        here = os.open(self._beside[gone], FOLDER_FLAGS, dir_fd=parent)
        try:
            for segment in segments[depth + 1 : -1]:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(segment, _PRIVATE, dir_fd=here)
                below = os.open(segment, FOLDER_FLAGS, dir_fd=here)
                os.close(here)
                here = below
            self._move("/".join(segments), here, partial(_link_or_move, parent=here, name=segments[-1]))
        finally:
            os.close(here)
        return "/".join([*segments[:depth], self._beside[gone], *segments[depth + 1 :]])


def is_below(path: str, places: Collection[str]) -> bool:
    """Return True if ``path`` equals one of ``places`` or lies below one."""
    while path and places:
        if path in places:
            return True
        path = path.rpartition("/")[0]
    return False


def _replaceable(difference: Difference) -> bool:
    """Return True if rename(2) can replace the old version by the new one: both or neither are folders."""
    before, after = difference.before, difference.after
    return bool(before and after and (before.kind == "folder") == (after.kind == "folder"))


def _see(parent: int | None, name: str) -> tuple[Entry | None, _FileStatus | None]:
    """Return the entry ``name`` and its status, which is read before the entry."""
    if parent is None:
        return None, None
    status = _status(parent, name)
    return look(parent, name), status


def _status(parent: int, name: str) -> _FileStatus | None:
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return _FileStatus(
        status.st_dev, status.st_ino, status.st_mode, status.st_size,
        status.st_mtime_ns, status.st_ctime_ns, status.st_uid, status.st_gid,
    )  # fmt: skip


def _link_or_move(folder: int, received: str, parent: int, name: str) -> None:
    """Move a received file to ``name`` in ``parent`` without replacing anything.

    Raises:
        FileExistsError: The name exists.
    """
    try:
        os.link(received, name, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a directory, or a file system without hard links
        if _status(parent, name) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None
        os.rename(received, name, src_dir_fd=folder, dst_dir_fd=parent)
    else:
        os.unlink(received, dir_fd=folder)


def _move_or_copy(folder: int, name: str, parent: int, put: Callable[[int, str], None]) -> None:
    """Let ``put`` move a file to ``parent``; if that is another file system, copy it there first."""
    try:
        put(folder, name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with _copied(folder, name, parent) as copy:
            put(parent, copy)


def _take_rights(folder: int, name: str, status: _FileStatus, *, rights: bool) -> None:
    """Give a received file the owner and, if ``rights``, the permissions of the file it replaces."""
    if os.geteuid() == 0:
        os.chown(name, status.uid, status.gid, dir_fd=folder, follow_symlinks=False)
    if rights:
        with open_file(folder, name) as file:
            os.fchmod(file.fileno(), status.mode & 0o777)


@contextlib.contextmanager
def _copied(folder: int, name: str, target: int) -> Iterator[str]:
    """Copy a file or directory into ``target``; yield the copy's name, and remove it unless it was moved."""
    new = f".microvm-{secrets.token_hex(8)}"
    try:
        _copy(folder, name, target, new)
        yield new
    finally:
        _remove_copy(target, new)


def _copy(folder: int, name: str, target: int, new: str) -> None:
    """Copy a file, link or directory with its permissions and, for a file, its times."""
    mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(name, dir_fd=folder), new, dir_fd=target)
    elif stat.S_ISDIR(mode):
        os.mkdir(new, _PRIVATE, dir_fd=target)
        with folder_below(folder, [name]) as source, folder_below(target, [new]) as copy:
            if source is None or copy is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            for inner in _names(source):
                _copy(source, inner, copy, inner)
            os.fchmod(copy, mode & 0o777)
    else:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with (
            open_file(folder, name) as content,
            os.fdopen(os.open(new, flags, 0o600, dir_fd=target), "wb") as file,
        ):
            shutil.copyfileobj(content, file)
            file.flush()
            status = os.fstat(content.fileno())
            os.fchmod(file.fileno(), status.st_mode & 0o777)
            os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))


def _remove_copy(parent: int, name: str) -> None:
    """Remove a copy, including a directory's content, if it exists (a copy may be incomplete)."""
    status = _status(parent, name)
    if status is not None and stat.S_ISDIR(status.mode):
        with folder_below(parent, [name]) as folder:
            if folder is not None:
                for inner in _names(folder):
                    _remove_copy(folder, inner)
        os.rmdir(name, dir_fd=parent)
    elif status is not None:
        os.unlink(name, dir_fd=parent)


def _names(folder: int) -> list[str]:
    return os.listdir(folder)


def _new_name(parent: int, name: str, suffix: str) -> str:
    """Return ``name`` with ``suffix`` appended, and a number if that name exists."""
    for number in range(1, _MAX_COPIES):
        behind = suffix if number == 1 else f"{suffix}-{number}"
        new = os.fsdecode(os.fsencode(name)[: _MAX_NAME - len(behind)]) + behind
        if _status(parent, new) is None:
            return new
    raise FileExistsError(f"{name}{suffix}: too many copies")
