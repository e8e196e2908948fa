"""Paths in a machine, used like :class:`pathlib.Path`."""

from __future__ import annotations

import contextlib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pytest_microvm.agent.answers import Answer
from pytest_microvm.agent.link import GuestError
from pytest_microvm.agent.transfer import KINDS, TIMEOUT, as_os_error, read_file, write_file
from pytest_microvm.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_microvm.agent.client import AgentClient

MAX_READ = 256 * 1024**2
"""Bytes that ``read_text`` and ``read_bytes`` return at most."""


class GuestPath:
    """A path in a machine; the methods are those of :class:`pathlib.Path` with the same names.

    Pure parts (``name``, ``parent``, ``suffix``, ``/``) need no machine; the others ask it, and raise
    the same ``OSError`` as on the host, marked "in the machine".
    """

    def __init__(self, client: AgentClient, *segments: str | PurePosixPath) -> None:
        self._client = client
        self.pure = PurePosixPath("/", *map(str, segments))

    def __str__(self) -> str:
        return str(self.pure)

    def __repr__(self) -> str:
        return f"GuestPath({self._client.id!r}, {str(self.pure)!r})"

    def __fspath__(self) -> str:
        raise TypeError(f"{self.pure} is in a machine, not on the host: use pull()")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuestPath) and (self._client.id, self.pure) == (other._client.id, other.pure)

    def __hash__(self) -> int:
        return hash((self._client.id, self.pure))

    def __truediv__(self, segment: str | PurePosixPath) -> GuestPath:
        return GuestPath(self._client, self.pure / segment)

    @property
    def name(self) -> str:
        """The last segment."""
        return self.pure.name

    @property
    def suffix(self) -> str:
        """The last segment's ending, with its dot."""
        return self.pure.suffix

    @property
    def parent(self) -> GuestPath:
        """The folder it is in."""
        return GuestPath(self._client, self.pure.parent)

    # Content

    def read_bytes(self) -> bytes:
        """Return its content (at most :data:`MAX_READ` bytes)."""
        with self._client.explained():
            return read_file(self._client.link(), str(self.pure), MAX_READ)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return its content as text."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes) -> int:
        """Write ``data`` as its content and return how many bytes that was."""
        with self._client.explained():
            write_file(self._client.link(), str(self.pure), data)
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        """Write ``text`` as its content and return how many characters that was."""
        self.write_bytes(text.encode(encoding))
        return len(text)

    # What it is

    def exists(self) -> bool:
        """Whether there is something."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether it is a file (links followed)."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether it is a folder (links followed)."""
        return self._kind() == "directory"

    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return self._kind(follow=False) == "symlink"

    def stat(self) -> dict[str, Any]:
        """Return ``mode``, ``size`` (bytes), ``uid``, ``gid``, ``mtime`` (seconds since 1970), ``kind``."""
        answer = self._ask("stat")
        return {
            **{name: answer.whole(name) for name in ("mode", "size", "uid", "gid")},
            "mtime": answer.number("mtime"),
            "kind": answer.choice("kind", KINDS),
        }

    def iterdir(self) -> Iterator[GuestPath]:
        """Yield what is in the folder, sorted by name."""
        for name in self._ask("list").names("names"):
            yield self / name

    def readlink(self) -> PurePosixPath:
        """Return where the symbolic link points."""
        return PurePosixPath(self._ask("readlink").path("target"))

    # Changes

    def mkdir(self, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Make the folder."""
        self._ask("mkdir", mode=mode, parents=parents, exist_ok=exist_ok)

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove the file."""
        self._ask("unlink", missing_ok=missing_ok)

    def rmdir(self) -> None:
        """Remove the empty folder."""
        self._ask("rmdir")

    def rmtree(self) -> None:
        """Remove the folder and everything in it."""
        self._ask("rmtree")

    def chmod(self, mode: int) -> None:
        """Set its permission bits."""
        self._ask("chmod", mode=mode)

    def symlink_to(self, target: str | PurePosixPath | GuestPath) -> None:
        """Make it a symbolic link to ``target``."""
        self._ask("symlink", target=str(target))

    def rename(self, target: str | PurePosixPath | GuestPath) -> GuestPath:
        """Give it a new name, replacing what has that name; return the new path."""
        self._ask("rename", target=str(target))
        return GuestPath(self._client, str(target))

    def _kind(self, *, follow: bool = True) -> str | None:
        with contextlib.suppress(OSError):
            return self._ask("stat", follow=follow).choice("kind", KINDS)
        return None

    def _ask(self, do: str, **options: Any) -> Answer:
        try:
            with self._client.operation(f"{do} {self.pure}"):
                link = self._client.link()
                return Answer(link, link.call("path", timeout=TIMEOUT, do=do, path=str(self.pure), **options))
        except TimeoutError as error:  # an OSError to Python, but not one of the path's
            raise MachineError(f"{self.pure}: {error}") from error
        except GuestError as error:
            raise as_os_error(error, str(self.pure)) from None
