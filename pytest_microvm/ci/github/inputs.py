"""The inputs of the GitHub Action: what they may be, and how later steps get them."""

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
# What an input says, and so `args` does not.
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
    """What a job asked the action for.

    Args:
        mode: ``pytest``: the project's suite in machines; ``ci``: its jobs for each branch.
        args: More arguments for the command that is run.
        image: The kit; empty: what the project says.
        project: The folder of the project.
        output: The folder for results.
        junit_profile: Who is to read the JUnit report.
        branches: Globs of branches, for ``ci``; none: what is checked out.
        definition_from: Where jobs are defined, for ``ci``; empty: the default branch.
        require_accel: The only accelerator that will do; empty: any.
        trust: Whether the job answers for what the project's configuration asks for.
        cache_key: More that tells this job's caches from others'.
        default_branch: What GitHub says it is; empty: it does not say.
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
        """Write them for the steps that follow."""
        text = json.dumps(asdict(self), default=str)
        (folder / _FILE).write_text(text, encoding="utf-8")


def saved_inputs(folder: Path) -> Inputs:
    """Return what :meth:`Inputs.save` wrote.

    Raises:
        UsageError: Nothing was written there.
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
    """Return the action's inputs, as its step hands them over: ``INPUT_MODE`` and so on.

    Args:
        environ: The variables.
        folder: The action's own, for results where no other was named.

    Raises:
        UsageError: One of them cannot be used.
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
