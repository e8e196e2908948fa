"""Errors about the values of a ``kit.toml``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_microvm.errors import KitError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def bad_value(path: Path, key: str, expected: str, value: object, resolution: str) -> KitError:
    """Return the error for a key's invalid value: the expected one, the value, and what to do."""
    return KitError(f"{path}: invalid {key}: expected {expected}, got {value!r}", resolution=resolution)


def unknown_key(path: Path, key: str, known: Iterable[str]) -> KitError:
    """Return the error for an unknown key."""
    return KitError(f"{path}: {key}: unknown key", resolution=f"known keys: {', '.join(sorted(known))}")
