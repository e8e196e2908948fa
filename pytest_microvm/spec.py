"""What a machine is made of: sizes and :class:`MachineSpec`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pytest_microvm.errors import UsageError

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_SIZE = re.compile(r"(\d{1,18})\s*(?:([KMGT])i?)?B?", re.IGNORECASE | re.ASCII)

MIN_MEMORY = 128 * 1024**2
MIN_DISK = 16 * 1024**2
MAX_CPUS = 64


def parse_size(value: object, name: str) -> int:
    """Return a size in bytes from ``512M``, ``2G`` (binary units) or a number of bytes.

    Args:
        value: What was written.
        name: What it was written for, for the error.

    Raises:
        UsageError: It is not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or int(match[1]) == 0:
        raise UsageError(
            f"{name}: {value!r} is not a size",
            resolution="write a number of bytes, or a number with K, M, G or T (binary), such as 512M",
        )
    return int(match[1]) * _UNITS[(match[2] or "").upper()]


def format_size(size: int) -> str:
    """Return ``size`` bytes as people write it: ``512M``, ``2G``; bytes where no unit fits exactly."""
    for unit in ("T", "G", "M", "K"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


def parse_cpus(value: object, name: str) -> int:
    """Return a number of vCPUs between 1 and 64.

    Raises:
        UsageError: It is not one.
    """
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_CPUS:
        raise UsageError(
            f"{name}: {value!r} is not a number of vCPUs", resolution=f"write a whole number, 1 to {MAX_CPUS}"
        )
    return int(text)


def parse_seconds(value: object, name: str) -> float:
    """Return a positive number of seconds.

    Raises:
        UsageError: It is not one.
    """
    try:
        seconds = (
            float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else 0.0
        )
    except (ValueError, OverflowError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(
            f"{name}: {value!r} is not a time", resolution="write a number of seconds above 0, such as 30"
        )
    return seconds


@dataclass(frozen=True)
class MachineSpec:
    """What a machine is made of. ``None`` means: what the image's kit says.

    Args:
        image: A kit's name, or a path to one.
        cpus: Virtual CPUs.
        memory: Bytes of RAM.
        disk: Bytes the machine may write to its root file system.
        timeout: Seconds one test or command may take.
    """

    image: str = "python"
    cpus: int | None = None
    memory: int | None = None
    disk: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory < MIN_MEMORY:
            raise UsageError(
                f"memory: {format_size(self.memory)} is too little to boot",
                resolution=f"give at least {format_size(MIN_MEMORY)}",
            )
        if self.disk is not None and self.disk < MIN_DISK:
            raise UsageError(
                f"disk: {format_size(self.disk)} is too little for a file system",
                resolution=f"give at least {format_size(MIN_DISK)}",
            )

    def with_changes(self, values: Mapping[str, Any], where: str) -> MachineSpec:
        """Return a spec with ``values`` (as people write them) put in.

        Args:
            values: Any of the fields above; sizes as text or bytes.
            where: What the values were written in, for errors: ``marker``, ``pyproject.toml``...

        Raises:
            UsageError: A key is unknown or a value impossible.
        """
        unknown = sorted(set(values) - set(PARSERS))
        if unknown:
            raise UsageError(
                f"{where}: unknown key {unknown[0]!r}", resolution="known keys: " + ", ".join(sorted(PARSERS))
            )
        parsed: dict[str, Any] = {
            key: PARSERS[key](value, f"{where}: {key}") for key, value in values.items()
        }
        return replace(self, **parsed)


def _parse_image(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{name}: {value!r} is not an image", resolution="write a kit's name or its path")
    return value


PARSERS = {
    "image": _parse_image,
    "cpus": parse_cpus,
    "memory": parse_size,
    "disk": parse_size,
    "timeout": parse_seconds,
}


@dataclass(frozen=True)
class Resources:
    """What a machine really gets, nothing left open: vCPUs, bytes of memory, bytes of disk."""

    cpus: int
    memory: int
    disk: int
    environment: tuple[tuple[str, str], ...] = field(default=())
