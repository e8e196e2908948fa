"""What the operator of a GitLab runner gives to jobs: a TOML file that no job can change."""

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
from pytest_microvm.settings.configuration import parse_choice
from pytest_microvm.settings.options import MACHINE
from pytest_microvm.settings.spec import parse_seconds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLE = "PYTEST_MICROVM_GITLAB_CONFIG"
DEFAULT_FILE = Path("/etc/pytest-microvm/gitlab.toml")
GITLAB = "gitlab"
"""As a network rule: the host of the GitLab that the job comes from."""

_SHELLS = ("bash", "sh")
_OUTPUTS = ("safe", "raw")
_FOLDER = re.compile(r"/[\w./-]{1,200}", re.ASCII)
_MACHINE_KEYS = {option.name for option in MACHINE if "gitlab" not in option.absent}


@dataclass(frozen=True)
class GitlabSettings:
    """What machines of jobs are made of and given; every value is the operator's.

    Args:
        image: The kit where a job asks for no image: a name, or a path.
        images: Which kit a job gets by the name in its ``image:``; no other name is accepted.
        machine: Fields of :class:`MachineSpec`, as written.
        protected: The same on top, for jobs of protected branches and tags alone.
        shell: What runs the runner's scripts in the machine: ``bash`` or ``sh``.
        output: ``safe``: the job's log is text in which nothing can act; ``raw``: as it comes.
        builds_dir: Where projects are built in the machine.
        cache_dir: Where the runner's cache is in the machine.
        lifetime: Seconds a machine may exist at most, whatever a job's timeout says.
        idle: Seconds without a stage after which a machine is ended: its runner is gone.
        grace: Seconds that a cancelled script has between SIGTERM and SIGKILL.
        folder: What relative paths in it are relative to.
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
        """Return the fields of the spec for a job, as written."""
        return {**self.machine, **(self.protected if protected else {})}


def find_settings(path: Path | None) -> GitlabSettings:
    """Return the operator's settings: the file given, the one named by the variable, or the usual one.

    Without any of them the defaults hold: one image, no network.

    Raises:
        UsageError: It cannot be read or used.
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
        UsageError: A key is unknown or a value impossible; it names the key.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {error}", resolution="mend the line it names") from error
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
    """Return what a job's machine is made of: fields of :class:`MachineSpec`, as written.

    Args:
        settings: The operator's.
        image: The kit.
        protected: Whether the job's branch or tag is protected.
        host: The host, and perhaps port, of the GitLab that the job comes from; ``None``: not known for sure.
        where: What the values were written in, for errors.

    Raises:
        UsageError: A value is impossible, or the rule ``gitlab`` leads nowhere.
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
