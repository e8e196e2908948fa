"""Parsing of a machine's network settings: rules, and addresses for host names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

from pytest_microvm.errors import UsageError

Place = tuple[str, "int | None"]
"""An address, and a port if it differs from the requested one."""

_PLACE = re.compile(r"(?:\[([0-9a-fA-F:.]{2,45})\]|([0-9.]{7,15}))(?::([0-9]{1,5}))?", re.ASCII)


def parse_network(value: object, name: str) -> tuple[str, ...]:
    """Return network rules from a list or a single rule; their content is validated where they are used.

    Raises:
        UsageError: The value is neither a string nor a list of non-empty strings.
    """
    rules = [value] if isinstance(value, str) else value
    if not isinstance(rules, (list, tuple)) or not all(isinstance(r, str) and r.strip() for r in rules):
        raise UsageError(
            f"{name}: invalid rules: expected a list of texts, got {value!r}",
            resolution='write it like ["pip", "example.com"]',
        )
    return tuple(rule.strip() for rule in rules)


def parse_hosts(value: object, name: str) -> tuple[tuple[str, Place], ...]:
    """Parse addresses for host names, from a table or a list of ``NAME=ADDRESS[:PORT]``.

    Raises:
        UsageError: The value is neither, or contains an invalid address.
    """
    pairs: Any = None
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, (list, tuple)) and all(isinstance(item, str) and "=" in item for item in value):
        pairs = (item.split("=", 1) for item in value)
    elif isinstance(value, tuple):  # already parsed
        pairs = ((host, place) for host, place in value)
    if pairs is None:
        raise UsageError(
            f"{name}: invalid hosts: expected names with their addresses, got {value!r}",
            resolution='write {"api.example.com" = "127.0.0.1:8443"}',
        )
    return tuple(
        sorted((str(host).strip().lower().rstrip("."), _place(place, name)) for host, place in pairs)
    )


def _place(value: object, name: str) -> Place:
    if isinstance(value, tuple):
        return value
    text = value.strip() if isinstance(value, str) else ""
    match = _PLACE.fullmatch(text)
    try:
        address = ip_address(match[1] or match[2]) if match else ip_address(text)
        port = int(match[3]) if match and match[3] else None
    except ValueError:
        address, port = None, None
    if address is None or (port is not None and not 0 < port < 65536):  # noqa: PLR2004 - ports are 16 bits
        raise UsageError(
            f"{name}: invalid address: expected ADDRESS or ADDRESS:PORT, got {value!r}",
            resolution="write it like 127.0.0.1:8443 or [::1]:8443",
        )
    return str(address), port
