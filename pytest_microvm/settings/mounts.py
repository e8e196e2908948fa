"""Mounts: host directories (or files) made available in a machine, and the text form that specifies them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, cast

from pytest_microvm.errors import UsageError

Access = Literal["ro", "rw"]
Kind = Literal["copy", "live", "git"]

ACCESSES = ("ro", "rw")
KINDS = ("copy", "live", "git")

_FORM = 'write it as "SOURCE:/TARGET", with ":ro" or ":rw", ":copy", ":live" or ":git" behind'
_KERNELS_OWN = tuple(PurePosixPath(path) for path in ("/proc", "/sys", "/dev"))
_MAX_PATH = 4096  # bytes: Linux's PATH_MAX


@dataclass(frozen=True)
class Mount:
    """A host directory mounted at a path in a machine.

    Args:
        source: Absolute path on the host: a directory, a file or a git working tree.
        target: Absolute path in the machine.
        access: ``ro``: nothing is copied back; ``rw``: the machine's changes are copied back.
        kind: ``copy``: the content is copied in, and changes are copied back; ``live``: shared while the
            machine runs; ``git``: the machine gets a clone, and its commits come back as a branch.
        owner: The user of the machine to whom everything in it belongs there, by name or number, as for
            commands; ``None``: root.
    """

    source: Path
    target: PurePosixPath
    access: Access = "rw"
    kind: Kind = "copy"
    owner: str | int | None = None

    def __post_init__(self) -> None:
        _check_target(self.target, str(self))

    def __str__(self) -> str:
        return f"{self.source}:{self.target}:{self.access}:{self.kind}"


@dataclass(frozen=True)
class Changes:
    """Changes copied back from a mount. The names are untrusted: the machine chose them.

    Args:
        created: New files, directories and links, relative to the mounted directory.
        changed: Entries that were replaced, or whose permissions changed.
        deleted: Entries that were removed.
        left: Changes to git's own files, which are never copied back.
        branch: The host branch that holds the machine's commits; ``None``: the machine made none.
        commits: Number of commits that the machine made.
        subjects: Subject lines of the newest commits, made safe to show.
        uncommitted: Number of uncommitted changes in the machine; they were lost.
        links: New links that lead out of the directory; they stay in the machine.
    """

    created: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    branch: str | None = None
    commits: int = 0
    subjects: tuple[str, ...] = ()
    uncommitted: int = 0
    links: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = {"created": self.created, "changed": self.changed, "deleted": self.deleted}
        parts = [f"{len(paths)} {what}" for what, paths in counts.items() if paths]
        if self.branch:
            parts.append(f"branch {self.branch} ({self.commits} commit{'' if self.commits == 1 else 's'})")
        if self.uncommitted:
            parts.append(f"{self.uncommitted} not committed in the machine, and not copied back")
        if self.links:
            parts.append(f"{len(self.links)} links that lead out left in the machine")
        return ", ".join(parts) or "no changes"


def parse_mount(value: object, where: str, folder: Path) -> Mount:
    """Parse a mount written as ``SOURCE:/TARGET[:ro|rw][:copy|live|git]``.

    The defaults are ``rw`` and ``copy``. A path that contains a colon can only be given to
    :meth:`pytest_microvm.MicroVM.mount`.

    Args:
        value: The text to parse.
        where: The place that ``value`` comes from, for errors.
        folder: The base of a relative source; ``~`` is the user's home.

    Raises:
        UsageError: The text has another form, or its target cannot be mounted in any machine.
    """
    parts = value.split(":") if isinstance(value, str) else []
    if not 2 <= len(parts) <= 4:  # noqa: PLR2004 - source, target, access, kind
        raise UsageError(
            f"{where}: invalid mount: expected a source and a target, got {value!r}", resolution=_FORM
        )
    source, target, *words = parts
    _check_source(source, f"{where}: {value!r}")
    if not target.startswith("/"):
        raise UsageError(
            f"{where}: {value!r}: invalid target: expected an absolute path, got {target!r}", resolution=_FORM
        )
    access, kind = _words(words, f"{where}: {value!r}")
    place = PurePosixPath("/" + target.lstrip("/"))  # POSIX leaves the meaning of a leading // open
    _check_target(place, f"{where}: {value!r}")
    return Mount(absolute(source, folder), place, access, kind)


def parse_mounts(value: object, where: str, folder: Path) -> tuple[Mount, ...]:
    """Parse a list of mounts; see :func:`parse_mount`.

    Raises:
        UsageError: The value is not a list of mounts, or the targets of two mounts are equal or nested.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UsageError(
            f"{where}: invalid mounts: expected a list, got {value!r}",
            resolution='write it like ["data:/data:ro"]',
        )
    mounts = tuple(
        entry if isinstance(entry, Mount) else parse_mount(entry, where, folder) for entry in value
    )
    check_apart(mounts, where)
    return mounts


def check_apart(mounts: Sequence[Mount], where: str) -> None:
    """Check that no two mounts have equal or nested targets in the machine.

    Raises:
        UsageError: Two targets are equal or nested.
    """
    for number, mount in enumerate(mounts):
        for other in mounts[:number]:
            if mount.target.is_relative_to(other.target) or other.target.is_relative_to(mount.target):
                raise UsageError(
                    f"{where}: invalid targets: expected separate directories, got {other.target} and "
                    f"{mount.target}",
                    resolution="mount them beside each other",
                )


def absolute(source: str | Path, folder: Path) -> Path:
    """Return ``source`` as an absolute path, without resolving links."""
    try:
        expanded = Path(source).expanduser()
    except RuntimeError as error:  # ~user names a user unknown to this computer
        raise UsageError(
            f"invalid source of a mount: expected a path, got {str(source)!r} ({error})",
            resolution="write the path out",
        ) from error
    return (folder / expanded).absolute()


def _words(words: list[str], what: str) -> tuple[Access, Kind]:
    accesses = [word for word in words if word in ACCESSES]
    kinds = [word for word in words if word in KINDS]
    unknown = [word for word in words if word not in (*ACCESSES, *KINDS)]
    if unknown:
        raise UsageError(
            f"{what}: unknown word {unknown[0]!r}", resolution="known: " + ", ".join((*ACCESSES, *KINDS))
        )
    if len(accesses) > 1 or len(kinds) > 1:
        raise UsageError(
            f"{what}: invalid words: expected one access and one kind, got {':'.join(words)}",
            resolution=_FORM,
        )
    return cast(Access, accesses[0] if accesses else "rw"), cast(Kind, kinds[0] if kinds else "copy")


def _check_source(source: str, what: str) -> None:
    if not source.strip() or not source.isprintable():
        raise UsageError(f"{what}: invalid source: expected a path, got {source!r}", resolution=_FORM)
    if "\\" in source:
        raise UsageError(
            f"{what}: invalid source: expected a path without backslashes, got {source!r}",
            resolution="write paths with /",
        )


def _check_target(target: PurePosixPath, what: str) -> None:
    text = str(target)
    if target.root != "/" or ".." in target.parts or not text.isprintable():
        raise UsageError(
            f"{what}: invalid target: expected an absolute path without .., got {text!r}",
            resolution="write it like /data",
        )
    if len(text.encode("utf-8", "surrogateescape")) >= _MAX_PATH:
        raise UsageError(
            f"{what}: invalid target: expected less than {_MAX_PATH} bytes, got a longer path",
            resolution="mount it at a shorter path",
        )
    if len(target.parts) == 1 or any(target.is_relative_to(own) for own in _KERNELS_OWN):
        raise UsageError(
            f"{what}: invalid target: expected a directory that is not the system's own, got {text}",
            resolution="choose a directory of its own, such as /data",
        )
