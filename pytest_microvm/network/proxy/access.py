"""What one machine may reach, and with whose credentials: what its proxy is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_microvm.network.policy.rules import Policy
    from pytest_microvm.network.proxy.authority import Authority
    from pytest_microvm.network.proxy.credentials import Credential


@dataclass(frozen=True)
class Access:
    """What one machine may reach.

    Args:
        policy: The rules.
        credentials: What the proxy adds on the way out.
        authority: The machine's own certificate authority; ``None`` where no request has to be looked into.
        hosts: Names that lead to an address (and a port, if it is another one) that the user chose; they are
            not looked up.
    """

    policy: Policy
    credentials: tuple[Credential, ...] = ()
    authority: Authority | None = None
    hosts: Mapping[str, tuple[str, int | None]] = field(default_factory=dict)
