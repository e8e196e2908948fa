"""Parse one rule from text into a :class:`Rule`."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import NoReturn

from pytest_microvm.errors import UsageError
from pytest_microvm.network.policy.addresses import parse_address
from pytest_microvm.network.policy.hosts import as_address, canonical_host
from pytest_microvm.network.policy.matching import PORTS, Everything, Name, Network, Rule, Scheme, Target
from pytest_microvm.network.policy.paths import EVERY_PATH, plain_path

DENY = "deny:"
EVERYTHING = "all"
PRESETS = ("apt", "git", "npm", "pip")
"""Names that stand for the rules of a tool's own configuration on this computer."""

_URL = re.compile(r"(?:(?P<methods>[^/]*?)\s+)?(?P<scheme>\w+)://(?P<rest>.*)", re.DOTALL)
_SCHEMES: dict[str, Scheme] = {"http": "http", "https": "https"}
_METHOD = re.compile(r"[A-Za-z]{1,20}")
_PORT = re.compile(r":([1-9][0-9]{0,4})")
_MAX_PORT = 65535
_SHOWN = 80  # characters of a rule in an error message
_FORMS = (
    "host, *.host, host:port, an address or a network (10.0.0.0/8, [::1]:8080), "
    "[METHOD,METHOD ]http(s)://host[:port]/path/*, a preset (pip, npm, apt, git) or all; "
    "with deny: in front to forbid it"
)


def parse_rule(text: str, where: str) -> Rule:
    """Parse a rule; names of presets are not accepted.

    Args:
        text: The rule's text.
        where: The source of the text, for errors.

    Raises:
        UsageError: ``text`` is no rule.
    """
    return _Writing(text, where).rule()


def split_deny(text: str) -> tuple[bool, str]:
    """Split a rule into a deny flag and the rest of its text."""
    text = text.strip()
    deny = text[: len(DENY)].lower() == DENY
    return deny, text[len(DENY) :].strip() if deny else text


def _refuse(where: str, text: str, why: str, resolution: str = "") -> NoReturn:
    """Raise an error that names the reason a text is no rule.

    Raises:
        UsageError: Always.
    """
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    raise UsageError(
        f"{where}: {shown!r} is not a network rule: {why}", resolution=resolution or f"write {_FORMS}"
    )


class _Writing:
    """Parser of one rule's text."""

    def __init__(self, text: str, where: str) -> None:
        self._text = text
        self._where = where

    def rule(self) -> Rule:
        deny, text = split_deny(self._text)
        if not text:
            self._refuse("it is empty")
        if "@" in text.partition("://")[2].partition("/")[0] or ("@" in text and "://" not in text):
            raise UsageError(  # the text is not shown: it may contain a password
                f"{self._where}: a network rule has no user name or password",
                resolution="leave out what stands before the @, and hand the secret over as a credential",
            )
        if text == EVERYTHING:
            return Rule(Everything(), deny=deny)
        if found := _URL.fullmatch(text):
            return self._url(deny, found["methods"], found["scheme"], found["rest"])
        if " " in text:
            self._refuse(
                "it has a space in it",
                "write one rule an entry; methods stand before http:// or https:// only",
            )
        target, port = self._target_and_port(text)
        word = target.name if isinstance(target, Name) and not target.subdomains else ""
        if (port is None and word in (EVERYTHING, *PRESETS)) or (port and word == DENY.rstrip(":")):
            self._refuse(
                f"{word!r} has a meaning of its own", f"write {word} in lower case, or http(s)://{word}"
            )
        return Rule(target, deny=deny, port=port)

    def _url(self, deny: bool, methods: str | None, scheme: str, rest: str) -> Rule:
        known = _SCHEMES.get(scheme.lower())
        if known is None:
            self._refuse(f"{scheme}:// is not looked into", "write http:// or https:// (also for ws and wss)")
        if "?" in rest or "#" in rest:
            self._refuse("it has a query or a fragment", "end it with the path: queries are not looked at")
        authority, slash, path = rest.partition("/")
        target, port = self._target_and_port(authority)
        if isinstance(target, Network) and target.network.num_addresses > 1:
            self._refuse("a URL has one host", "write the network without http://")
        return Rule(
            target,
            deny=deny,
            port=None if port == PORTS[known] else port,
            scheme=known,
            path=self._path(slash + path) if slash else EVERY_PATH,
            methods=self._methods(methods),
        )

    def _methods(self, text: str | None) -> tuple[str, ...]:
        if text is None:
            return ()
        names = [name.strip() for name in text.split(",")]
        if not all(_METHOD.fullmatch(name) for name in names) or "CONNECT" in map(str.upper, names):
            self._refuse(f"{text!r} are not methods of HTTP", "write them as GET,HEAD with a space behind")
        return tuple(sorted({name.upper() for name in names}))

    def _path(self, text: str) -> str:
        prefix = text.removesuffix("*")
        plain = plain_path(prefix)
        if text.endswith("*") and not prefix.endswith("/"):
            self._refuse("a * in a path stands after a /", "write /path/* for everything below /path/")
        if plain is None or "*" in plain:
            self._refuse(
                "its path can be read in more than one way",
                "write it without .., //, \\, ;, %2F, and with * at its end alone",
            )
        return plain + text[len(prefix) :]

    def _target_and_port(self, text: str) -> tuple[Target, int | None]:
        host, port = self._split(text)
        if port is not None and port > _MAX_PORT:
            self._refuse(f"{port} is no port", f"ports are 1 to {_MAX_PORT}")
        if "/" in host:
            return self._network(host), port
        subdomains = host.startswith("*.")
        name = host.removeprefix("*.")
        if "*" in name:
            self._refuse("a * stands for subdomains, in front", "write *.host, or all for every public host")
        try:
            canonical = canonical_host(name)
        except ValueError as error:
            self._refuse(f"{name!r} is no host: {error}")
        address = as_address(canonical)
        if address is None:
            return Name(canonical, subdomains), port
        if subdomains:
            self._refuse("addresses have no subdomains", f"write the network, such as {canonical}/24")
        if ":" not in name and canonical != name:
            self._refuse(f"this is the address {canonical}", f"write {canonical}")
        return Network(ip_network(address)), port

    def _split(self, text: str) -> tuple[str, int | None]:
        """Return the host, without brackets, and the port."""
        if text.startswith("["):
            host, bracket, rest = text[1:].partition("]")
            if not bracket or ":" not in host or (rest and not _PORT.fullmatch(rest)):
                self._refuse("its brackets hold no IPv6 address, with a :port behind", "write [::1]:8080")
            return host, int(rest[1:]) if rest else None
        if text.count(":") > 1:  # IPv6 without brackets
            return text, None
        host, colon, port = text.partition(":")
        if colon and not _PORT.fullmatch(colon + port):
            self._refuse(f"{port!r} is no port", f"ports are 1 to {_MAX_PORT}; leave it out for 80 and 443")
        return host, int(port) if colon else None

    def _network(self, text: str) -> Network:
        try:
            wide = ip_network(text, strict=False)
        except ValueError:
            self._refuse(
                "what has a / in it is a network of addresses, and this is none",
                "write a network such as 10.0.0.0/8, or http(s):// in front of a host with a path",
            )
        if "%" in text or str(wide.network_address) != str(parse_address(text.partition("/")[0])):
            self._refuse(f"the network is written {wide}", f"write {wide}")
        return Network(wide)

    def _refuse(self, why: str, resolution: str = "") -> NoReturn:
        _refuse(self._where, self._text, why, resolution)
