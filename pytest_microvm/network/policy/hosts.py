"""Canonical spelling of hosts; ambiguous spellings are rejected."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import TypeVar

from pytest_microvm.errors import UsageError
from pytest_microvm.network.policy.addresses import Address, parse_address

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
_PARTS = 4  # of an IPv4 address, at most
_MAX_NAME = 253
# IDNA 2003 and IDNA 2008 turn these characters into different names.
_AMBIGUOUS = re.compile("[\u00df\u03c2\u200c\u200d\u1e9e]")
LOOPBACK_NAME = "localhost"

_Place = TypeVar("_Place")


def canonical_host(text: str) -> str:
    """Return a host's canonical spelling, in which requests and rules are compared.

    A name is returned in lower case and ASCII, without a trailing dot; an address in its usual spelling,
    without brackets, as a resolver reads it: ``127.1``, ``0x7f.1`` and ``2130706433`` are ``127.0.0.1``.

    Args:
        text: A name or an address, with or without brackets.

    Raises:
        ValueError: ``text`` is no host, or is ambiguous. The message does not repeat the text.
    """
    bracketed = text.startswith("[") and text.endswith("]")
    bare = text[1:-1] if bracketed else text
    if "%" in bare:
        raise ValueError("it has a % (a zone, or an escaped character)")
    if bracketed or ":" in bare:
        return str(_v6(bare))
    name = _ascii(bare).removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return str(_v4(labels))
    if len(name) > _MAX_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("it is neither a host's name nor an address")
    return name


def by_canonical_host(places: Iterable[tuple[str, _Place]]) -> dict[str, _Place]:
    """Return a mapping of canonical host names to their places.

    Raises:
        UsageError: A name is no host.
    """
    found: dict[str, _Place] = {}
    for name, place in places:
        try:
            found[canonical_host(name)] = place
        except ValueError as error:
            raise UsageError(
                f"hosts: {name!r} is no host: {error}", resolution="write a name such as api.example.com"
            ) from None
    return found


def as_address(host: str) -> Address | None:
    """Return a canonical host as an address, ``None`` if it is a name."""
    try:
        return parse_address(host)
    except ValueError:
        return None


def is_loopback_name(host: str) -> bool:
    """Return True if a canonical host is a loopback name: localhost or below (RFC 6761, section 6.3)."""
    return host == LOOPBACK_NAME or host.endswith("." + LOOPBACK_NAME)


def _ascii(text: str) -> str:
    if len(text) > _MAX_NAME + 1:  # before encoding, which takes quadratic time
        raise ValueError("it is longer than a name can be")
    if text.isascii():
        return text.lower()
    if _AMBIGUOUS.search(text):
        raise ValueError("it has a character that is turned into ASCII in two ways: write the xn-- form")
    try:
        return text.encode("idna").decode("ascii").lower()
    except UnicodeError:
        raise ValueError("it cannot be written in ASCII (IDNA)") from None


def _v6(text: str) -> Address:
    try:
        if ":" in text:
            return parse_address(text)
    except ValueError:
        pass
    raise ValueError("it is no IPv6 address")


def _v4(labels: list[str]) -> IPv4Address:
    """Parse an address like ``inet_aton``: numbers may be hexadecimal, octal, and fewer than four."""
    try:
        numbers = [_number(label) for label in labels]
    except ValueError:
        raise ValueError("it ends like an IPv4 address and is none") from None
    *first, last = numbers
    if len(numbers) > _PARTS or any(part > 0xFF for part in first):  # noqa: PLR2004 - a byte
        raise ValueError("it ends like an IPv4 address and is none")
    rest = 8 * (_PARTS - len(first))
    if last >= 1 << rest:
        raise ValueError("it ends like an IPv4 address and is none")
    return IPv4Address(sum(part << 8 * (3 - place) for place, part in enumerate(first)) + last)


def _number(label: str) -> int:
    if label.startswith("0x"):
        return int(label[2:] or "0", 16)
    if not label.isdecimal() or not label.isascii() or len(label) > 20:  # noqa: PLR2004 - no address is longer
        raise ValueError
    return int(label, 8) if label.startswith("0") else int(label)
