"""The users of a machine: looked up by name or number, and made if a command needs one that is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_microvm.agent.answers import Answer
from pytest_microvm.agent.link import GuestError
from pytest_microvm.agent.transfer import TIMEOUT, as_os_error
from pytest_microvm.errors import UsageError
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from pathlib import PurePosixPath

    from pytest_microvm.agent.client import AgentClient

_MAX_ID = 2**32 - 2


@dataclass(frozen=True)
class GuestUser:
    """A user of a machine, as the machine describes it.

    Args:
        uid: The user's number.
        gid: The number of its group.
        name: Its name; the machine chose it.
        home: Its home folder.
        created: Whether it was made just now.
    """

    uid: int
    gid: int
    name: str
    home: str
    created: bool = False

    @property
    def numbers(self) -> str:
        """Its numbers, in the form of a command's ``user``."""
        return f"{self.uid}:{self.gid}"

    def __str__(self) -> str:
        return f"{sanitize_line(self.name, 40)} (uid {self.uid}, home {sanitize_line(self.home, 200)})"


ROOT = GuestUser(0, 0, "root", "/root")


def guest_user(client: AgentClient, wanted: str | int, *, create: bool = False) -> GuestUser:
    """Return a user of a machine.

    Args:
        client: The machine's client.
        wanted: Its name or number, and ``:GROUP``.
        create: Whether to make a user that has no entry in /etc/passwd, and a home folder that is missing.

    Raises:
        UsageError: There is no such user or group.
        MachineError: The machine failed.
    """
    try:
        with client.operation(f"user {wanted}"):
            link = client.link()
            answer = Answer(link, link.call("user", timeout=TIMEOUT, user=wanted, create=create))
    except GuestError as error:
        if error.kind != "LookupError":
            raise as_os_error(error, f"user {wanted}") from None
        raise UsageError(
            f"user {str(wanted)!r}: {error.message}",
            resolution="name a user of the image (in its /etc/passwd), or a number",
        ) from None
    return GuestUser(
        answer.whole("uid", 0, _MAX_ID),
        answer.whole("gid", 0, _MAX_ID),
        answer.path("name"),
        answer.path("home"),
        answer.flag("created"),
    )


def give(client: AgentClient, path: PurePosixPath, user: GuestUser) -> None:
    """Make a user the owner of a path in a machine and of everything below it.

    Raises:
        OSError: The machine cannot change the owner.
    """
    try:
        client.link().call("path", timeout=TIMEOUT, do="own", path=str(path), uid=user.uid, gid=user.gid)
    except GuestError as error:
        raise as_os_error(error, str(path)) from None
