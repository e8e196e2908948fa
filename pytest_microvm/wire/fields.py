"""Validation of whole numbers in JSON messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_microvm.wire.frames import WireError

if TYPE_CHECKING:
    from typing import TypeGuard

_LARGEST = 2**53 - 1  # JSON (RFC 8259, section 6): integers on which all implementations agree


def is_whole(value: object, low: int, high: int) -> TypeGuard[int]:
    """Return True if ``value`` is an integer from ``low`` to ``high``; ``true`` is none."""
    return type(value) is int and low <= value <= high


def number_field(message: dict[str, Any], key: str) -> int:
    """Return a positive number of a peer's message.

    Raises:
        WireError: The message has no such number.
    """
    value = message.get(key)
    if not is_whole(value, 1, _LARGEST):
        raise WireError(f"a message without a number {key!r}")
    return value
