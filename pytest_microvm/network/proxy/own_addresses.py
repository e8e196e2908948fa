"""Protect addresses of this computer and its links: even public ones may run services that are not public.

The kernel is queried for the route each time, which covers policy routing and networks that came up later.
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
"""Minimum prefix length of a local network; a wider route without a router is a tunnel to the internet."""


def decide_here(policy: Policy, request: Request, address: str) -> Decision:
    """Decide on a request with its resolved address, considering this computer's own networks.

    Args:
        policy: The rules.
        request: The request.
        address: An address that its name resolved to, or its host itself if that is an address.
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
    """Return the local network of an address, inside which a rule must name it; ``None`` if not local.

    That is the address alone if it belongs to this computer, a router or a neighbour, or embeds an address
    (NAT64, 6to4, ...) that is local; else the destination of a route without a router. It is ``None`` if
    packets go through a router, or if the address is not public, which the policy has already checked.

    Raises:
        OSError: The kernel cannot be queried.
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
