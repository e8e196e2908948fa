"""What a machine is made of and may use: sizes, :class:`MachineSpec`, :class:`Limits`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_microvm.credentials import CredentialSpec, parse_credentials
from pytest_microvm.errors import UsageError
from pytest_microvm.mounts import Mount, parse_mounts
from pytest_microvm.reach import Place, parse_hosts, parse_network
from pytest_microvm.secret_values import Secret, parse_secrets

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_SIZE = re.compile(r"(\d{1,18})\s*(?:([KMGT])i?)?B?", re.IGNORECASE | re.ASCII)

MIN_MEMORY = 128 * 1024**2
MIN_DISK = 16 * 1024**2
MAX_CPUS = 64
MIN_THROTTLE = 0.05
MAX_PIDS = 4 * 1024**2  # Linux's own limit (PID_MAX_LIMIT)
DEFAULT_OUTPUT = 64 * 1024**2
"""Bytes of output that one command or test may produce where nothing else is said."""


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


def parse_cpus(value: object, name: str) -> float:
    """Return how many CPUs a machine may use: 1 to 64, or a fraction from 0.05 that is throttled.

    Raises:
        UsageError: It is no such number.
    """
    text = str(value).strip()
    number = float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text, re.ASCII) else 0.0
    if isinstance(value, bool) or not MIN_THROTTLE <= number <= MAX_CPUS:
        raise UsageError(
            f"{name}: {value!r} is not a number of vCPUs",
            resolution=f"write a number from {MIN_THROTTLE} to {MAX_CPUS}; 0.5 is one vCPU half of the time",
        )
    return int(number) if number.is_integer() else number


def format_cpus(cpus: float) -> str:
    """Return a number of CPUs as people write it: ``2``, ``0.5``."""
    return f"{cpus:g}"


def parse_pids(value: object, name: str) -> int:
    """Return a number of processes and threads, at least 1.

    Raises:
        UsageError: It is not one.
    """
    return _parse_count(value, name, "processes", MAX_PIDS)


def parse_connections(value: object, name: str) -> int:
    """Return a number of connections, at least 1.

    Raises:
        UsageError: It is not one.
    """
    return _parse_count(value, name, "connections", 10**9 - 1)


def _parse_count(value: object, name: str, what: str, most: int) -> int:
    text = str(value).strip()
    if (
        isinstance(value, bool)
        or not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII)
        or not 1 <= int(text) <= most
    ):
        raise UsageError(
            f"{name}: {value!r} is not a number of {what}", resolution="write a whole number, such as 100"
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
    """What a machine is made of and what it may use. ``None`` means: what the image's kit says.

    Args:
        image: A kit's name, or a path to one.
        cpus: CPUs; a fraction is rounded up to whole vCPUs, which are throttled.
        memory: Bytes of RAM.
        disk: Bytes the machine may write to its root file system.
        pids: Processes and threads that may run in it at the same time.
        timeout: Seconds one test or command may take.
        cpu_seconds: Seconds of CPU time the machine may use in total.
        output: Bytes of stdout and stderr one command or test may produce.
        lifetime: Seconds the machine may exist, from when it is handed out.
        network_bytes: Bytes it may send to and receive from the network.
        connections: Connections it may make in total.
        bandwidth: Bytes a second, both directions together; a limit that slows down and ends nothing.
        network: Rules of what it may reach; an empty list: nothing.
        hosts: Where names lead, such as ``{"api.example.com": "127.0.0.1:8443"}``: an address, and a port if
            it is another one. A rule still has to allow the name.
        credentials: What is added to its requests on the way out, so that it never holds it.
        secrets: Values it is given at run time.
        mounts: Directories of the host it is given.
    """

    image: str = "python"
    cpus: float | None = None
    memory: int | None = None
    disk: int | None = None
    pids: int | None = None
    timeout: float | None = None
    cpu_seconds: float | None = None
    output: int | None = None
    lifetime: float | None = None
    network_bytes: int | None = None
    connections: int | None = None
    bandwidth: int | None = None
    network: tuple[str, ...] | None = None
    hosts: tuple[tuple[str, Place], ...] = ()
    credentials: tuple[CredentialSpec, ...] = ()
    secrets: tuple[Secret, ...] = ()
    mounts: tuple[Mount, ...] = ()

    def __post_init__(self) -> None:
        check_minimum("memory", "memory", self.memory)
        check_minimum("disk", "disk", self.disk)

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


def check_minimum(where: str, name: str, size: int | None) -> None:
    """Refuse a ``memory`` or ``disk`` that no machine can start with.

    Raises:
        UsageError: It is too small.
    """
    least, purpose = _LEAST[name]
    if size is not None and size < least:
        raise UsageError(
            f"{where}: {format_size(size)} is too little {purpose}",
            resolution=f"give at least {format_size(least)}",
        )


_LEAST = {"memory": (MIN_MEMORY, "to boot"), "disk": (MIN_DISK, "for a file system")}


def _parse_image(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{name}: {value!r} is not an image", resolution="write a kit's name or its path")
    return value


RESOURCE_PARSERS: dict[str, Callable[[object, str], Any]] = {
    "cpus": parse_cpus,
    "memory": parse_size,
    "disk": parse_size,
    "pids": parse_pids,
    "timeout": parse_seconds,
    "cpu_seconds": parse_seconds,
    "output": parse_size,
    "lifetime": parse_seconds,
    "network_bytes": parse_size,
    "connections": parse_connections,
    "bandwidth": parse_size,
}
"""How each quota is read: the keys that configuration, marker, fixture, command line and kit all take."""

GRANT_PARSERS: dict[str, Callable[[object, str], Any]] = {
    "network": parse_network,
    "hosts": parse_hosts,
    "credentials": parse_credentials,
    "secrets": parse_secrets,
    "mounts": lambda value, name: parse_mounts(value, name, Path.cwd()),
}
"""How what a machine may reach and hold is read."""

PARSERS: dict[str, Callable[[object, str], Any]] = {
    "image": _parse_image,
    **RESOURCE_PARSERS,
    **GRANT_PARSERS,
}


@dataclass(frozen=True)
class Limits:
    """What a running machine may use, nothing left open; its memory and disk are what it is made of.

    Args:
        cpus: CPUs; see :attr:`throttle`.
        memory: Bytes of RAM.
        disk: Bytes it may write.
        pids: Processes and threads at the same time; ``None`` here and below: as many as it can.
        timeout: Seconds one test or command may take.
        cpu_seconds: Seconds of CPU time.
        output: Bytes of stdout and stderr of one command or test; ``None``: what is collected is limited
            to :data:`DEFAULT_OUTPUT`, what is read as it comes is not.
        lifetime: Seconds it may exist.
        network_bytes: Bytes it may send to and receive from the network.
        connections: Connections it may make in total.
        bandwidth: Bytes a second, both directions together.
    """

    cpus: float
    memory: int
    disk: int
    pids: int | None = None
    timeout: float | None = None
    cpu_seconds: float | None = None
    output: int | None = None
    lifetime: float | None = None
    network_bytes: int | None = None
    connections: int | None = None
    bandwidth: int | None = None

    @property
    def vcpus(self) -> int:
        """How many vCPUs it has."""
        return max(1, math.ceil(self.cpus))

    @property
    def throttle(self) -> float | None:
        """How many CPUs its process may use where that is not a whole number, else ``None``."""
        return None if self.cpus == self.vcpus else self.cpus


@dataclass(frozen=True)
class Resources:
    """What shapes a template: vCPUs, bytes of memory, bytes of disk, and every command's environment."""

    cpus: int
    memory: int
    disk: int
    environment: tuple[tuple[str, str], ...] = field(default=())
