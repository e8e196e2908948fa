"""Change single values of a lock file's pins, as tests of ``--locked`` do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any


def leaves(value: Any, field: str = "") -> list[str]:
    """Return the places of all values in pins, as errors name them."""
    if isinstance(value, dict):
        prefix = f"{field}." if field else ""
        return [leaf for key, item in value.items() for leaf in leaves(item, prefix + key)]
    if isinstance(value, list):
        return [leaf for number, item in enumerate(value) for leaf in leaves(item, f"{field}[{number}]")]
    return [field]


def changed(pins: Any, field: str) -> Any:
    """Return a copy of pins in which one byte, or one number, at one place is another one."""
    return _mapped(pins, field, _another)


def replaced(pins: Any, field: str, value: Any) -> Any:
    """Return a copy of pins with another value at one place."""
    return _mapped(pins, field, lambda _before: value)


def _mapped(pins: Any, field: str, change: Callable[[Any], Any]) -> Any:
    other = copy.deepcopy(pins)
    for holder, key, place in _places(other, ""):
        if place == field:
            holder[key] = change(holder[key])
            return other
    raise KeyError(field)


def _places(value: Any, field: str) -> Iterator[tuple[Any, Any, str]]:
    if isinstance(value, dict):
        prefix = f"{field}." if field else ""
        for key, item in list(value.items()):
            yield value, key, prefix + key
            yield from _places(item, prefix + key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield value, number, f"{field}[{number}]"
            yield from _places(item, f"{field}[{number}]")


def _another(value: Any) -> Any:
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    return value + 1
