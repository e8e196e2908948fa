"""What is copied, asked and passed on for a run: workspace, environment, command-line settings."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.remote.backend import Settings
from pytest_microvm.spec import PARSERS

# Variables that change what pytest itself does or shows, and say nothing about this host.
_PASSED = ("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "TZ", "LANG", "LC_ALL", "NO_COLOR", "FORCE_COLOR", "PY_COLORS")
_OWN = (
    "isolation",
    "pool",
    "retries",
    "artifacts",
    "fail_on_denied",
    "require_accel",
    "keep",
    "junit_profile",
)
_OPTIONS = (*PARSERS, *_OWN)


_GRANTING = frozenset(
    f"--microvm-{name}" for name in ("image", "network", "host", "credential", "secret", "mount")
)


def settings_from(config: pytest.Config) -> Settings:
    """Return what the command line says about machines."""
    given = {key: config.getoption(f"microvm_{key}", None) for key in _OPTIONS}
    worker = getattr(config, "workerinput", None) or {}
    count = worker.get("workercount") or getattr(config.option, "numprocesses", None) or 0
    return Settings(
        values={key: value for key, value in given.items() if value is not None},
        rootdir=config.rootpath,
        inipath=config.inipath,
        worker=str(worker.get("workerid", "")),
        workers=count if isinstance(count, int) else 0,
    )


def addopts_of(config: pytest.Config, args: Sequence[str]) -> Sequence[str]:
    """Return which of the arguments that pytest parses are of its configuration: they come before the user's.

    What ``getini`` says may be something else: they can override themselves (``-o addopts=``).
    """
    users = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *config.invocation_params.args]
    return args[: max(0, len(args) - len(users))]


def refuse_granting(addopts: Sequence[str]) -> None:
    """Refuse options in a project's own ``addopts`` that would give its tests more than its files.

    Raises:
        UsageError: There are such, or a file with more of them is named.
    """
    for word in addopts:
        option = word.partition("=")[0]
        if option in _GRANTING or word.startswith("@"):
            raise UsageError(
                f"addopts of the project's configuration has {option}, which only who runs it may say",
                resolution="write the key in [tool.pytest-microvm], then `pytest-microvm trust`; "
                "or say it on the command line",
            )


def workspace_of(config: pytest.Config) -> Path:
    """Return the top of what is copied into the guest: the git work tree around the root directory, or it.

    Raises:
        UsageError: A path of the command line lies outside.
    """
    top = _git_top(config.rootpath) or config.rootpath
    if config.args_source is pytest.Config.ArgsSource.ARGS and not config.option.pyargs:
        for word in config.args:
            path = Path(os.path.normpath(config.invocation_params.dir / word.partition("::")[0]))
            if path.exists() and not path.is_relative_to(top):
                raise UsageError(
                    f"{word} lies outside {top}, which is what the machine gets a copy of",
                    resolution="name a directory that holds both with --rootdir",
                )
    return top


def _git_top(folder: Path) -> Path | None:
    """Return the top of the git work tree around ``folder``, spelled as in ``folder``."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", os.fspath(folder), "rev-parse", "--show-toplevel"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:  # no git here
        return None
    top = Path(os.fsdecode(done.stdout.rstrip(b"\n")))
    if done.returncode or not top.is_absolute():
        return None
    return next((parent for parent in [folder, *folder.parents] if parent.resolve() == top.resolve()), None)


def guest_environment(plugins: str | None, config: pytest.Config) -> tuple[tuple[str, str], ...]:
    """Return the variables for the runner: few, and none that may hold a secret."""
    found = {name: os.environ[name] for name in _PASSED if name in os.environ}
    for name in ("CI", "BUILD_NUMBER"):  # pytest shows longer explanations when either is set
        if os.environ.get(name):
            found[name] = "1"
    if plugins:
        found["PYTEST_PLUGINS"] = plugins
    inside = [
        entry
        for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if entry and Path(entry).absolute().is_relative_to(config.rootpath)
    ]
    if inside:
        found["PYTHONPATH"] = os.pathsep.join(inside)
    return tuple(sorted(found.items()))
