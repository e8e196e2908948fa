"""The settings that a GitLab runner's operator makes for all jobs: a TOML file that no job can change."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_microvm.ci.gitlab.holding import spec_of
from pytest_microvm.errors import UsageError
from pytest_microvm.network.policy.rules import parse_rules
from pytest_microvm.settings.options import MACHINE
from pytest_microvm.settings.spec import parse_choice, parse_seconds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLE = "PYTEST_MICROVM_GITLAB_CONFIG"
DEFAULT_FILE = Path("/etc/pytest-microvm/gitlab.toml")
GITLAB = "gitlab"
"""The network rule that stands for the host of the job's GitLab."""

_SHELLS = ("bash", "sh")
_OUTPUTS = ("safe", "raw")
_FOLDER = re.compile(r"/[\w./-]{1,200}", re.ASCII)
_MACHINE_KEYS = {option.name for option in MACHINE if "gitlab" not in option.absent}


@dataclass(frozen=True)
class GitlabSettings:
    """The operator's settings for the machines of jobs.

    Args:
        image: The kit for jobs that request no image: a name, or a path.
        images: The kits by the names that jobs may use in ``image:``; any other name is rejected.
        machine: Fields of :class:`MachineSpec`, as written.
        protected: Further fields, for jobs of protected branches and tags only.
        shell: The shell that runs the runner's scripts in the machine: ``bash`` or ``sh``.
        output: ``safe`` removes control sequences from the job's log; ``raw`` passes it unchanged.
        builds_dir: The folder in the machine where projects are built.
        cache_dir: The folder in the machine for the runner's cache.
        lifetime: Maximum lifetime of a machine in seconds, whatever the job's timeout.
        idle: Seconds without a stage after which a machine is ended: its runner is gone.
        grace: Seconds between SIGTERM and SIGKILL for a cancelled script.
        folder: The base folder of relative paths in the settings.
    """

    image: str = "agent"
    images: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    protected: Mapping[str, Any] = field(default_factory=dict)
    shell: str = "bash"
    output: str = "safe"
    builds_dir: str = "/builds"
    cache_dir: str = "/cache"
    lifetime: float = 4 * 3600.0
    idle: float = 900.0
    grace: float = 10.0
    folder: Path = Path("/")

    def values(self, *, protected: bool) -> dict[str, Any]:
        """Return the spec's fields for a job, as written."""
        return {**self.machine, **(self.protected if protected else {})}


def find_settings(path: Path | None) -> GitlabSettings:
    """Load the operator's settings from the given file, the one named by the variable, or the default file.

    If none exists, the defaults apply: one image, no network.

    Raises:
        UsageError: The file is unreadable or invalid.
    """
    named = path or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    file = named or DEFAULT_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if named is None:
            return GitlabSettings()
        raise UsageError(f"{file} does not exist", resolution="write it, or leave the option out") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    return parse_settings(text, str(file), file.absolute().parent)


def parse_settings(text: str, where: str, folder: Path) -> GitlabSettings:
    """Return settings from TOML.

    Raises:
        UsageError: A key is unknown or a value invalid; the error names the key.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {error}", resolution="correct that line") from error
    for key in table:
        if key not in _PARSERS:
            raise UsageError(
                f"{where}: unknown key {key!r}", resolution="known keys: " + ", ".join(sorted(_PARSERS))
            )
    settings = GitlabSettings(folder=folder)
    values = {key: _PARSERS[key](value, f"{where}: {key}") for key, value in table.items()}
    settings = replace(settings, **values)
    for protected in (False, True):
        table = machine_values(
            settings, settings.image, protected=protected, host="gitlab.example", where=where
        )
        parse_rules(table["network"], f"{where}: network")
    return settings


def machine_values(
    settings: GitlabSettings, image: str, *, protected: bool, host: str | None, where: str
) -> dict[str, Any]:
    """Return the spec of a job's machine: fields of :class:`MachineSpec`, as written.

    Args:
        settings: The operator's settings.
        image: The kit.
        protected: Whether the job's branch or tag is protected.
        host: The host, with a port if needed, of the job's GitLab; ``None`` if not reliably known.
        where: The source of the values, for errors.

    Raises:
        UsageError: A value is invalid, or the rule ``gitlab`` is used without a known host.
    """
    kit = str(settings.folder / image) if "/" in image else image
    values = {"network": [], **settings.values(protected=protected), "image": kit}
    rules = values["network"]
    if isinstance(rules, list) and GITLAB in rules:
        if host is None:
            raise UsageError(
                f"{where}: network = {GITLAB!r}: the runner does not say which GitLab the job comes from",
                resolution="write the host itself, or use a gitlab-runner that sets JOB_RESPONSE_FILE",
            )
        values["network"] = [host if rule == GITLAB else rule for rule in rules]
    spec_of(values, settings.folder, where)
    return values


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name}: {value!r} is not a name", resolution='write it like "agent"')
    return value


def _guest_folder(value: object, name: str) -> str:
    text = _text(value, name)
    if not _FOLDER.fullmatch(text) or ".." in text.split("/"):
        raise UsageError(f"{name}: {text!r} is no folder in a machine", resolution='write it like "/builds"')
    return text


def _images(value: object, name: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UsageError(
            f"{name} is not a table", resolution='write [images] and lines like "python" = "python"'
        )
    return {_text(key, name): _text(kit, f"{name}.{key}") for key, kit in value.items()}


def _machine(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not set(value) <= _MACHINE_KEYS:
        unknown = sorted(set(value) - _MACHINE_KEYS) if isinstance(value, dict) else value
        raise UsageError(
            f"{name}: {unknown} cannot be used", resolution="known keys: " + ", ".join(sorted(_MACHINE_KEYS))
        )
    return dict(value)


_PARSERS: dict[str, Callable[[object, str], Any]] = {
    "image": _text,
    "images": _images,
    "machine": _machine,
    "protected": _machine,
    "shell": parse_choice(*_SHELLS),
    "output": parse_choice(*_OUTPUTS),
    "builds_dir": _guest_folder,
    "cache_dir": _guest_folder,
    "lifetime": parse_seconds,
    "idle": parse_seconds,
    "grace": parse_seconds,
}
KEYS = tuple(_PARSERS)
"""Every key of the file."""
