"""Read the fields of a guest's answers: right type, in range, or the machine is ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_microvm.errors import ProtocolViolation

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_microvm.agent.link import Link

_FAR = 2**63
_MAX_TEXT = 4096  # bytes: what Linux takes as a path


class Answer:
    """The result of a request; every field is judged when it is asked for.

    Args:
        link: Where it came from; a wrong field ends it.
        fields: What :meth:`pytest_microvm.agent.link.Request.wait` returned.
    """

    def __init__(self, link: Link, fields: dict[str, Any]) -> None:
        self._link = link
        self._fields = fields

    def whole(self, name: str, low: int = 0, high: int = 2**63) -> int:
        """Return a whole number between ``low`` and ``high``.

        Raises:
            ProtocolViolation: It is none.
        """
        value = self._fields.get(name)
        if type(value) is not int or not low <= value <= high:
            raise self._violation(name, f"is no whole number from {low} to {high}")
        return value

    def number(self, name: str) -> float:
        """Return a number that a float can hold.

        Raises:
            ProtocolViolation: It is none.
        """
        value = self._fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_FAR < value < _FAR:
            raise self._violation(name, "is no number")  # nan is neither less nor more than anything
        return value

    def choice(self, name: str, allowed: Collection[str]) -> str:
        """Return a text that is one of ``allowed``.

        Raises:
            ProtocolViolation: It is none.
        """
        value = self._fields.get(name)
        if not isinstance(value, str) or value not in allowed:
            raise self._violation(name, f"is none of {', '.join(sorted(allowed))}")
        return value

    def path(self, name: str) -> str:
        """Return a text that can be a path.

        Raises:
            ProtocolViolation: It is none.
        """
        value = self._fields.get(name)
        if not _is_path(value):
            raise self._violation(name, "is no path")
        return str(value)

    def names(self, name: str) -> list[str]:
        """Return names of files, each without a folder: none can lead out of where it is put.

        Raises:
            ProtocolViolation: They are none.
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
