"""Classification of addresses: detect those that are not public, including IPv4 embedded in IPv6."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
AddressNetwork = IPv4Network | IPv6Network

OWN = frozenset({"private", "shared by a provider's customers", "unique local"})
"""Kinds of addresses that an organisation's own servers use."""


@dataclass(frozen=True)
class Range:
    """A range of addresses that are not public.

    Args:
        network: The range.
        kind: Its description, for people.
    """

    network: AddressNetwork
    kind: str


_KINDS = {
    # Services at these addresses hand out a cloud machine's credentials.
    "cloud metadata": (
        "169.254.169.254/32", "169.254.169.253/32", "169.254.170.2/32", "169.254.170.23/32",
        "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32", "fd00:ec2::254/128",
        "fd00:ec2::253/128", "fd00:ec2::23/128", "fd20:ce::254/128",
        "169.254.42.42/32", "fd00:42::42/128", "169.254.0.23/32", "fd00:a9fe:a9fe::1/128",
        "fd00:c1::a9fe:a9fe/128", "fd00:100::100:200/128",
    ),
    "loopback": ("127.0.0.0/8", "::1/128"),
    "unspecified": ("0.0.0.0/8", "::/128"),
    "link-local": ("169.254.0.0/16", "fe80::/10"),
    "private": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fec0::/10"),
    "shared by a provider's customers": ("100.64.0.0/10",),
    "unique local": ("fc00::/7",),
    "multicast": ("224.0.0.0/4", "ff00::/8"),
    "broadcast": ("255.255.255.255/32",),
    # Without the documentation ranges (192.0.2.0/24, 198.51.100.0/24, 203.0.113.0/24): no private services
    # use them, and networks that translate every name hand them out.
    "reserved": (
        "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4",
        # Only 2000::/3 of IPv6 is allocated; networks translate 64:ff9b:1::/48 to addresses of their choice.
        "::/3", "4000::/2", "8000::/2", "c000::/3", "e000::/4", "f000::/5", "f800::/6", "fe00::/9",
        "2001::/23",
    ),
}  # fmt: skip
_RANGES = sorted(
    (Range(ip_network(text), kind) for kind, texts in _KINDS.items() for text in texts),
    key=lambda known: known.network.prefixlen,
    reverse=True,
)
_LAST_32 = tuple(
    IPv6Network(text)
    for text in (
        "::/96",  # IPv4-compatible, RFC 4291
        "::ffff:0:0/96",  # IPv4-mapped, RFC 4291
        "::ffff:0:0:0/96",  # IPv4-translated, RFC 2765
        "64:ff9b::/96",  # NAT64, RFC 6052
    )
)
_NOT_V4 = frozenset({IPv6Address("::"), IPv6Address("::1")})
_6TO4 = IPv6Network("2002::/16")
_TEREDO = IPv6Network("2001::/32")
_ISATAP = frozenset({0x00005EFE, 0x02005EFE})
_NAT64 = _LAST_32[3]


def parse_address(text: str) -> Address:
    """Parse an address, without its zone (``%eth0``); an IPv4-mapped one becomes its IPv4 address.

    Args:
        text: An address in its usual notation, without brackets; ``::ffff:127.0.0.1`` yields ``127.0.0.1``.

    Raises:
        ValueError: ``text`` is no address.
    """
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def readings(address: Address) -> Iterator[Address]:
    """Yield the address, and every IPv4 address that a translator or tunnel may turn it into."""
    yield address
    if isinstance(address, IPv4Address) or address in _NOT_V4:
        return
    bits = int(address)
    if any(address in network for network in _LAST_32):
        yield IPv4Address(bits & 0xFFFFFFFF)
    if address in _6TO4:
        yield IPv4Address(bits >> 80 & 0xFFFFFFFF)
    if address in _TEREDO:  # the server, and the client with all bits inverted (RFC 4380)
        yield IPv4Address(bits >> 64 & 0xFFFFFFFF)
        yield IPv4Address(~bits & 0xFFFFFFFF)
    if bits >> 32 & 0xFFFFFFFF in _ISATAP:  # RFC 5214
        yield IPv4Address(bits & 0xFFFFFFFF)


def special_range(address: Address) -> Range | None:
    """Return the smallest non-public range that contains an address; ``None`` for a public address.

    An address that embeds another (NAT64, 6to4, Teredo, ...) is as public as the embedded one. If the
    embedded address is special, the range is the outer address alone.
    """
    inner = [_own_range(reading) for reading in readings(address)]
    own, hidden = inner[0], [found for found in inner[1:] if found]
    if hidden:
        return Range(ip_network(address), f"another spelling of an address that is {hidden[0].kind}")
    return None if address in _NAT64 else own


def covers(network: AddressNetwork, address: Address) -> bool:
    """Return True if a rule for ``network`` allows ``address``.

    A non-public address must be allowed by a network inside its special range: ``0.0.0.0/0`` allows no
    loopback address, and ``169.254.0.0/16`` not the metadata address, which is a range of its own.
    """
    if address not in network:
        return False
    special = special_range(address)
    if special is None:
        return True
    return is_subnet(network, special.network)


def is_subnet(network: AddressNetwork, outer: AddressNetwork) -> bool:
    """Return True if a network lies inside another; False if their IP versions differ."""
    if isinstance(network, IPv4Network):
        return isinstance(outer, IPv4Network) and network.subnet_of(outer)
    return isinstance(outer, IPv6Network) and network.subnet_of(outer)


def _own_range(address: Address) -> Range | None:
    return next((known for known in _RANGES if address in known.network), None)
