"""Composition and quotas of a machine: size parsing, :class:`MachineSpec`, :class:`Limits`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.credentials import CredentialSpec, parse_credentials
from pytest_microvm.settings.mounts import Mount, parse_mounts
from pytest_microvm.settings.options import BY_NAME, MACHINE, QUOTAS, Kind, Option
from pytest_microvm.settings.reach import Place, parse_hosts, parse_network
from pytest_microvm.settings.secret_values import Secret, parse_secrets

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_SIZE = re.compile(r"(\d{1,18})\s*(?:([KMGT])i?)?B?", re.IGNORECASE | re.ASCII)

DEFAULT_OUTPUT = 64 * 1024**2
"""Bytes of output that one command or test may produce by default."""


def parse_size(value: object, name: str) -> int:
    """Parse a size such as ``512M`` or ``2G`` (binary units), or a number of bytes, into bytes.

    Args:
        value: The value to parse.
        name: The setting's name, for the error.

    Raises:
        UsageError: The value is not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or int(match[1]) == 0:
        raise UsageError(
            f"{name}: invalid size: expected bytes, or a number with K, M, G or T, got {value!r}",
            resolution="write it like 512M; the units are binary",
        )
    return int(match[1]) * _UNITS[(match[2] or "").upper()]


def format_size(size: int) -> str:
    """Format ``size`` bytes as users write sizes: ``512M``, ``2G``; bytes where no unit fits exactly."""
    for unit in ("T", "G", "M", "K"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


def parse_cpus(value: object, name: str) -> float:
    """Parse a number of CPUs from 0.05 to 64; a fraction means throttled CPUs.

    Raises:
        UsageError: The value is not such a number.
    """
    least, most = BY_NAME["cpus"].least, BY_NAME["cpus"].most
    text = str(value).strip()
    number = float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text, re.ASCII) else 0.0
    if isinstance(value, bool) or not least <= number <= most:
        raise UsageError(
            f"{name}: invalid number of vCPUs: expected {least} to {most}, got {value!r}",
            resolution="write it like 2; 0.5 is one vCPU half of the time",
        )
    return int(number) if number.is_integer() else number


def format_cpus(cpus: float) -> str:
    """Format a number of CPUs as users write it: ``2``, ``0.5``."""
    return f"{cpus:g}"


def parse_count(option: Option) -> Callable[[object, str], int]:
    """Return a parser of whole numbers in an option's range."""
    least, most = int(option.least), option.most

    def parse(value: object, name: str) -> int:
        text = "" if isinstance(value, bool) else str(value).strip()
        if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or not least <= int(text) <= most:
            raise UsageError(
                f"{name}: invalid number of {option.unit}: expected {least} to {most}, got {value!r}",
                resolution="write a whole number in this range",
            )
        return int(text)

    return parse


def parse_flag(value: object, name: str) -> bool:
    """Return ``value``, which must be a boolean.

    Raises:
        UsageError: It is not a boolean.
    """
    if not isinstance(value, bool):
        raise UsageError(
            f"{name}: invalid flag: expected true or false, got {value!r}",
            resolution="write it without quotes",
        )
    return value


def parse_seconds(value: object, name: str) -> float:
    """Parse a positive number of seconds.

    Raises:
        UsageError: The value is not such a number.
    """
    try:
        seconds = (
            float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else 0.0
        )
    except (ValueError, OverflowError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(
            f"{name}: invalid time: expected a number of seconds above 0, got {value!r}",
            resolution="write it like 30",
        )
    return seconds


@dataclass(frozen=True)
class MachineSpec:
    """Composition, quotas and grants of a machine. ``None`` means the default of the image's kit.

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
        bandwidth: Bytes per second, both directions together; excess traffic is slowed down, not ended.
        network: Rules for the network it may reach; an empty list: nothing.
        hosts: Addresses for host names, such as ``{"api.example.com": "127.0.0.1:8443"}``: an address, and a
            port if it differs from the requested one. A rule still has to allow the name.
        credentials: Credentials added to its requests on the way out; the machine never holds them.
        secrets: Values it gets at run time.
        mounts: Host directories it gets.
        python: ``host``: the environment that runs this process is mirrored into the machine; ``image``: its
            Python is the image's. ``None``: ``image``, and ``host`` with ``--microvm`` if no image is named.
        nested: Whether it has a CPU on which it can run machines of its own with KVM.
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
    python: str | None = None
    nested: bool = False

    def __post_init__(self) -> None:
        for option in QUOTAS:
            if option.kind == "size":
                check_minimum(option.name, option.name, getattr(self, option.name))

    def with_changes(self, values: Mapping[str, Any], where: str) -> MachineSpec:
        """Return a copy of the spec with ``values`` (as users write them) parsed and applied.

        Args:
            values: Any of the fields above; sizes as text or bytes.
            where: The place that the values come from, for errors: ``marker``, ``pyproject.toml``...

        Raises:
            UsageError: A key is unknown or a value invalid.
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
    """Check that a size, such as ``memory``, is large enough for a machine to start.

    Raises:
        UsageError: It is too small.
    """
    option = BY_NAME[name]
    if size is not None and size < option.least:
        raise UsageError(
            f"{where}: invalid size: expected at least {format_size(int(option.least))} {option.least_for}, "
            f"got {format_size(size)}",
            resolution=f"give at least {format_size(int(option.least))}",
        )


def parse_choice(*allowed: str) -> Callable[[object, str], str]:
    """Return a parser that accepts one of ``allowed``."""

    def parse(value: object, name: str) -> str:
        if value not in allowed:
            raise UsageError(
                f"{name}: invalid value: expected one of {', '.join(allowed)}, got {value!r}",
                resolution="write one of these",
            )
        return str(value)

    return parse


def _parse_image(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(
            f"{name}: invalid image: expected a kit's name or path, got {value!r}",
            resolution="write it like python, or images/mine",
        )
    return value


_BY_KIND: dict[Kind, Callable[[object, str], Any]] = {
    "kit": _parse_image,
    "flag": parse_flag,
    "cpus": parse_cpus,
    "size": parse_size,
    "seconds": parse_seconds,
    "rules": parse_network,
    "hosts": parse_hosts,
    "credentials": parse_credentials,
    "secrets": parse_secrets,
    "mounts": lambda value, name: parse_mounts(value, name, Path.cwd()),
}


def _parser(option: Option) -> Callable[[object, str], Any]:
    if option.kind == "choice":
        return parse_choice(*option.choices)
    return parse_count(option) if option.kind == "count" else _BY_KIND[option.kind]


PARSERS: dict[str, Callable[[object, str], Any]] = {option.name: _parser(option) for option in MACHINE}
"""The parser of each field of a spec."""


@dataclass(frozen=True)
class Limits:
    """Quotas of a running machine with all defaults resolved; memory and disk are its actual sizes.

    The quotas are those of :class:`MachineSpec`; ``None`` means unlimited. Without ``output``, collected
    output is limited to :data:`DEFAULT_OUTPUT`; streamed output is not.
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
        """Number of vCPUs."""
        return max(1, math.ceil(self.cpus))

    @property
    def throttle(self) -> float | None:
        """Number of CPUs to throttle its process to; ``None`` if ``cpus`` is a whole number."""
        return None if self.cpus == self.vcpus else self.cpus


@dataclass(frozen=True)
class Resources:
    """What is built into a template.

    Args:
        cpus: vCPUs.
        memory: Bytes of memory.
        disk: Bytes of disk.
        environment: Every command's environment.
        nested: Whether it can run machines of its own with KVM.
    """

    cpus: int
    memory: int
    disk: int
    environment: tuple[tuple[str, str], ...] = field(default=())
    nested: bool = False
