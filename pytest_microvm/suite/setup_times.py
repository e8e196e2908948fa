"""How long the set-up of wide fixtures takes: measured in machines, remembered in pytest's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_microvm.suite import checks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytest

_PLACE = "microvm/fixtures"
_REMEMBERED = 1000


class SetUpTimes:
    """Seconds by the name of a fixture. The names come from the guest: they are only compared.

    Args:
        names: The names of this run's fixtures, by number.
        known: Seconds by name, from earlier runs.
    """

    def __init__(self, names: Sequence[str], known: Mapping[str, float]) -> None:
        self._names = names
        self._seconds = {number: known[name] for number, name in enumerate(names) if name in known}

    def add(self, measured: object) -> None:
        """Take what a guest has measured: pairs of a fixture's number and seconds.

        Raises:
            ProtocolViolation: It is malformed.
        """
        for pair in checks.array(measured, "list of fixtures' times"):
            if len(checks.array(pair, "fixture's time", 2)) != 2:  # noqa: PLR2004 - number, seconds
                raise checks.violation("a fixture's time without its two parts")
            number, seconds = pair
            number = checks.integer(number, "number of a fixture", 0, len(self._names) - 1)
            self._seconds[number] = checks.seconds(seconds)

    def of(self, number: int) -> float:
        """Return a fixture's seconds; 0 if they are not known."""
        return self._seconds.get(number, 0.0)

    def slow(self, least: float) -> dict[str, float]:
        """Return the fixtures that take at least ``least`` seconds, by name."""
        return {self._names[number]: seconds for number, seconds in self._seconds.items() if seconds >= least}


def remembered(config: pytest.Config) -> dict[str, float]:
    """Return the seconds by name that earlier runs have measured."""
    cache: Any = getattr(config, "cache", None)  # none with -p no:cacheprovider
    found = {} if cache is None else cache.get(_PLACE, {})
    if not isinstance(found, dict):
        return {}
    return {name: checks.seconds(seconds) for name, seconds in found.items()}


def remember(config: pytest.Config, slow: Mapping[str, float]) -> None:
    """Remember the slow fixtures of this run, and those of earlier runs up to a limit."""
    cache: Any = getattr(config, "cache", None)
    if cache is None or not slow:
        return
    others = {name: seconds for name, seconds in remembered(config).items() if name not in slow}
    kept = [*slow.items(), *others.items()][:_REMEMBERED]
    cache.set(_PLACE, dict(kept))
