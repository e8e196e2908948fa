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
"""Maximum size of a file that ``read_text`` and ``read_bytes`` return, in bytes."""


class GuestPath:
    """A path in a machine, with methods named as in :class:`pathlib.Path`.

    The pure operations (``name``, ``parent``, ``suffix``, ``/``) do not contact the machine; the others
    do, and raise the same ``OSError`` as on the host, marked "in the machine".
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
        """The path's last segment."""
        return self.pure.name

    @property
    def suffix(self) -> str:
        """The last segment's file extension, including the dot."""
        return self.pure.suffix

    @property
    def parent(self) -> GuestPath:
        """The folder that contains the path."""
        return GuestPath(self._client, self.pure.parent)

    # Content

    def read_bytes(self) -> bytes:
        """Return the file's content (at most :data:`MAX_READ` bytes)."""
        with self._client.explained():
            return read_file(self._client.link(), str(self.pure), MAX_READ)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the file's content as text."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes) -> int:
        """Write ``data`` to the file and return the number of bytes written."""
        with self._client.explained():
            write_file(self._client.link(), str(self.pure), data)
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        """Write ``text`` to the file and return the number of characters written."""
        self.write_bytes(text.encode(encoding))
        return len(text)

    # Status

    def exists(self) -> bool:
        """Return True if the path exists (links followed)."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Return True if the path is a regular file (links followed)."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Return True if the path is a folder (links followed)."""
        return self._kind() == "directory"

    def is_symlink(self) -> bool:
        """Return True if the path is a symbolic link."""
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
        """Yield the paths of the folder's entries, sorted by name."""
        for name in self._ask("list").names("names"):
            yield self / name

    def readlink(self) -> PurePosixPath:
        """Return the symbolic link's target."""
        return PurePosixPath(self._ask("readlink").path("target"))

    # Changes

    def mkdir(self, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Create the folder."""
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
        """Set the permission bits."""
        self._ask("chmod", mode=mode)

    def symlink_to(self, target: str | PurePosixPath | GuestPath) -> None:
        """Create a symbolic link to ``target`` at this path."""
        self._ask("symlink", target=str(target))

    def rename(self, target: str | PurePosixPath | GuestPath) -> GuestPath:
        """Rename the file or folder to ``target``, replacing an existing one, and return the new path."""
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
        except TimeoutError as error:  # a subclass of OSError, but not about the path
            raise MachineError(f"{self.pure}: {error}") from error
        except GuestError as error:
            raise as_os_error(error, str(self.pure)) from None
