"""Validate the fields of a guest's replies; a wrong type or value ends the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_microvm.errors import ProtocolViolation
from pytest_microvm.wire.fields import is_whole

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_microvm.agent.link import Link

_FAR = 2**63
_MAX_TEXT = 4096  # PATH_MAX of Linux (bytes)


class Answer:
    """The result of a request; each field is validated when it is read.

    Args:
        link: The link the result came from; an invalid field closes it and ends the machine.
        fields: The return value of :meth:`pytest_microvm.agent.link.PendingRequest.wait`.
    """

    def __init__(self, link: Link, fields: dict[str, Any]) -> None:
        self._link = link
        self._fields = fields

    def whole(self, name: str, low: int = 0, high: int = 2**63) -> int:
        """Return an integer field from ``low`` to ``high``, both included.

        Raises:
            ProtocolViolation: The field is no such integer.
        """
        value = self._fields.get(name)
        if not is_whole(value, low, high):
            raise self._violation(name, f"is no whole number from {low} to {high}")
        return value

    def number(self, name: str) -> float:
        """Return a numeric field whose magnitude is below 2**63.

        Raises:
            ProtocolViolation: The field is no such number.
        """
        value = self._fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_FAR < value < _FAR:
            raise self._violation(name, "is no number")  # includes nan: every comparison with it is false
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean field.

        Raises:
            ProtocolViolation: The field is no boolean.
        """
        value = self._fields.get(name)
        if not isinstance(value, bool):
            raise self._violation(name, "is neither true nor false")
        return value

    def choice(self, name: str, allowed: Collection[str]) -> str:
        """Return a string field that is one of ``allowed``.

        Raises:
            ProtocolViolation: The field is none of them.
        """
        value = self._fields.get(name)
        if not isinstance(value, str) or value not in allowed:
            raise self._violation(name, f"is none of {', '.join(sorted(allowed))}")
        return value

    def path(self, name: str) -> str:
        """Return a string field that is a possible path: not empty, no NUL, at most 4096 characters.

        Raises:
            ProtocolViolation: The field is no such string.
        """
        value = self._fields.get(name)
        if not _is_path(value):
            raise self._violation(name, "is no path")
        return str(value)

    def names(self, name: str) -> list[str]:
        """Return a list of file names without ``/``, ``.`` and ``..``: none can escape its folder.

        Raises:
            ProtocolViolation: The field is no such list.
        """
        value = self._fields.get(name)
        if not isinstance(value, list) or not all(
            _is_path(entry) and "/" not in entry and entry not in (".", "..") for entry in value
        ):
            raise self._violation(name, "is no list of names")
        return value

    def _violation(self, name: str, why: str) -> ProtocolViolation:
        violation = ProtocolViolation(f"the guest answered with a {name!r} that {why}")
        self._link.end_for(violation)
        return violation


def _is_path(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and "\0" not in value
