"""The network access of one machine: policy, credentials and authority, from which its proxy is built."""

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
    """The network access of one machine.

    Args:
        policy: The rules.
        credentials: Credentials that the proxy adds to outgoing requests.
        authority: The machine's own certificate authority; ``None`` if no TLS has to be inspected.
        hosts: Names that the user mapped to an address, and to a port if it differs; the proxy does not
            resolve them.
    """

    policy: Policy
    credentials: tuple[Credential, ...] = ()
    authority: Authority | None = None
    hosts: Mapping[str, tuple[str, int | None]] = field(default_factory=dict)
