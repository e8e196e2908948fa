"""A rule and a request as values, and whether the one is about the other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal
from urllib.parse import quote

from pytest_microvm.network.policy.addresses import Address, AddressNetwork, covers, readings, special_range
from pytest_microvm.network.policy.hosts import as_address, canonical_host, is_loopback_name
from pytest_microvm.network.policy.paths import EVERY_PATH, is_allowed_by, is_denied_by

Scheme = Literal["http", "https"]
PORTS: dict[Scheme, int] = {"http": 80, "https": 443}
_SCHEMES: dict[str, Scheme] = {"http": "http", "ws": "http", "https": "https", "wss": "https"}
_UNQUOTED = "/!$&'()*+,:=@~"


class Match(IntEnum):
    """How much of what is asked for a rule is about."""

    NOTHING = 0
    PART = 1
    """Some of the requests in a tunnel: each has to be looked at."""
    ALL = 2


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        host: Lower case, no trailing dot, IDNA A-label; or an address without brackets. Other spellings are
            put into this one before anything is decided.
        port: 1 to 65535.
        scheme: ``http`` or ``https`` (``ws`` and ``wss`` count as these); ``None``: an opaque tunnel.
        method: Of HTTP, as it was sent; ``None`` if it is not known.
        path: The raw path of the request's target, without the query; ``None`` if it is not known.
    """

    host: str
    port: int
    scheme: str | None = None
    method: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class Asked:
    """A request as rules see it: its host in the one spelling, its scheme one of two, an address parsed.

    Attributes:
        host: Canonical.
        address: What ``host`` is if it is no name.
        scheme: ``None`` for a tunnel.
    """

    host: str
    address: Address | None
    port: int
    scheme: Scheme | None
    method: str | None
    path: str | None

    @classmethod
    def of(cls, request: Request) -> Asked:
        """Return a request as rules see it.

        Raises:
            ValueError: It has no host, port or scheme that could be asked for.
        """
        if not 1 <= request.port <= 65535:  # noqa: PLR2004 - the ports there are
            raise ValueError("its port is none")
        scheme = None if request.scheme is None else _SCHEMES.get(request.scheme.lower())
        if request.scheme is not None and scheme is None:
            raise ValueError("its scheme is neither http nor https")
        host = canonical_host(request.host)
        return cls(host, as_address(host), request.port, scheme, request.method, request.path)


@dataclass(frozen=True)
class Name:
    """A host by its name, or all below it."""

    name: str
    subdomains: bool = False

    def __str__(self) -> str:
        return f"*.{self.name}" if self.subdomains else self.name

    def includes(self, asked: Asked, *, deny: bool) -> bool:  # noqa: ARG002 - as the others
        """Tell whether the host that is asked for is meant."""
        if asked.address is not None:
            return False
        return asked.host.endswith("." + self.name) if self.subdomains else asked.host == self.name


@dataclass(frozen=True)
class Network:
    """One address, or a network of them."""

    network: AddressNetwork

    def __str__(self) -> str:
        one = self.network.num_addresses == 1
        return str(self.network.network_address if one else self.network)

    def includes(self, asked: Asked, *, deny: bool) -> bool:
        """Tell whether the address that is asked for is meant; a name never is before it is resolved."""
        if asked.address is None:
            return False
        if deny:
            return any(reading in self.network for reading in readings(asked.address))
        return covers(self.network, asked.address)


@dataclass(frozen=True)
class Everything:
    """Every public host."""

    def __str__(self) -> str:
        return "all"

    def includes(self, asked: Asked, *, deny: bool) -> bool:
        """Tell whether the host that is asked for is meant: to forbid, every host; else only public ones."""
        if deny:
            return True
        if asked.address is not None:
            return special_range(asked.address) is None
        return not is_loopback_name(asked.host)


Target = Name | Network | Everything


@dataclass(frozen=True)
class Rule:
    """One rule.

    Args:
        target: The hosts it is about.
        deny: It forbids.
        port: The only one; ``None``: its scheme's, without a scheme 80 and 443. To forbid, and for
            :class:`Everything`, every one.
        scheme: ``http`` or ``https``, if it is about that alone.
        path: Unescaped; ``/*`` at the end stands for everything below.
        methods: In upper case; none: every one.
        preset: The preset that it comes from, if it does.
        public_only: Somebody outside told the preset of the host, not the user's own configuration.
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
        """Tell whether the rule is about some requests to its host and not about others."""
        return self.path != EVERY_PATH or bool(self.methods)

    @property
    def may_lead_inside(self) -> bool:
        """Tell whether its name may lead to an organisation's own addresses that no rule names."""
        return self.preset is not None and not self.public_only

    @property
    def any_protocol(self) -> bool:
        """Tell whether the rule allows whatever is spoken on its port: it names the port, not a scheme."""
        return self.scheme is None and (self.port is not None or isinstance(self.target, Everything))

    def match(self, asked: Asked) -> Match:
        """Tell how much of what is asked for the rule is about."""
        if not self.target.includes(asked, deny=self.deny) or not self._has_port(asked):
            return Match.NOTHING
        if self.scheme is None:
            return Match.ALL
        if asked.scheme is None:
            # HTTP on a port of its own: whether a tunnel carries that has to be looked at.
            whole = not self.is_partial and (self.scheme == "https" or asked.port == PORTS["http"])
            return Match.ALL if whole else Match.PART
        if asked.scheme != self.scheme:
            return Match.NOTHING
        return min(self._has_method(asked), self._has_path(asked))

    def forbidding(self) -> Rule:
        """Return the rule that forbids the hosts this one allows, altogether."""
        return Rule(self.target, deny=True, preset=self.preset)

    def _has_port(self, asked: Asked) -> bool:
        if self.port is not None:
            return asked.port == self.port
        if self.scheme is not None:
            return asked.port == PORTS[self.scheme]
        if self.deny or isinstance(self.target, Everything):
            return True
        # 80 speaks HTTP and 443 TLS; a tunnel's first bytes are looked at by whoever carries it.
        return asked.port == PORTS[asked.scheme] if asked.scheme else asked.port in PORTS.values()

    def _has_method(self, asked: Asked) -> Match:
        if not self.methods:
            return Match.ALL
        if asked.method is None:
            return Match.PART
        method = asked.method.upper() if self.deny else asked.method
        return Match.ALL if method in self.methods else Match.NOTHING

    def _has_path(self, asked: Asked) -> Match:
        if self.path == EVERY_PATH:
            return Match.ALL
        if asked.path is None:
            return Match.PART
        test = is_denied_by if self.deny else is_allowed_by
        return Match.ALL if test(self.path, asked.path) else Match.NOTHING
