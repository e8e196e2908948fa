"""``[tool.pytest-microvm]`` of pyproject.toml, and what the command line puts on top."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.mounts import parse_mounts
from pytest_microvm.settings.options import OPTIONS, RUN, Kind, Option
from pytest_microvm.settings.reach import parse_network
from pytest_microvm.settings.spec import PARSERS, MachineSpec
from pytest_microvm.settings.trust import GRANTS
from pytest_microvm.untrusted.nofollow import read_below

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    import pytest

DEFAULT_TIMEOUT = 300.0
"""Seconds one test or command may take where neither project nor kit say."""
DEFAULT_RETRIES = 2
"""How often a test whose machine never reached it is tried again in a fresh one."""

ELSEWHERE = ("ci",)
"""Keys of the table that are no settings: ``ci`` is for :mod:`pytest_microvm.ci.definition.parsing`."""

_MAX_CONFIGURATION = 1024 * 1024  # bytes of pyproject.toml


@dataclass(frozen=True)
class Settings:
    """A project's settings, merged.

    Args:
        spec: What its machines are made of.
        isolation: How often a machine is new under ``--microvm``.
        pool: How many machines to keep ready; ``None``: as many as there are cores, at most 4.
        prepare: Shell commands run once in the machine, before the workspace is copied; the result is cached.
        prepare_inputs: Files and folders they need, which are copied first; the cache follows their content.
        prepare_network: Rules of what they may reach; the tests' own grant does not count for them.
        fail_on_denied: Whether a test fails that tried to reach what it may not.
        args: More arguments for the guest's pytest.
        keep: Which machines to keep for a look: ``never``, ``failed``.
        retries: How often a test whose machine never reached it (``infra``) is tried again.
        artifacts: The folder for what is known of machines that crashed or exceeded a quota.
        require_accel: The only accelerator that will do.
        junit_profile: For whom the file of ``--junitxml`` is; ``None``: as pytest writes it.
        asked: What the configuration file asks for of what needs trust, as written, where the command line
            says nothing else.
        project: The folder of the configuration file.
    """

    spec: MachineSpec = field(default_factory=MachineSpec)
    isolation: str = "test"
    pool: int | None = None
    prepare: tuple[str, ...] = ()
    prepare_inputs: tuple[str, ...] = ()
    prepare_network: tuple[str, ...] = ()
    fail_on_denied: bool = False
    args: tuple[str, ...] = ()
    keep: str = "never"
    retries: int = DEFAULT_RETRIES
    artifacts: Path | None = None
    require_accel: str | None = None
    junit_profile: str | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    project: Path = field(default_factory=Path.cwd)

    @property
    def pool_size(self) -> int:
        """How many machines to keep ready."""
        return min(4, os.cpu_count() or 2) if self.pool is None else self.pool


def load_settings(project: Path, options: Mapping[str, Any]) -> Settings:
    """Return the settings of the project in ``project``, with ``options`` on top.

    Args:
        project: The folder whose pyproject.toml is read, if it has one.
        options: The command line's, by the same keys; ``None`` means not given.

    Raises:
        UsageError: A key is unknown, or a value impossible.
    """
    file = project / "pyproject.toml"
    settings = Settings(project=project)
    try:
        content = read_below(project, file.name, _MAX_CONFIGURATION)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    if content is not None:
        try:
            tables = tomllib.loads(content.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} is not TOML: {error}", resolution="mend the line it names") from error
        tool = tables.get("tool", {})
        table = tool.get("pytest-microvm", {}) if isinstance(tool, dict) else {}
        if not isinstance(table, dict):
            raise UsageError(
                f"{file}: tool.pytest-microvm is not a table", resolution="write [tool.pytest-microvm]"
            )
        asked = {key: table[key] for key in GRANTS if key in table and options.get(key) is None}
        settings = replace(merged(settings, table, f"{file} [tool.pytest-microvm]"), asked=asked)
    given = {key: value for key, value in options.items() if value is not None}
    return merged(settings, given, "command line")


def command_line(config: pytest.Config) -> dict[str, Any]:
    """Return what pytest's command line says, by key; ``--microvm-args`` only add to the configuration's."""
    given = {
        option.name: config.getoption(f"microvm_{option.name}", None)
        for option in OPTIONS
        if option.kind != "words"
    }
    return {key: value for key, value in given.items() if value is not None}


def merged(settings: Settings, values: Mapping[str, Any], where: str) -> Settings:
    """Return ``settings`` with ``values`` put in.

    Raises:
        UsageError: A key is unknown, or a value impossible.
    """
    known = {*_PARSERS, *PARSERS, *ELSEWHERE}
    for key in values:
        if key not in known:
            raise UsageError(
                f"{where}: unknown key {key!r}", resolution="known keys: " + ", ".join(sorted(known))
            )
    grants = {k: v for k, v in values.items() if k in PARSERS}
    if "mounts" in grants:  # relative to the project, wherever pytest was started
        grants["mounts"] = parse_mounts(grants["mounts"], f"{where}: mounts", settings.project)
    spec = settings.spec.with_changes(grants, where)
    changes = {k: _PARSERS[k](v, f"{where}: {k}") for k, v in values.items() if k in _PARSERS}
    return replace(settings, spec=spec, **changes)


def parse_choice(*allowed: str) -> Callable[[object, str], str]:
    """Return a parser of one of ``allowed``."""

    def parse(value: object, name: str) -> str:
        if value not in allowed:
            raise UsageError(f"{name}: {value!r} is not allowed", resolution="allowed: " + ", ".join(allowed))
        return str(value)

    return parse


def parse_count(most: int, what: str) -> Callable[[object, str], int]:
    """Return a parser of whole numbers from 0 to ``most``; ``what`` is counted, for the error."""

    def parse(value: object, name: str) -> int:
        text = str(value)
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) or int(text) > most:
            raise UsageError(f"{name}: {value!r} is not a number of {what}", resolution=f"write 0 to {most}")
        return int(text)

    return parse


def parse_flag(value: object, name: str) -> bool:
    """Return a boolean.

    Raises:
        UsageError: It is none.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{name}: {value!r} is neither true nor false", resolution="write true or false")
    return value


def _folder(value: object, name: str) -> Path:
    if not isinstance(value, (str, Path)) or not str(value).strip() or "\0" in str(value):
        raise UsageError(f"{name}: {value!r} is not a folder", resolution="write its path")
    return Path(value).expanduser()


def parse_strings(value: object, name: str) -> tuple[str, ...]:
    """Return a list of texts, none of them empty.

    Raises:
        UsageError: It is none.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise UsageError(f"{name}: {value!r} is not a list of strings", resolution='write it like ["a", "b"]')
    return tuple(value)


def _arguments(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, str):
        return parse_strings(value, name)
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise UsageError(f"{name}: {value!r}: {error}", resolution="quote it as for a shell") from error


def _parser(option: Option) -> Callable[[object, str], Any]:
    if option.kind == "choice":
        return parse_choice(*option.choices)
    if option.kind == "count":
        return parse_count(option.most, option.unit)
    return _BY_KIND[option.kind]


_BY_KIND: dict[Kind, Callable[[object, str], Any]] = {
    "flag": parse_flag,
    "folder": _folder,
    "words": _arguments,
}

_PARSERS: dict[str, Callable[[object, str], Any]] = {
    **{option.name: _parser(option) for option in RUN},
    "prepare": parse_strings,
    "prepare_inputs": parse_strings,
    "prepare_network": parse_network,
}
