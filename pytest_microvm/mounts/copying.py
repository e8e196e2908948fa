"""Copy a directory or file of the host into a machine, and copy the machine's changes back."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.agent.transfer import receive_file, receive_tree, send_tar
from pytest_microvm.agent.users import GuestUser, give
from pytest_microvm.errors import MountConflict, TransferError, UsageError
from pytest_microvm.mounts.merging import Conflict, Result, TakeOver, is_below
from pytest_microvm.settings.mounts import Changes, Mount
from pytest_microvm.untrusted.extraction import LEADS_OUT, MAX_BYTES, ExtractionLimits
from pytest_microvm.untrusted.manifest import MAX_PATHS, Found, Handover, Manifest, file_mode, is_git, scan
from pytest_microvm.untrusted.nofollow import open_folder
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from pytest_microvm.agent.path import GuestPath
    from pytest_microvm.mounts.machine import Machine

_LEADS_OUT_BY_ANOTHER = "a link that leads out by way of another"
_SHOWN = 20  # paths in a message
_log = logging.getLogger("pytest_microvm")


class Copy:
    """A mount that is copied into a machine.

    Args:
        machine: The machine.
        mount: Source, target and access of the mount.

    Raises:
        UsageError: The source does not exist or cannot be mounted.
    """

    def __init__(self, machine: Machine, mount: Mount) -> None:
        self._machine = machine
        self._mount = mount
        self._source = resolved(mount)
        self._handed = Handover()
        self._left_out: dict[str, str] = {}  # already reported, path -> reason
        self.single = not self._source.is_dir()

    def hand_over(self, owner: GuestUser | None) -> None:
        """Copy the source into the machine.

        Args:
            owner: To whom it belongs there; ``None``: root.

        Raises:
            UsageError: This user may not read all of the source.
            TransferError: The machine could not store the copy.
        """
        link, target = self._machine.client.link(), self._mount.target
        root = open_folder(self._source.parent if self.single else self._source)
        try:
            if self.single:
                name = self._source.name
                found = Found(name, name, root, os.stat(name, dir_fd=root, follow_symlinks=False))
                send_tar(link, target.parent, lambda archive: self._handed.add(archive, found, target.name))
            else:
                send_tar(link, target, lambda archive: self._handed.write(archive, root))
        finally:
            os.close(root)
        if owner is not None:
            give(self._machine.client, target, owner)

    def bring_back(self) -> Changes:
        """Apply the machine's changes; see :meth:`pytest_microvm.mounts.mounting.Mounted.copy_back`."""
        with self._staging() as (root, staging):
            left_out: dict[str, str] = {}
            self._receive(staging / "content", left_out)
            result = self._take_over(root, staging, left_out)
        return self._told(result)

    @contextlib.contextmanager
    def _staging(self) -> Iterator[tuple[int, Path]]:
        """Open the host's directory, and create a private staging directory on the same file system."""
        folder = self._source.parent if self.single else self._source
        try:
            root = open_folder(folder)
        except OSError as error:
            raise TransferError(
                f"{folder} is not what it was when it was mounted: {error.strerror}",
                resolution="leave the directory where it is while a machine has it",
            ) from error
        try:
            where = folder if self.single or not _same_mount(folder, folder.parent) else folder.parent
            with tempfile.TemporaryDirectory(dir=where, prefix=".microvm-") as made:
                staging = Path(made)
                (staging / "content").mkdir()
                (staging / "spare").mkdir()
                yield root, staging
        finally:
            os.close(root)

    def _receive(self, content: Path, left_out: dict[str, str]) -> None:
        path = self._machine.path(self._mount.target)
        kind = "file" if self.single else "directory"
        if path.is_symlink() or not (path.is_file() if self.single else path.is_dir()):
            raise TransferError(
                f"{path} is no {kind} in the machine any more",
                resolution="nothing was changed on the host; let the machine leave what is mounted in place",
            )
        if self.single:
            received = content / self._source.name
            receive(self._machine, path, received)
            received.chmod(file_mode(path.stat()["mode"]))
        else:
            terms = ExtractionLimits(_room(self._machine), MAX_PATHS, self._handed.links, left_out)
            receive_tree(self._machine.client.link(), path.pure, content, terms)

    def _take_over(self, root: int, staging: Path, left_out: dict[str, str]) -> Result:
        content, spare = open_folder(staging.resolve() / "content"), open_folder(staging.resolve() / "spare")
        try:
            before, after = self._handed.manifest, scan(content)
            for path in _leading_out(staging.resolve() / "content", before, after):
                (staging / "content" / path).unlink()
                del after[path]
                left_out[path] = _LEADS_OUT_BY_ANOTHER
            for path in after:
                if is_git(path) and not is_git(path.rpartition("/")[0]):
                    remove(staging / "content" / path)  # else it would be moved along with its directory
            work = TakeOver(root, content, spare, f".microvm-{self._machine.client.id}")
            result = work.run(before, after, left_out)
        finally:
            os.close(content)
            os.close(spare)
        missed = {*left_out, *result.unsaved}  # compared with the handed-over version next time
        self._handed.manifest = {
            path: entry
            for side, below in ((after, False), (before, True))
            for path, entry in side.items()
            if is_below(path, missed) is below
        }
        told = {(path, why) for path, why in self._left_out.items() if path in left_out}
        result.conflicts = [conflict for conflict in result.conflicts if conflict[:2] not in told]
        result.links = [
            conflict
            for conflict in result.conflicts
            if conflict.why in (LEADS_OUT, _LEADS_OUT_BY_ANOTHER) and conflict.path not in before
        ]
        result.conflicts = [conflict for conflict in result.conflicts if conflict not in result.links]
        self._left_out = left_out
        return result

    def _told(self, result: Result) -> Changes:
        """Return the applied changes; log those left in the machine and raise an error for conflicts.

        Raises:
            MountConflict: Some changes were not applied.
        """
        changes = Changes(
            tuple(result.created),
            tuple(result.changed),
            tuple(result.deleted),
            tuple(result.left),
            links=tuple(link.path for link in result.links),
        )
        if result.links:
            _log.warning(
                "%s: links that lead out stay in the machine: pull what they lead to, or mount it too (%s)",
                self._mount.target,
                "; ".join(self._lines(result.links)),
            )
        if result.left:
            _log.warning(
                "%s: git's own files changed in the machine and were left there (%s ...): hand a repository "
                "over as git",
                self._mount.target,
                sanitize_line(self._machine.client.redactor.text(result.left[0])),
            )
        if result.conflicts:
            raise MountConflict(
                f"{len(result.conflicts)} of the changes to {self._mount.target} were not taken over into "
                f"{self._source}",
                tuple(conflict.path for conflict in result.conflicts),
                details="\n".join(self._lines(result.conflicts)),
                resolution="compare the two versions, and remove the one with the machine's id in its name",
            )
        return changes

    def _lines(self, conflicts: Sequence[Conflict]) -> list[str]:
        """Return conflicts as lines that are safe to show, the first of them and how many more there are."""
        lines = [self._machine.client.redactor.text(_line(*conflict)) for conflict in conflicts[:_SHOWN]]
        more = len(conflicts) - _SHOWN
        return [*lines, *([f"and {more} more"] if more > 0 else [])]


def resolved(what: Mount) -> Path:
    """Return the mount's source with links resolved; create a missing one if the mount is writable.

    Raises:
        UsageError: The source does not exist or cannot be mounted.
    """
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
        raise UsageError(
            f"invalid source of a mount: expected a directory or a file, got {what.source}",
            resolution="mount a directory or a file",
        )
    if what.access == "rw" and is_git(str(source)):
        raise UsageError(
            f"{source} is git's own: what a machine wrote there, git would run",
            resolution="hand the repository over as git",
        )
    return source


def receive(machine: Machine, path: GuestPath, target: Path) -> None:
    """Copy a machine's file into a new file of the host.

    Raises:
        FileNotFoundError: The machine has no such path.
        TransferError: The path is no file, or the file is larger than the machine's disk and memory.
    """
    room = _room(machine)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not path.is_file() or path.stat()["size"] > room:  # else all bytes up to the limit are received first
        raise TransferError(f"{path} is no file in the machine, or one of more than {room} bytes")
    with target.open("wb") as file:
        receive_file(machine.client.link(), path.pure, file, room)


def _room(machine: Machine) -> int:
    """Return the maximum bytes a machine can hold: disk plus memory; only a sparse file is larger."""
    return min(MAX_BYTES, machine.facts.limits.disk + machine.facts.limits.memory)


def _same_mount(one: Path, other: Path) -> bool:
    """Return True if rename(2) can move files from ``one`` to ``other``, which must be writable."""
    if not os.access(other, os.W_OK | os.X_OK):
        return False
    return _mount_id(one) == _mount_id(other)


def _mount_id(path: Path) -> str:
    """Return the ID of the mount at ``path``; one device may have several mounts (proc(5), fdinfo)."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        facts = Path(f"/proc/self/fdinfo/{folder}").read_text(encoding="ascii").splitlines()
        return next(line for line in facts if line.startswith("mnt_id:"))
    except OSError:
        return str(os.fstat(folder).st_dev)
    finally:
        os.close(folder)


def _leading_out(content: Path, before: Manifest, after: Manifest) -> list[str]:
    """Return the machine's new links that lead out of the directory by way of the host's own links."""
    return [
        path
        for path, entry in after.items()
        if entry.kind == "link"
        and before.get(path) != entry
        and not Path(os.path.realpath(content / path)).is_relative_to(content)
    ]


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _line(path: str, why: str, saved: str | None) -> str:
    line = f"{sanitize_line(path, 200)}: {why}"
    return line if saved is None else f"{line}; the machine's version: {sanitize_line(saved, 300)}"
