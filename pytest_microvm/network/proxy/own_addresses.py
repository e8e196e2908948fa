"""Addresses of this computer and its links: public ones, too, have services that are not meant for everybody.

The kernel is asked for its route each time, so policy routing counts, and a network that came up since.
"""

from __future__ import annotations

from ipaddress import ip_network

from pytest_microvm.network.policy.addresses import (
    Address,
    AddressNetwork,
    parse_address,
    readings,
    special_range,
)
from pytest_microvm.network.policy.rules import Decision, Policy, Request
from pytest_microvm.network.proxy.routes import is_neighbour, route_to

_INTERNET = {4: 8, 6: 16}
"""Shorter prefixes are no network of anybody's: such a route without a router is a tunnel to the internet."""


def decide_here(policy: Policy, request: Request, address: str) -> Decision:
    """Decide on a request once its address is known, on the computer from which it would go out.

    Args:
        policy: The rules.
        request: What is asked for.
        address: One that its name resolved to, or its host itself if that is an address.
    """
    decision = policy.decide_address(request, address)
    if not decision.allowed:
        return decision
    try:
        own = own_network(parse_address(address))
    except OSError as error:
        if policy.expects(request, address, ip_network(parse_address(address))):
            return decision
        why = f"the kernel cannot be asked whether {address} is on this computer's network ({error})"
        return Decision(False, why, None)
    if own is None or policy.expects(request, address, own):
        return decision
    if own.num_addresses == 1:
        return Decision(False, f"{address} is this computer or a neighbour, and no rule names it", None)
    return Decision(False, f"{address} is on this computer's link ({own}), and no rule names it", None)


def own_network(address: Address) -> AddressNetwork | None:
    """Return the network in which a rule must name an address: it is this computer's, or on its links.

    That is the address alone if it is one of this computer's, a router's or a neighbour's, or stands for
    another address (NAT64, 6to4, ...) which is any of that; else what a route without a router has as its
    destination. ``None`` if packets to it go through a router, or it is not public, and so judged already.

    Raises:
        OSError: The kernel cannot be asked.
    """
    if special_range(address) is not None:
        return None
    found, *inner = (_network_of(reading) for reading in readings(address))
    return ip_network(address) if found is None and any(inner) else found


def _network_of(address: Address) -> AddressNetwork | None:
    route = route_to(address)
    if route is None:
        return None
    if route.is_local or address in route.gateways:
        return ip_network(address)
    if None in route.gateways:
        return route.network if route.network.prefixlen >= _INTERNET[address.version] else None
    known = any(is_neighbour(address, device) for device in route.devices)
    return ip_network(address) if known else None
