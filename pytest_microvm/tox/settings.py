"""The keys ``microvm_*`` of a tox environment: the spec and grants of its machines, with trust checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.options import BY_NAME, QUOTAS
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.settings.trust import notes, shown

if TYPE_CHECKING:
    from tox.config.cli.parser import Parsed
    from tox.config.sets import EnvConfigSet

    from pytest_microvm.tox.configuration import ToxFile


class ToxKey(NamedTuple):
    """The definition of one key.

    Args:
        of_type: ``str`` or ``list[str]``.
        default: The default value.
        about: The description.
    """

    of_type: Any
    default: Any
    about: str


_QUOTAS = tuple(quota.name for quota in QUOTAS if "tox" not in quota.absent)
KEYS: Mapping[str, ToxKey] = {
    "image": ToxKey(str, BY_NAME["image"].default, BY_NAME["image"].help),
    "python": ToxKey(str, "image", BY_NAME["python"].help),
    **{name: ToxKey(str, "", BY_NAME[name].help) for name in _QUOTAS},
    "network": ToxKey(list[str], [], "rules of what the commands may reach"),
    "prepare_network": ToxKey(list[str], ["pip"], "rules of what the installation may reach"),
    "hosts": ToxKey(list[str], [], "where names lead, NAME=ADDRESS[:PORT]"),
    "secrets": ToxKey(list[str], [], "values the commands get, NAME=SOURCE"),
    "credentials": ToxKey(list[str], [], "what is added to the commands' requests on the way out"),
    "git": ToxKey(bool, False, BY_NAME["git"].help),
    "artifacts": ToxKey(list[str], [], "files of the project to copy back after the commands, globs"),
}
"""The keys, which are written with the prefix ``microvm_``."""

_GRANTS = ("network", "hosts", "secrets", "credentials")
_OPTIONS = {
    "image": "microvm_image",
    "network": "microvm_network",
    "prepare_network": "microvm_prepare_network",
}


@dataclass(frozen=True)
class ToxSettings:
    """The settings of one environment's machines.

    Args:
        spec: The machines' spec while commands run.
        prepare: The spec while dependencies are installed: a network, and no other grants.
        artifacts: Globs of the project's files to copy back.
        git: Whether machines get the history of the project.
    """

    spec: MachineSpec
    prepare: MachineSpec
    artifacts: tuple[str, ...]
    git: bool = False


def register(conf: EnvConfigSet) -> None:
    """Register the keys with tox."""
    for name, key in KEYS.items():
        conf.add_config(f"microvm_{name}", of_type=key.of_type, default=key.default, desc=key.about)


def read(conf: EnvConfigSet, options: Parsed, project: Path, file: ToxFile) -> ToxSettings:
    """Return the settings from the configuration and the command line.

    Args:
        conf: The environment's configuration.
        options: The command line's options.
        project: The folder that machines get.
        file: The configuration.

    Raises:
        UsageError: A value is invalid, or requests something that the user has not allowed.
    """
    values = {name: conf[f"microvm_{name}"] for name in KEYS}
    asked: dict[str, Any] = {
        name: list(values[name]) for name in (*_GRANTS, "prepare_network") if values[name]
    }
    if asked.get("prepare_network") == KEYS["prepare_network"].default:
        del asked["prepare_network"]  # no trust needed: tox itself would do more on this computer
    if values["python"] == "host" and conf["system_site_packages"]:
        asked["python"] = "host, with system_site_packages: all packages of that Python"
    if values["git"]:
        asked["git"] = True
    if getattr(options, "microvm_git", False):
        values["git"] = True
        asked.pop("git", None)
    for name, option in _OPTIONS.items():
        given = getattr(options, option, None)
        if given is not None:
            values[name] = given if name == "image" else _rules(given)
            asked.pop(name, None)
    _check(file, asked, _own_kit(values["image"], project, options))
    where = f"tox environment {conf.name}"
    spec = {name: values[name] for name in ("image", "python", *_QUOTAS, *_GRANTS) if values[name]}
    made = {name: spec[name] for name in ("image", *_QUOTAS) if name in spec}
    prepare = {**made, "network": values["prepare_network"], "hosts": values["hosts"]}
    return ToxSettings(
        spec=MachineSpec().with_changes({**spec, "network": values["network"]}, where),
        prepare=MachineSpec().with_changes(prepare, where),
        artifacts=tuple(values["artifacts"]),
        git=bool(values["git"]),
    )


def _rules(text: str) -> list[str]:
    rules = [rule.strip() for rule in text.split(",") if rule.strip()]
    return [] if rules == ["none"] else rules


def _own_kit(image: str, project: Path, options: Parsed) -> dict[str, Any]:
    """Return the request of the project's own kit, since the kit's commands run on this computer."""
    from pytest_microvm.tox.configuration import asked_by_image  # noqa: PLC0415 - when one is run

    return {} if getattr(options, "microvm_image", None) is not None else asked_by_image(image, project)


def _check(file: ToxFile, asked: Mapping[str, Any], kit: Mapping[str, Any]) -> None:
    """Refuse requests of a configuration that the user has not allowed (see docs/adr/0020).

    Raises:
        UsageError: A request is not allowed.
    """
    if not (asked or kit) or file.allows(kit):
        return
    lines = [f"microvm_{line}" for line in shown(json.loads(json.dumps(asked)))]
    raise UsageError(
        f"the tox configuration of {file.folder} asks for more than its own files, "
        f"and nobody has allowed that for {file.checkout}",
        details="\n".join([*lines, *shown(kit), *notes(file.folder, {**file.asked, **kit})]),
        resolution="if you trust it, say `pytest-microvm trust`; else give what it may have on the command "
        "line, such as --microvm-network pip, in place of the configuration's",
    )
