"""Directories of the host in a machine: copied in, and what changed copied back."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_microvm.errors import MicroVMError, MountConflict, TransferError, UsageError
from pytest_microvm.extraction import MAX_BYTES, Terms
from pytest_microvm.manifest import (
    MAX_PATHS,
    Found,
    Handover,
    Manifest,
    file_mode,
    is_git,
    open_folder,
    scan,
)
from pytest_microvm.mounts import Mount
from pytest_microvm.sanitize import sanitize_line
from pytest_microvm.takeover import Result, TakeOver, is_below
from pytest_microvm.transfer import TIMEOUT, receive_file, receive_tree, send_tar

if TYPE_CHECKING:
    from typing_extensions import Self

    from pytest_microvm.machine import MicroVM

_SHOWN = 20  # paths in a message
_log = logging.getLogger("pytest_microvm")


@dataclass(frozen=True)
class Changes:
    """What came back from a machine. All names in it were chosen by the machine.

    Args:
        created: New files, directories and links, relative to the mounted directory.
        changed: Those that were replaced, or got other rights.
        deleted: Those that were removed.
        left: Changes to git's own files, which are never taken over.
    """

    created: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = [
            f"{len(paths)} {what}"
            for what, paths in vars(self).items()
            if paths and what != "left"
        ]  # fmt: skip
        return ", ".join(counts) or "no changes"


class Mounted:
    """A directory of the host that was copied into a machine.

    As a context manager it copies what changed back at the end of the ``with`` block and takes the copy
    out of the machine.

    Args:
        machine: The machine.
        mount: What is where.
        source: Where its links lead to.
        handed: What was handed over.
    """

    def __init__(self, machine: MicroVM, mount: Mount, source: Path, handed: Handover) -> None:
        self.mount = mount
        self.closed = False
        self._machine = machine
        self._source = source
        self._single = not source.is_dir()
        self._before: Manifest = handed.manifest
        self._links = handed.links

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        if kind is None or not self._machine.instance.vmm.alive:
            self._end(copy=kind is None)
            return
        try:
            self._end(copy=True)
        except MicroVMError as error:  # what ended the block is more to the point
            _log.warning("%s", error)

    def copy_back(self) -> Changes:
        """Take what the machine changed over into the host's directory.

        What changed on both sides since it was handed over (or copied back before) is left alone on the
        host; the machine's version is put beside it, with the machine's id behind its name.

        Returns:
            What was taken over; nothing if the mount is ``ro``.

        Raises:
            MountConflict: Some was not; everything else was.
            TransferError: The machine has no such directory any more, or what it sent was refused. Nothing
                was taken over.
            MachineCrashed: The machine ended. Nothing was taken over.
        """
        if self.mount.access == "ro":
            return Changes()
        what = f"copy {self.mount.target} back"
        with self._machine.explained(), self._machine.limited(what), self._staging() as (root, staging):
            left_out: dict[str, str] = {}
            self._receive(staging / "content", left_out)
            result = self._take_over(root, staging, left_out)
        return self._told(result)

    def close(self) -> None:
        """Take the copy out of the machine without copying anything back; a second call does nothing."""
        if not self.closed:
            self.forget()
            path = self._machine.path(self.mount.target)
            if self.mount.access == "ro":
                with self._machine.explained():
                    self._machine.link().call("path", timeout=TIMEOUT, do="thaw", path=str(path))
            (path.unlink if self._single else path.rmtree)()

    def forget(self) -> None:
        """Copy nothing back any more; the copy stays in the machine."""
        self.closed = True
        if self in self._machine.mounts:
            self._machine.mounts.remove(self)

    def _end(self, *, copy: bool) -> None:
        try:
            if copy and not self.closed:
                self.copy_back()
        finally:
            if not self._machine.closed and self._machine.instance.vmm.alive:
                self.close()

    @contextlib.contextmanager
    def _staging(self) -> Iterator[tuple[int, Path]]:
        """Open the host's directory, and make one on the same file system that nobody else can enter."""
        folder = self._source.parent if self._single else self._source
        try:
            root = open_folder(folder)
        except OSError as error:
            raise TransferError(
                f"{folder} is not what it was when it was mounted: {error.strerror}",
                resolution="leave the directory where it is while a machine has it",
            ) from error
        try:
            where = folder if self._single or not _same_mount(folder, folder.parent) else folder.parent
            with tempfile.TemporaryDirectory(dir=where, prefix=".microvm-") as made:
                staging = Path(made)
                (staging / "content").mkdir()
                (staging / "spare").mkdir()
                yield root, staging
        finally:
            os.close(root)

    def _receive(self, content: Path, left_out: dict[str, str]) -> None:
        path = self._machine.path(self.mount.target)
        kind = "file" if self._single else "directory"
        if path.is_symlink() or not (path.is_file() if self._single else path.is_dir()):
            raise TransferError(
                f"{path} is no {kind} in the machine any more",
                resolution="nothing was changed on the host; let the machine leave what is mounted in place",
            )
        limits = self._machine.facts.limits
        room = min(MAX_BYTES, limits.disk + limits.memory)  # more is a file full of holes
        if self._single:
            received = content / self._source.name
            with received.open("wb") as file:
                receive_file(self._machine.link(), path.pure, file, room)
            received.chmod(file_mode(path.stat()["mode"]))
        else:
            terms = Terms(room, MAX_PATHS, self._links, left_out)
            receive_tree(self._machine.link(), path.pure, content, terms)

    def _take_over(self, root: int, staging: Path, left_out: dict[str, str]) -> Result:
        content, spare = open_folder(staging.resolve() / "content"), open_folder(staging.resolve() / "spare")
        try:
            after = scan(content)
            for path in after:
                if is_git(path) and not is_git(path.rpartition("/")[0] or "-"):
                    _remove(staging / "content" / path)  # it might come along with a directory that is moved
            work = TakeOver(root, content, spare, f".microvm-{self._machine.id}")
            result = work.run(self._before, after, left_out)
        finally:
            os.close(content)
            os.close(spare)
        kept = {path: entry for path, entry in self._before.items() if is_below(path, left_out)}
        self._before = {**after, **kept}
        return result

    def _told(self, result: Result) -> Changes:
        """Return what was taken over, and say what was not."""
        changes = Changes(*map(tuple, (result.created, result.changed, result.deleted, result.left)))
        about = f"{self.mount.target}: {changes}"
        self._machine.instance.events.add("copy_back", about, conflicts=len(result.conflicts))
        if result.left:
            _log.warning(
                "%s: git's own files changed in the machine and were left there (%s ...): hand a repository "
                "over as git",
                self.mount.target,
                sanitize_line(result.left[0]),
            )
        if result.conflicts:
            lines = [_line(*conflict) for conflict in result.conflicts[:_SHOWN]]
            more = len(result.conflicts) - _SHOWN
            raise MountConflict(
                f"{len(result.conflicts)} of the changes to {self.mount.target} were not taken over into "
                f"{self._source}",
                tuple(conflict.path for conflict in result.conflicts),
                details="\n".join([*lines, *([f"and {more} more"] if more > 0 else [])]),
                resolution="compare the two versions, and remove the one with the machine's id in its name",
            )
        return changes


def mount(machine: MicroVM, what: Mount) -> Mounted:
    """Copy a directory or a file of the host into a machine.

    Raises:
        UsageError: There is no such directory, the machine has something else at that place, or this kind of
            mount is not available.
        TransferError: The machine could not take it.
    """
    if what.kind == "live":
        raise UsageError(
            f"{what.target}: a live mount is not available",
            details="machines are copies of a frozen one: their memory cannot be shared with a file server "
            "(virtiofs), and a machine with a share cannot be frozen; see docs/adr/0013-mounts.md",
            resolution="mount it as copy, and call copy_back() whenever its changes are wanted",
        )
    source = _resolved(what)
    _check_place(machine, what, single=not source.is_dir())
    handed = Handover()
    with machine.explained(), machine.limited(f"mount {what.target}"):
        if source.is_dir():
            root = open_folder(source)
            try:
                send_tar(machine.link(), what.target, lambda archive: handed.write(archive, root))
            finally:
                os.close(root)
        else:
            _send_file(machine, what.target, source, handed)
        if what.access == "ro":
            machine.link().call("path", timeout=TIMEOUT, do="freeze", path=str(what.target))
    return Mounted(machine, what, source, handed)


def copy_all_back(mounted: Sequence[Mounted]) -> list[Changes]:
    """Copy back what changed in each, all of them even if one fails.

    Raises:
        MountConflict: Some was not taken over.
        MicroVMError: One of them failed.
    """
    done: list[Changes] = []
    failed: list[MicroVMError] = []
    for one in mounted:
        try:
            done.append(one.copy_back())
        except MicroVMError as error:
            failed.append(error)
    for other in failed[1:]:
        _log.warning("%s", other)
    if failed:
        raise failed[0]
    return done


def _resolved(what: Mount) -> Path:
    """Return where the source's links lead to, made if it is missing and may be written."""
    try:
        if what.access == "rw" and not what.source.exists():
            what.source.mkdir(parents=True)
        source = what.source.resolve(strict=True)
        kind = source.stat().st_mode
    except FileNotFoundError:
        raise UsageError(f"{what.source} does not exist", resolution="check the path of the mount") from None
    except OSError as error:
        raise UsageError(f"{what.source} cannot be mounted: {error.strerror}") from error
    if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
        raise UsageError(f"{what.source} is neither a directory nor a file")
    return source


def _check_place(machine: MicroVM, what: Mount, *, single: bool) -> None:
    """Refuse a place where the machine has something: it would come back as if it had been made there."""
    place = machine.path(what.target)
    if place.is_symlink() or (place.exists() and (single or not place.is_dir() or any(place.iterdir()))):
        raise UsageError(
            f"the machine has something at {what.target} already",
            resolution="mount it at a place that is empty or missing there",
        )


def _send_file(machine: MicroVM, target: PurePosixPath, source: Path, handed: Handover) -> None:
    root = open_folder(source.parent)
    try:
        status = os.stat(source.name, dir_fd=root, follow_symlinks=False)
        found = Found(source.name, source.name, root, status)
        send_tar(machine.link(), target.parent, lambda archive: handed.add(archive, found, name=target.name))
    finally:
        os.close(root)


def _same_mount(one: Path, other: Path) -> bool:
    """Whether rename(2) can move things from one to the other, which must be writable."""
    if not os.access(other, os.W_OK | os.X_OK):
        return False
    return _mount_id(one) == _mount_id(other)


def _mount_id(path: Path) -> str:
    """Return what tells mounts apart; two of the same device may be different (proc(5), fdinfo)."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        facts = Path(f"/proc/self/fdinfo/{folder}").read_text(encoding="ascii").splitlines()
        return next(line for line in facts if line.startswith("mnt_id:"))
    except OSError:
        return str(os.fstat(folder).st_dev)
    finally:
        os.close(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _line(path: str, why: str, saved: str | None) -> str:
    line = f"{sanitize_line(path, 200)}: {why}"
    return line if saved is None else f"{line}; the machine's version: {sanitize_line(saved, 300)}"
