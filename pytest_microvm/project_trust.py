"""Whether a project may ask for what reaches beyond it: network, secrets, credentials, directories.

``pytest --microvm`` runs suites that nobody read, and a branch brings its own pyproject.toml. What that asks
for is given only if this user has said so for exactly these words (as direnv and mise do). Whoever runs the
tests on this computer anyway, as with the ``microvm`` fixture, is not asked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs

from pytest_microvm.errors import UsageError

VARIABLE = "PYTEST_MICROVM_TRUST"
"""``1`` where whoever starts the run answers for the project, such as a CI job on branches of its own."""

GRANTS = ("image", "network", "prepare_network", "hosts", "credentials", "secrets", "mounts")
"""The keys of the configuration that need it; an image does if its kit is the project's own."""


def check(project: Path, asked: Mapping[str, Any]) -> None:
    """Refuse what a project asks for if nobody has allowed it.

    Args:
        project: Its folder.
        asked: What its configuration asks for, by key, as written; what the command line says instead is not
            among it.

    Raises:
        UsageError: Nobody has.
    """
    asked = {key: value for key, value in asked.items() if value}
    if not asked or os.environ.get(VARIABLE) == "1" or is_trusted(project, asked):
        return
    raise UsageError(
        f"the configuration of {project} asks for more than its own files, and nobody has allowed that",
        details="\n".join(shown(asked)),
        resolution="if you trust it, say `pytest-microvm trust`; else give what it may have on the command "
        "line, such as --microvm-network pip, in place of the configuration's",
    )


def shown(asked: Mapping[str, Any]) -> list[str]:
    """Return what is asked for, a line for each key."""
    return [f"{key} = {json.dumps(value, default=str)}" for key, value in sorted(asked.items())]


def is_trusted(project: Path, asked: Mapping[str, Any]) -> bool:
    """Whether this user has allowed the project exactly that, or all of it and more keys."""
    try:
        known = json.loads(_file(project).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(known, dict) and all(known.get(key) == _digest(value) for key, value in asked.items())


def trust(project: Path, asked: Mapping[str, Any]) -> None:
    """Remember that this user allows the project what it asks for now; a change of it will be asked about.

    Raises:
        UsageError: It cannot be written down.
    """
    file = _file(project)
    known = {key: _digest(value) for key, value in asked.items()}
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft.write_text(json.dumps({**known, "project": str(project.resolve())}), encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error


def revoke(project: Path) -> bool:
    """Forget what was allowed; return whether anything was."""
    try:
        _file(project).unlink()
    except FileNotFoundError:
        return False
    return True


def _file(project: Path) -> Path:
    name = hashlib.sha256(os.fsencode(project.resolve())).hexdigest()[:32]
    return platformdirs.user_state_path("pytest-microvm") / "trusted" / f"{name}.json"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
