"""The inputs of the GitHub Action: validate them, and save them for later steps."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pytest_microvm.errors import UsageError
from pytest_microvm.reports.profiles import PROFILES
from pytest_microvm.settings.options import BY_NAME

MODES = ("pytest", "ci")
_FILE = "inputs.json"
_ACCELERATORS = BY_NAME["require_accel"].choices
_FOR_CI = ("branches", "definition-from")
# Options that an input sets, and that `args` therefore must not contain.
_SET = {
    "pytest": {
        "--junitxml": "output", "--junit-xml": "output", "--microvm-artifacts": "output",
        "--microvm-image": "image", "--microvm-require-accel": "require-accel",
        "--microvm-junit-profile": "junit-profile", "--microvm-reports": "output",
    },
    "ci": {
        "--output": "output", "--branch": "branches", "--ref": "branches", "--junit-profile": "junit-profile",
        "--require-accel": "require-accel", "--definition-from": "definition-from",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """The validated inputs of the action.

    Args:
        mode: ``pytest`` runs the project's suite in machines; ``ci`` runs its jobs for each branch.
        args: Further arguments for the command.
        image: The kit; empty: the project's setting.
        project: The project's folder.
        output: The folder for results.
        junit_profile: The profile of the JUnit report, named after its reader.
        branches: Globs of branches, for ``ci``; none: the commit that is checked out.
        definition_from: The ref that defines the jobs, for ``ci``; empty: the default branch.
        require_accel: The only acceptable accelerator; empty: any.
        trust: Whether the job grants all requests of the project's configuration.
        cache_key: A further part of this job's cache keys.
        default_branch: The default branch according to GitHub; empty: unknown.
    """

    mode: str
    args: tuple[str, ...]
    image: str
    project: Path
    output: Path
    junit_profile: str
    branches: tuple[str, ...]
    definition_from: str
    require_accel: str
    trust: bool
    cache_key: str
    default_branch: str

    def save(self, folder: Path) -> None:
        """Save the inputs for later steps."""
        text = json.dumps(asdict(self), default=str)
        (folder / _FILE).write_text(text, encoding="utf-8")


def saved_inputs(folder: Path) -> Inputs:
    """Return the inputs that :meth:`Inputs.save` wrote.

    Raises:
        UsageError: The folder has no saved inputs.
    """
    try:
        data: dict[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} is no folder of the action: {error}", resolution="begin with `github plan`"
        ) from error
    lists = {name: tuple(data[name]) for name in ("args", "branches")}
    return Inputs(**{**data, **lists, "project": Path(data["project"]), "output": Path(data["output"])})


def read_inputs(environ: Mapping[str, str], folder: Path) -> Inputs:
    """Return the action's inputs from its step's environment variables: ``INPUT_MODE`` and so on.

    Args:
        environ: The environment variables.
        folder: The action's own folder, for results if the inputs name no other.

    Raises:
        UsageError: An input is invalid.
    """

    def given(name: str) -> str:
        return environ.get(f"INPUT_{name.upper().replace('-', '_')}", "").strip()

    mode = _choice("mode", given("mode") or MODES[0], MODES)
    project = Path(given("working-directory") or ".").absolute()
    if not project.is_dir():
        raise UsageError(
            f"working-directory: {project} is no folder", resolution="check the repository out before"
        )
    for name in _FOR_CI:
        if mode != "ci" and given(name):
            raise UsageError(f"{name} is for mode: ci", resolution=f"write mode: ci, or leave {name} out")
    if mode == "ci" and given("image"):
        raise UsageError("image is for mode: pytest", resolution="write it in the jobs' definition")
    return Inputs(
        mode=mode,
        args=_arguments(given("args"), mode),
        image=given("image"),
        project=project,
        output=(project / given("output")) if given("output") else folder / "results",
        junit_profile=_choice("junit-profile", given("junit-profile") or "github", tuple(PROFILES)),
        branches=tuple(given("branches").split()),
        definition_from=given("definition-from"),
        require_accel=_choice("require-accel", given("require-accel"), ("", *_ACCELERATORS)),
        trust=_choice("trust", given("trust") or "false", ("true", "false")) == "true",
        cache_key=_cache_key(given("cache-key")),
        default_branch=given("default-branch"),
    )


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise UsageError(
            f"{name}: {value!r} is not allowed", resolution="allowed: " + ", ".join(filter(None, allowed))
        )
    return value


def _arguments(text: str, mode: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"args: {text!r}: {error}", resolution="quote it as for a shell") from error
    for word in words:
        option = word.partition("=")[0]
        if option in _SET[mode]:
            raise UsageError(
                f"args: {option} is set by the action", resolution=f"use the input {_SET[mode][option]}"
            )
    return words


def _cache_key(text: str) -> str:
    # GitHub allows no comma, and at most 512 characters together with ours.
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,100}", text):
        raise UsageError(
            f"cache-key: {text!r} is not allowed",
            resolution="at most 100 letters, digits, dots, dashes and underscores",
        )
    return text
