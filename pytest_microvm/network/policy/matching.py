"""Rules and requests as values, and the matching between them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal
from urllib.parse import quote

from pytest_microvm.network.policy.addresses import Address, AddressNetwork, covers, readings, special_range
from pytest_microvm.network.policy.hosts import as_address, canonical_host, is_loopback_name
from pytest_microvm.network.policy.paths import EVERY_PATH, is_allowed_by, is_denied_by

Scheme = Literal["http", "https"]
PORTS: dict[str, int] = {"http": 80, "https": 443}
"""The default port of each :data:`Scheme`."""
SCHEMES: dict[str, Scheme] = {"http": "http", "ws": "http", "https": "https", "wss": "https"}
"""The scheme that each URL scheme counts as."""
_UNQUOTED = "/!$&'()*+,:=@~"


class Match(IntEnum):
    """The extent to which a rule applies to a request."""

    NOTHING = 0
    PART = 1
    """Some of the requests in a tunnel: each must be inspected."""
    ALL = 2


@dataclass(frozen=True)
class Request:
    """A request of a guest, as the policy gets it.

    Args:
        host: Lower case, no trailing dot, IDNA A-label; or an address without brackets. Other spellings are
            converted to this one before a decision.
        port: 1 to 65535.
        scheme: ``http`` or ``https`` (``ws`` and ``wss`` count as these); ``None``: an opaque tunnel.
        method: The HTTP method, as it was sent; ``None`` if unknown.
        path: The raw path of the request's target, without the query; ``None`` if unknown.
    """

    host: str
    port: int
    scheme: str | None = None
    method: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class NormalizedRequest:
    """A normalized request: canonical host, parsed address, scheme ``http`` or ``https``.

    Attributes:
        host: The canonical host.
        address: The parsed ``host``; ``None`` if it is a name.
        scheme: ``None`` for a tunnel.
    """

    host: str
    address: Address | None
    port: int
    scheme: Scheme | None
    method: str | None
    path: str | None

    @classmethod
    def of(cls, request: Request) -> NormalizedRequest:
        """Normalize a request.

        Raises:
            ValueError: The host, port or scheme is invalid.
        """
        if not 1 <= request.port <= 65535:  # noqa: PLR2004 - the range of ports
            raise ValueError("its port is none")
        scheme = None if request.scheme is None else SCHEMES.get(request.scheme.lower())
        if request.scheme is not None and scheme is None:
            raise ValueError("its scheme is neither http nor https")
        host = canonical_host(request.host)
        return cls(host, as_address(host), request.port, scheme, request.method, request.path)


@dataclass(frozen=True)
class Name:
    """Rule target: a host name, or all its subdomains."""

    name: str
    subdomains: bool = False

    def __str__(self) -> str:
        return f"*.{self.name}" if self.subdomains else self.name

    def includes(self, asked: NormalizedRequest, *, deny: bool) -> bool:  # noqa: ARG002 - same signature as the others
        """Return True if the target includes the request's host; addresses never match a name."""
        if asked.address is not None:
            return False
        return asked.host.endswith("." + self.name) if self.subdomains else asked.host == self.name


@dataclass(frozen=True)
class Network:
    """Rule target: an address or a network."""

    network: AddressNetwork

    def __str__(self) -> str:
        one = self.network.num_addresses == 1
        return str(self.network.network_address if one else self.network)

    def includes(self, asked: NormalizedRequest, *, deny: bool) -> bool:
        """Return True if the target includes the request's address; False for a name, not yet resolved."""
        if asked.address is None:
            return False
        if deny:
            return any(reading in self.network for reading in readings(asked.address))
        return covers(self.network, asked.address)


@dataclass(frozen=True)
class Everything:
    """Rule target: every public host."""

    def __str__(self) -> str:
        return "all"

    def includes(self, asked: NormalizedRequest, *, deny: bool) -> bool:
        """Return True if the target includes the request's host: any host to deny, public ones to allow."""
        if deny:
            return True
        if asked.address is not None:
            return special_range(asked.address) is None
        return not is_loopback_name(asked.host)


Target = Name | Network | Everything


@dataclass(frozen=True)
class Rule:
    """A rule that allows or denies requests.

    Args:
        target: The hosts the rule applies to.
        deny: Whether the rule denies.
        port: The only port; ``None``: the scheme's port, or 80 and 443 without a scheme. A deny rule and
            :class:`Everything` without a scheme then match every port.
        scheme: ``http`` or ``https``, if the rule applies to that alone.
        path: Unescaped; ``/*`` at the end matches everything below.
        methods: In upper case; empty: every method.
        preset: The preset that the rule comes from, if any.
        public_only: Whether the preset got the host from a public server, not from the user's configuration.
    """

    target: Target
    deny: bool = False
    port: int | None = None
    scheme: Scheme | None = None
    path: str = EVERY_PATH
    methods: tuple[str, ...] = ()
    preset: str | None = None
    public_only: bool = False

    def __str__(self) -> str:
        host = str(self.target)
        if ":" in host and (self.scheme or self.port):
            host = f"[{host}]"
        port = f":{self.port}" if self.port else ""
        deny = "deny:" if self.deny else ""
        if not self.scheme:
            return f"{deny}{host}{port}"
        path = "" if self.path == EVERY_PATH else quote(self.path, safe=_UNQUOTED)
        methods = ",".join(self.methods) + " " if self.methods else ""
        return f"{deny}{methods}{self.scheme}://{host}{port}{path}"

    @property
    def is_partial(self) -> bool:
        """True if the rule applies only to some requests to its host, by path or method."""
        return self.path != EVERY_PATH or bool(self.methods)

    @property
    def may_lead_inside(self) -> bool:
        """True if the rule's name may resolve to an organisation's own addresses without a rule for these."""
        return self.preset is not None and not self.public_only

    @property
    def any_protocol(self) -> bool:
        """True if the rule allows any protocol on its port: it names a port, or everything, and no scheme."""
        return self.scheme is None and (self.port is not None or isinstance(self.target, Everything))

    def match(self, asked: NormalizedRequest) -> Match:
        """Return the extent to which the rule applies to a request."""
        if not self.target.includes(asked, deny=self.deny) or not self._has_port(asked):
            return Match.NOTHING
        if self.scheme is None:
            return Match.ALL
        if asked.scheme is None:
            # HTTP on another port than 80: the tunnel must be inspected to see if it carries HTTP.
            whole = not self.is_partial and (self.scheme == "https" or asked.port == PORTS["http"])
            return Match.ALL if whole else Match.PART
        if asked.scheme != self.scheme:
            return Match.NOTHING
        return min(self._has_method(asked), self._has_path(asked))

    def forbidding(self) -> Rule:
        """Return the rule that denies all requests to the hosts that this rule allows."""
        return Rule(self.target, deny=True, preset=self.preset)

    def _has_port(self, asked: NormalizedRequest) -> bool:
        if self.port is not None:
            return asked.port == self.port
        if self.scheme is not None:
            return asked.port == PORTS[self.scheme]
        if self.deny or isinstance(self.target, Everything):
            return True
        # Port 80 is HTTP and 443 TLS; the proxy verifies a tunnel's first bytes.
        return asked.port == PORTS[asked.scheme] if asked.scheme else asked.port in PORTS.values()

    def _has_method(self, asked: NormalizedRequest) -> Match:
        if not self.methods:
            return Match.ALL
        if asked.method is None:
            return Match.PART
        method = asked.method.upper() if self.deny else asked.method
        return Match.ALL if method in self.methods else Match.NOTHING

    def _has_path(self, asked: NormalizedRequest) -> Match:
        if self.path == EVERY_PATH:
            return Match.ALL
        if asked.path is None:
            return Match.PART
        test = is_denied_by if self.deny else is_allowed_by
        return Match.ALL if test(self.path, asked.path) else Match.NOTHING
