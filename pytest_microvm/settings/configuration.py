"""``[tool.pytest-microvm]`` of pyproject.toml, and the command-line options that override it."""

from __future__ import annotations

import os
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
from pytest_microvm.settings.spec import PARSERS, MachineSpec, parse_choice, parse_count, parse_flag
from pytest_microvm.settings.trust import GRANTS
from pytest_microvm.untrusted.nofollow import read_below

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    import pytest

DEFAULT_TIMEOUT = 300.0
"""Seconds one test or command may take if neither the project nor the kit sets a timeout."""
DEFAULT_RETRIES = 2
"""Retries, each in a fresh machine, of a test whose machine failed before the test started."""

ELSEWHERE = ("ci",)
"""Keys of the table that other modules parse: ``ci`` is for :mod:`pytest_microvm.ci.definition.parsing`."""

_MAX_CONFIGURATION = 1024 * 1024  # bytes of pyproject.toml


@dataclass(frozen=True)
class Settings:
    """A project's settings: configuration and command line, merged.

    Args:
        spec: The spec of its machines.
        isolation: The scope that shares one machine under ``--microvm``.
        fixtures: Where fixtures wider than a test are set up: ``auto``, ``fork`` (once), ``repeat``.
        pure_fixtures: Session fixtures that stand in machines that are kept for later runs, by name.
        repeat: How often each test runs; ``None``: once, and nothing is told about it.
        debug_port: A port on which debuggers listen in machines, for an IDE on this computer.
        pool: Number of machines to keep ready; ``None``: the number of cores, at most 4.
        prepare: Shell commands run once in the machine, before the workspace is copied; the result is cached.
        prepare_inputs: Files and folders that ``prepare`` needs; copied first, and part of the cache key.
        prepare_network: Network rules for ``prepare``; the tests' own grant does not apply to it.
        fail_on_denied: Whether a test fails if one of its network requests was denied.
        args: More arguments for the guest's pytest.
        keep: Which machines to keep for inspection: ``never``, ``failed``.
        retries: Times that a test is retried if its machine failed before the test started (``infra``).
        artifacts: The folder for records of machines that crashed or exceeded a quota.
        write_back: Patterns, as in a .gitignore file, of workspace files that come back from machines.
        keep_tmp: Whether the temporary folders of failed tests come back from machines.
        git: Whether machines get the history of the project.
        require_accel: The only acceptable accelerator.
        locked: Whether images must be those that ``microvm.lock`` pins.
        junit_profile: The consumer of the ``--junitxml`` file; ``None``: as pytest writes it.
        named: The keys that the configuration file has.
        asked: The configuration file's keys that need trust, as written, without those that the command line
            overrides.
        project: The folder of the configuration file.
    """

    spec: MachineSpec = field(default_factory=MachineSpec)
    isolation: str = "test"
    fixtures: str = "auto"
    pure_fixtures: tuple[str, ...] = ()
    repeat: int | None = None
    debug_port: int | None = None
    pool: int | None = None
    prepare: tuple[str, ...] = ()
    prepare_inputs: tuple[str, ...] = ()
    prepare_network: tuple[str, ...] = ()
    fail_on_denied: bool = False
    args: tuple[str, ...] = ()
    keep: str = "never"
    retries: int = DEFAULT_RETRIES
    artifacts: Path | None = None
    write_back: tuple[str, ...] = ()
    keep_tmp: bool = False
    git: bool = False
    require_accel: str | None = None
    locked: bool = False
    junit_profile: str | None = None
    named: frozenset[str] = frozenset()
    asked: Mapping[str, Any] = field(default_factory=dict)
    project: Path = field(default_factory=Path.cwd)

    @property
    def pool_size(self) -> int:
        """Number of machines to keep ready."""
        return min(4, os.cpu_count() or 2) if self.pool is None else self.pool


def load_settings(project: Path, options: Mapping[str, Any]) -> Settings:
    """Return the settings of the project in ``project``, overridden by ``options``.

    Args:
        project: The folder whose pyproject.toml is read, if it has one.
        options: Values from the command line, by the same keys; ``None`` means not given.

    Raises:
        UsageError: A key is unknown or a value invalid.
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
            raise UsageError(
                f"{file}: invalid TOML: {error}", resolution="correct the line that it names"
            ) from error
        tool = tables.get("tool", {})
        table = tool.get("pytest-microvm", {}) if isinstance(tool, dict) else {}
        if not isinstance(table, dict):
            raise UsageError(
                f"{file}: invalid tool.pytest-microvm: expected a table, got {type(table).__name__}",
                resolution="write [tool.pytest-microvm]",
            )
        asked = {key: table[key] for key in GRANTS if key in table and options.get(key) is None}
        settings = replace(merged(settings, table, f"{file} [tool.pytest-microvm]"), asked=asked)
        settings = replace(settings, named=frozenset(table))
    given = {key: value for key, value in options.items() if value is not None}
    return merged(settings, given, "command line")


def command_line(config: pytest.Config) -> dict[str, Any]:
    """Return the options given to pytest, by key, without ``--microvm-args``, which extend the file's."""
    given = {
        option.name: config.getoption(f"microvm_{option.name}", None)
        for option in OPTIONS
        if option.kind != "words"
    }
    return {key: value for key, value in given.items() if value is not None}


def merged(settings: Settings, values: Mapping[str, Any], where: str) -> Settings:
    """Return a copy of ``settings`` with ``values`` applied.

    Raises:
        UsageError: A key is unknown or a value invalid.
    """
    known = {*_PARSERS, *PARSERS, *ELSEWHERE}
    for key in values:
        if key not in known:
            raise UsageError(
                f"{where}: unknown key {key!r}", resolution="known keys: " + ", ".join(sorted(known))
            )
    grants = {k: v for k, v in values.items() if k in PARSERS}
    if "mounts" in grants:  # relative to the project, not to the folder that pytest was started in
        grants["mounts"] = parse_mounts(grants["mounts"], f"{where}: mounts", settings.project)
    spec = settings.spec.with_changes(grants, where)
    changes = {k: _PARSERS[k](v, f"{where}: {k}") for k, v in values.items() if k in _PARSERS}
    return replace(settings, spec=spec, **changes)


def _folder(value: object, name: str) -> Path:
    if not isinstance(value, (str, Path)) or not str(value).strip() or "\0" in str(value):
        raise UsageError(
            f"{name}: invalid folder: expected a path, got {value!r}", resolution='write it like "reports"'
        )
    return Path(value).expanduser()


def parse_strings(value: object, name: str) -> tuple[str, ...]:
    """Return a list of non-empty strings as a tuple.

    Raises:
        UsageError: It is not such a list.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise UsageError(
            f"{name}: invalid list: expected strings that are not empty, got {value!r}",
            resolution='write it like ["a", "b"]',
        )
    return tuple(value)


def _arguments(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, str):
        return parse_strings(value, name)
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise UsageError(
            f"{name}: invalid arguments: expected words as in a shell, got {value!r} ({error})",
            resolution="close the quotation, or escape the quotation mark",
        ) from error


def _patterns(value: object, name: str) -> tuple[str, ...]:
    from pathspec import GitIgnoreSpec  # noqa: PLC0415 - few runs have patterns

    patterns = parse_strings(value, name)
    for pattern in patterns:
        try:
            GitIgnoreSpec.from_lines([pattern])
        except ValueError as error:
            raise UsageError(
                f"{name}: invalid pattern: expected one as in a .gitignore file, got {pattern!r} ({error})",
                resolution='write it like "docs/*.png" or "**/__snapshots__/**"',
            ) from error
    return patterns


def _names(value: object, name: str) -> tuple[str, ...]:
    names = parse_strings(value, name)
    for each in names:
        if not each.isprintable() or " " in each:
            raise UsageError(
                f"{name}: invalid name: expected one without spaces, got {each!r}",
                resolution='write it like "database"',
            )
    return names


def _parser(option: Option) -> Callable[[object, str], Any]:
    if option.kind == "choice":
        return parse_choice(*option.choices)
    if option.kind == "count":
        return parse_count(option)
    return _BY_KIND[option.kind]


_BY_KIND: dict[Kind, Callable[[object, str], Any]] = {
    "flag": parse_flag,
    "folder": _folder,
    "patterns": _patterns,
    "names": _names,
    "words": _arguments,
}

_PARSERS: dict[str, Callable[[object, str], Any]] = {
    **{option.name: _parser(option) for option in RUN},
    "prepare": parse_strings,
    "prepare_inputs": parse_strings,
    "prepare_network": parse_network,
}
