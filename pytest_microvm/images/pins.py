"""Pinned versions in a kit and its parents: a child's pin replaces its parent's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_microvm.errors import KitError

_REQUIREMENT = re.compile(r"([^\[=]+)(?:\[.*\])?==(.*)")


@dataclass(frozen=True)
class _Pin:
    """One entry of a list: the text, its package and version (``None``: not pinned), and the kit's name."""

    text: str
    package: str
    version: str | None
    kit: str


def requirement(text: str) -> tuple[str, str | None]:
    """Return the normalized name and the version of a pip requirement such as ``Thing[extra]==1.0``."""
    match = _REQUIREMENT.fullmatch(text)
    assert match is not None, "the kit was checked"
    return re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]


def debian_package(text: str) -> tuple[str, str | None]:
    """Return the name and the version of a Debian package such as ``less=590-2``."""
    name, _equals, version = text.partition("=")
    return name, version or None


def merge_pins(
    kits: Iterable[tuple[Path, str, Sequence[str]]], key: str, parse: Callable[[str], tuple[str, str | None]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Merge the lists of a kit and its parents.

    Args:
        kits: The file, the name and the list of each kit, the oldest ancestor first.
        key: The list's key.
        parse: Returns the name and the version in an entry.

    Returns:
        The entries, each once, and a line for each pin that a child's pin replaced.

    Raises:
        KitError: A kit pins two versions of a package itself.
    """
    merged: list[_Pin] = []
    replaced: list[str] = []
    for path, kit, texts in kits:
        for text in texts:
            pin = _Pin(text, *parse(text), kit)
            others = [other for other in merged if _contradict(pin, other)]
            if any(other.kit == kit for other in others):
                raise KitError(
                    f"{path}: invalid {key}: expected one version of {pin.package}, got {others[0].text} and "
                    f"{text}",
                    resolution="remove one of them",
                )
            replaced += [f"{kit} pins {text} in place of {other.kit}'s {other.text}" for other in others]
            place = merged.index(others[0]) if others else len(merged)
            if not any(other.text == text for other in merged):
                merged.insert(place, pin)
            merged = [other for other in merged if other not in others]
    return tuple(pin.text for pin in merged), tuple(replaced)


def _contradict(one: _Pin, other: _Pin) -> bool:
    versions = {one.version, other.version}
    return one.package == other.package and len(versions) > 1 and None not in versions
