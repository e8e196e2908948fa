"""Copy files that match a job's globs from its workspace to the host; all of them are untrusted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pytest_microvm.agent.transfer import receive_file
from pytest_microvm.errors import TransferError
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.settings.spec import format_size
from pytest_microvm.untrusted.text import sanitize_line

MAX_FILES = 1000
MAX_BYTES = 1024**3
_MAX_LISTED = 8 * 1024**2  # bytes of names
_TIMEOUT = 120.0
_LONGEST = 1024  # characters of a path
_WILD = re.compile(r"[*?\[]")


class Collection:
    """Copies files from a machine to the host, within limits for their number and size.

    Args:
        machine: The machine.
        workspace: The folder in the machine that globs are relative to.
        deadline: The time to give up, by :func:`time.monotonic`.

    Attributes:
        notes: Lines that name the files not copied, and the reasons; safe to display.
    """

    def __init__(self, machine: MicroVM, workspace: PurePosixPath, deadline: float) -> None:
        self.notes: list[str] = []
        self._machine = machine
        self._workspace = workspace
        self._deadline = deadline
        self._bytes = 0
        self._files = 0

    def take(self, globs: Sequence[str], folder: Path) -> list[str]:
        """Copy the files that match ``globs`` now into ``folder``; return their paths relative to it.

        Paths below the workspace are kept. The folder's old content is replaced once all files have arrived.

        Raises:
            MachineError: The machine ended; ``folder`` is unchanged.
        """
        found = sorted({path for glob in globs for path in self._listed(glob)})
        draft = folder.with_name(f"{folder.name}.new")
        _remove(draft)
        try:
            taken = [path for path in found if self._has_room() and self._taken(path, draft / path)]
            _remove(folder)
            if taken:
                draft.replace(folder)
        finally:
            _remove(draft)
        return taken

    def _has_room(self) -> bool:
        limit = ""
        if time.monotonic() > self._deadline:
            limit = "collecting took too long"
        elif self._files >= MAX_FILES or self._bytes >= MAX_BYTES:
            limit = f"more than {MAX_FILES} files or {format_size(MAX_BYTES)} match"
        if limit and (note := f"{limit}: the rest was left") not in self.notes:
            self.notes.append(note)
        return not limit

    def _taken(self, path: str, target: Path) -> bool:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._receive(path, target)
        except (OSError, TransferError) as error:
            target.unlink(missing_ok=True)
            self.notes.append(f"{sanitize_line(path)}: {sanitize_line(str(error).splitlines()[0])}")
            return False
        self._bytes += target.stat().st_size
        self._files += 1
        return True

    def _receive(self, path: str, target: Path) -> None:
        machine, room = self._machine, MAX_BYTES - self._bytes
        source = machine.path(self._workspace / path)
        with machine.client.operation("collect"):
            size = source.stat()["size"]
            if size > room:  # checked first: otherwise all bytes that fit would be sent
                raise TransferError(f"it has {size} bytes, and {room} are left")
            with target.open("xb") as file:
                receive_file(machine.client.link(), source.pure, file, room)

    def _listed(self, glob: str) -> list[str]:
        """Return the matching files, by their paths in the machine."""
        try:
            matching = glob_pattern(glob)
        except re.error as error:  # [z-a]
            self.notes.append(f"{glob!r} is no glob: {error}")
            return []
        top, depth = _where(glob)
        command = ["find", top, *depth, "-type", "f", "-print0"]
        try:
            done = self._machine.run(command, cwd=self._workspace, text=False, timeout=_TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            self.notes.append(f"{glob}: the files cannot be listed: {sanitize_line(str(error))}")
            return []
        names = (os.fsdecode(raw)[2:] for raw in done.stdout[:_MAX_LISTED].split(b"\0") if raw[:2] == b"./")
        return [name for name in names if _plain(name) and matching.fullmatch(name)]


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Compile a glob for whole paths: ``*`` and ``?`` match within a folder, ``**`` crosses folders."""
    out = []
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", glob.removeprefix("./"))
    for part in parts:
        if part == "**/":
            out.append("(?:[^/]+/)*")
        elif part == "**":
            out.append(".*")
        elif part == "*":
            out.append("[^/]*")
        elif part == "?":
            out.append("[^/]")
        elif part.startswith("[") and part.endswith("]"):
            inside = part[1:-1].replace("\\", r"\\")
            out.append(f"[^{inside[1:]}]" if inside[:1] == "!" else f"[{inside}]")
        else:
            out.append(re.escape(part))
    return re.compile("".join(out), re.DOTALL)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _where(glob: str) -> tuple[str, list[str]]:
    """Return the folder that contains all possible matches, and find(1) options for the depth to search."""
    parts = glob.removeprefix("./").split("/")
    wild = next((number for number, part in enumerate(parts) if _WILD.search(part)), len(parts))
    top = "/".join([".", *parts[:wild]])
    return top, [] if "**" in glob else ["-maxdepth", str(len(parts) - wild)]


def _plain(name: str) -> bool:
    """Return True if a relative path is safe to write on the host: it cannot leave its folder."""
    parts = name.split("/")
    return (
        0 < len(name) < _LONGEST
        and not any(part in ("", ".", "..") for part in parts)
        and not any("\ud800" <= char <= "\udfff" for char in name)
    )
