"""The interface of a machine that mounts use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from pathlib import PurePosixPath

    from pytest_microvm.agent.client import AgentClient
    from pytest_microvm.agent.path import GuestPath
    from pytest_microvm.network.port.service import MachineNetwork
    from pytest_microvm.settings.spec import Limits


class Facts(Protocol):
    """Properties of a machine, fixed at its start."""

    @property
    def image(self) -> str:
        """The image's name."""

    @property
    def limits(self) -> Limits:
        """The machine's resource limits."""


class Machine(Protocol):
    """A machine into which directories of the host are mounted."""

    @property
    def client(self) -> AgentClient:
        """The link to the machine's agent, with the rules for its use."""

    @property
    def facts(self) -> Facts:
        """Properties fixed at the machine's start."""

    @property
    def alive(self) -> bool:
        """True while the machine is running."""

    @property
    def closed(self) -> bool:
        """True if the user has closed the machine."""

    @property
    def mounts(self) -> list[Any]:
        """The machine's mounts; a mount that is closed removes itself from this list."""

    @property
    def network(self) -> MachineNetwork:
        """The machine's network, which carries live mounts."""

    def run(
        self, args: str | Sequence[str | PurePosixPath], *, user: str | int | None = None
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command, as root if no user is named, and return its result."""

    def path(self, *segments: str | PurePosixPath) -> GuestPath:
        """Return a path in the machine."""
