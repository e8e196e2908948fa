"""What mounts need of a machine."""

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
    """What is known of a machine from its start."""

    @property
    def image(self) -> str:
        """Its image's name."""

    @property
    def limits(self) -> Limits:
        """What it may use."""


class Machine(Protocol):
    """A machine that directories of the host are handed to."""

    @property
    def client(self) -> AgentClient:
        """Its link to the agent, and the rules for using it."""

    @property
    def facts(self) -> Facts:
        """What is known of it."""

    @property
    def alive(self) -> bool:
        """Whether it still runs."""

    @property
    def closed(self) -> bool:
        """Whether its user has ended it."""

    @property
    def mounts(self) -> list[Any]:
        """Its mounts; one that is taken out is removed here."""

    @property
    def network(self) -> MachineNetwork:
        """Its network, which carries live mounts."""

    def run(self, args: str | Sequence[str | PurePosixPath]) -> subprocess.CompletedProcess[Any]:
        """Run a command and return what came of it."""

    def path(self, *segments: str | PurePosixPath) -> GuestPath:
        """Return a path in it."""
