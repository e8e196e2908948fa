"""This computer's own addresses: a public one, too, leads to services that may be meant for nobody else."""

from __future__ import annotations

import socket

from pytest_microvm.network.rules import Decision, Policy, Request


def decide_here(policy: Policy, request: Request, address: str) -> Decision:
    """Decide on a request once its address is known, on the computer from which it would go out.

    Args:
        policy: The rules.
        request: What is asked for.
        address: One that its name resolved to, or its host itself if that is an address.
    """
    decision = policy.decide_address(request, address)
    if decision.allowed and is_own(address) and not policy.expects(request, address):
        return Decision(False, f"{address} is this computer, and no rule names that address", None)
    return decision


def is_own(address: str) -> bool:
    """Tell whether an address is one of this computer's.

    A socket that is connected to one has it as its own address as well; nothing is sent for that.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((address, 9))
            return bool(sock.getsockname()[0] == address)
        except OSError:  # no way leads there
            return False
