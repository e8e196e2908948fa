"""The option ``--user``: the user that runs a command and owns the files that are copied into the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from pytest_microvm.agent.users import GuestUser
    from pytest_microvm.machine.microvm import MicroVM


def add_user_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the option to a verb."""
    parser.add_argument(
        "--user",
        metavar="NAME",
        help="user that runs it and to whom mounts belong: a name or a number, and :GROUP; made if the image "
        f"of a kit lacks it (default: {default})",
    )


class RunAs:
    """The user of a command, known once its machine has started.

    Args:
        wanted: The user's name or number; ``None``: root.
        create: Whether to make the user if the image lacks it.
        say: Called with a line if it was made.

    Attributes:
        user: The user in the machine; ``None``: root, or the machine has not started yet.
    """

    def __init__(self, wanted: str | None, say: Callable[[str], Any], *, create: bool) -> None:
        self.user: GuestUser | None = None
        self._wanted = wanted
        self._say = say
        self._create = create

    def __call__(self, machine: MicroVM) -> GuestUser | None:
        """Find or make the user; to be called before the machine gets its mounts.

        Raises:
            UsageError: There is no such user.
        """
        if self._wanted is not None:
            self.user = machine.user(self._wanted, create=self._create)
            if self.user.created:
                self._say(f"the image has no user {self._wanted}: made {self.user}")
        return self.user

    @property
    def numbers(self) -> str | None:
        """The owner of files that are copied into the machine, as numbers."""
        return None if self.user is None else self.user.numbers
