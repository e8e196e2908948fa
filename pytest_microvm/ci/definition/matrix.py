"""A job's matrix: the combinations of its values, and substitution of ``${matrix.NAME}``."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from pytest_microvm.ci.definition.values import not_a_table
from pytest_microvm.errors import UsageError

NAME = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
RESERVED = ("exclude", "include")
MOST = 256
"""Maximum number of combinations of one matrix, and of jobs of one definition."""

_USE = re.compile(r"\$\{matrix\.([^}]*)\}")
_LENGTH = 200  # characters of a value, which becomes part of a job's name

Combination = tuple[tuple[str, str], ...]


def parse_matrix(value: object, where: str) -> tuple[Combination, ...]:
    """Return the combinations of a table such as ``{python = ["3.11", "3.12"]}``, in its order.

    ``exclude`` is a list of tables: combinations that have all values of one table are left out. ``include``
    is a list of tables, each with a value for every name: these combinations are added.

    Raises:
        UsageError: The value is no such table, or no combination is left.
    """
    if not isinstance(value, Mapping):
        raise not_a_table(value, where, '{python = ["3.11", "3.12"]}')
    axes = {name: _axis(name, values, where) for name, values in value.items() if name not in RESERVED}
    if not axes:
        raise UsageError(
            f"{where}: invalid matrix: expected a name with values, got none",
            resolution='write {python = ["3.11", "3.12"]}',
        )
    if len({name.lower() for name in axes}) < len(axes):
        raise UsageError(f"{where}: two names differ in case alone", resolution="rename one")
    if math.prod(map(len, axes.values())) > MOST:
        raise UsageError(
            f"{where}: invalid matrix: expected at most {MOST} combinations, got more",
            resolution="make the matrix smaller",
        )
    found = [tuple(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    for position, entry in enumerate(_entries(value, "exclude", where)):
        place = f"{where}.exclude[{position}]"
        left_out = _pairs(entry, axes, place)
        kept = [combination for combination in found if not left_out <= set(combination)]
        if len(kept) == len(found):
            raise UsageError(f"{place}: no combination has these values", resolution="write values it has")
        found = kept
    for position, entry in enumerate(_entries(value, "include", where)):
        place = f"{where}.include[{position}]"
        added = dict(_pairs(entry, axes, place))
        if set(added) != set(axes):
            raise UsageError(f"{place}: a value is missing", resolution="name all of " + ", ".join(axes))
        found.append(tuple((name, added[name]) for name in axes))
    found = list(dict.fromkeys(found))
    if not 0 < len(found) <= MOST:
        raise UsageError(
            f"{where}: invalid matrix: expected 1 to {MOST} combinations, got {len(found)}",
            resolution="exclude fewer of them, or include fewer",
        )
    return tuple(found)


def substituted(value: Any, combination: Combination, where: str) -> Any:
    """Return ``value`` with every ``${matrix.NAME}`` in its texts replaced; any other ``$`` is kept.

    Raises:
        UsageError: The matrix has no such name.
    """
    if isinstance(value, str):
        values = dict(combination)

        def replaced(use: re.Match[str]) -> str:
            if use[1] not in values:
                raise UsageError(
                    f"{where}: {use[0]}: the job's matrix has no {use[1]!r}",
                    resolution="names of the matrix: " + (", ".join(values) or "none, the job has no matrix"),
                )
            return values[use[1]]

        return _USE.sub(replaced, value)
    if isinstance(value, list):
        return [substituted(item, combination, where) for item in value]
    if isinstance(value, Mapping):
        return {key: substituted(item, combination, f"{where}.{key}") for key, item in value.items()}
    return value


def _axis(name: object, values: object, where: str) -> tuple[str, ...]:
    if not isinstance(name, str) or not re.fullmatch(NAME, name, re.ASCII):
        raise UsageError(
            f"{where}: invalid name: expected letters, digits and underscores, got {name!r}",
            resolution="name it as a variable of the shell",
        )
    if not isinstance(values, list) or not values:
        raise UsageError(
            f"{where}.{name}: invalid values: expected a list of one or more",
            resolution='write it like ["3.11", "3.12"]',
        )
    found = tuple(_value(item, f"{where}.{name}") for item in values)
    if len(set(found)) < len(found):
        raise UsageError(f"{where}.{name}: a value is there twice", resolution="write it once")
    return found


def _value(value: object, where: str) -> str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        text = str(value)
        if 0 < len(text) <= _LENGTH and text.isprintable():
            return text
    raise UsageError(
        f"{where}: invalid value: expected a number, or 1 to {_LENGTH} printable characters, got {value!r}",
        resolution="write a short text",
    )


def _entries(table: Mapping[str, object], key: str, where: str) -> list[Any]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise UsageError(
            f"{where}.{key}: invalid value: expected a list of tables, got {type(value).__name__}",
            resolution='write [{python = "3.11"}]',
        )
    return value


def _pairs(entry: object, axes: Mapping[str, object], where: str) -> set[tuple[str, str]]:
    if not isinstance(entry, Mapping) or not entry:
        raise UsageError(
            f"{where}: invalid value: expected a table with values", resolution='write {python = "3.11"}'
        )
    for name in entry:
        if name not in axes:
            raise UsageError(
                f"{where}: the matrix has no {name!r}", resolution="names of the matrix: " + ", ".join(axes)
            )
    return {(name, _value(value, f"{where}.{name}")) for name, value in entry.items()}
