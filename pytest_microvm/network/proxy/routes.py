"""Query the kernel for routes and neighbours (rtnetlink(7), linux/rtnetlink.h)."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network

from pytest_microvm.network.policy.addresses import Address, AddressNetwork

_TIMEOUT = 5.0  # seconds; the kernel answers at once
_MAX_REPLY = 65536  # bytes of a reply with one route or neighbour
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst_len, ..., route type, flags
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg: family, ifindex, state, flags, type
_ATTRIBUTE = struct.Struct("=HH")  # rtattr: length, type
_NEXT_HOP = struct.Struct("=HBBi")  # rtnexthop: length, flags, hops, ifindex
_ERROR, _REQUEST = 2, 1  # NLMSG_ERROR, NLM_F_REQUEST
_GET_ROUTE, _GET_NEIGHBOUR = 26, 30  # RTM_GETROUTE, RTM_GETNEIGH
_FIB_MATCH = 0x2000  # RTM_F_FIB_MATCH: the entry of the table, with its prefix; Linux 4.13
_LOCAL = 2  # RTN_LOCAL
_DESTINATION, _DEVICE, _GATEWAY, _MULTIPATH, _VIA = 1, 4, 5, 9, 18  # RTA_DST, RTA_OIF, ...
_ATTRIBUTE_TYPE = 0x3FFF  # NLA_TYPE_MASK
_RESOLVED = 0x02 | 0x04 | 0x08 | 0x10 | 0x80  # NUD_REACHABLE, _STALE, _DELAY, _PROBE, _PERMANENT
# Without EINVAL and EACCES of prohibiting routes: a kernel that rejects the query returns these, too.
_NO_ROUTE = frozenset((errno.ENETUNREACH, errno.EHOSTUNREACH))


@dataclass(frozen=True)
class Route:
    """The entry of the kernel's routing tables for packets to an address.

    Args:
        network: The destinations of the entry.
        is_local: Whether the destinations are this computer's own addresses.
        devices: Numbers of the interfaces that packets may leave through.
        gateways: Routers that packets may go to; ``None`` among them means no router: the destination is on
            the link.
    """

    network: AddressNetwork
    is_local: bool
    devices: tuple[int, ...]
    gateways: tuple[Address | None, ...]


def route_to(address: Address) -> Route | None:
    """Return the kernel's route to an address, with policy routing applied; ``None`` if there is none.

    Raises:
        OSError: The kernel cannot be queried.
    """
    body = _ROUTE.pack(_family(address), address.max_prefixlen, 0, 0, 0, 0, 0, 0, _FIB_MATCH)
    try:
        reply = _ask(_GET_ROUTE, body + _attribute(_DESTINATION, address.packed))
    except OSError as error:
        if error.errno in _NO_ROUTE:
            return None
        raise
    _, length, *_, kind, _ = _ROUTE.unpack_from(reply)
    hops = list(_hops(reply[_ROUTE.size :]))
    network = ip_network((address, length), strict=False)
    return Route(
        network,
        is_local=kind == _LOCAL,
        devices=tuple(device for device, _gateway in hops),
        gateways=tuple(gateway for _device, gateway in hops),
    )


def is_neighbour(address: Address, device: int) -> bool:
    """Return True if the kernel knows a link-layer address for ``address`` on an interface.

    Args:
        address: Any address.
        device: The number of the interface.

    Raises:
        OSError: The kernel cannot be queried.
    """
    body = _NEIGHBOUR.pack(_family(address), device, 0, 0, 0)
    try:
        reply = _ask(_GET_NEIGHBOUR, body + _attribute(_DESTINATION, address.packed))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):  # the latter before Linux 5.0
            return False
        raise
    return bool(_NEIGHBOUR.unpack_from(reply)[2] & _RESOLVED)


def _hops(attributes: bytes) -> Iterator[tuple[int, Address | None]]:
    """Yield interface and router of each next hop of a route."""
    found = dict(_attributes(attributes))
    rest = found.get(_MULTIPATH, b"")
    if not rest:
        yield int.from_bytes(found.get(_DEVICE, b""), sys.byteorder), _gateway(found)
    while len(rest) >= _NEXT_HOP.size:
        length, _, _, device = _NEXT_HOP.unpack_from(rest)
        length = max(length, _NEXT_HOP.size)
        yield device, _gateway(dict(_attributes(rest[_NEXT_HOP.size : length])))
        rest = rest[_aligned(length) :]


def _gateway(attributes: dict[int, bytes]) -> Address | None:
    if _VIA in attributes:  # a router of another address family; the family's number comes first
        return ip_address(attributes[_VIA][2:])
    return ip_address(attributes[_GATEWAY]) if _GATEWAY in attributes else None


def _family(address: Address) -> int:
    return socket.AF_INET6 if isinstance(address, IPv6Address) else socket.AF_INET


def _ask(kind: int, body: bytes) -> bytes:
    """Send a request to the kernel and return its reply without the header.

    Raises:
        OSError: The kernel rejected the request, or no socket could be opened.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(_TIMEOUT)
        sock.connect((0, 0))  # the kernel: no other process can reply
        sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST, 1, 0) + body)
        reply = sock.recv(_MAX_REPLY)
    length, answered, *_ = _HEADER.unpack_from(reply)
    if answered == _ERROR:
        code = -struct.unpack_from("=i", reply, _HEADER.size)[0]
        raise OSError(code, os.strerror(code))
    return reply[_HEADER.size : length]


def _attribute(kind: int, content: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(content), kind) + content


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        length = max(length, _ATTRIBUTE.size)
        yield kind & _ATTRIBUTE_TYPE, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return (length + 3) & ~3
