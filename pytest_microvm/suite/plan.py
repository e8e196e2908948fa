"""Inputs of a run: workspace, environment variables, artifacts folder, command-line settings."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.git.repository import find_checkout
from pytest_microvm.settings.configuration import command_line
from pytest_microvm.suite.backend import RemoteSettings
from pytest_microvm.suite.launch import AUTOLOAD, LaunchFacts
from pytest_microvm.untrusted.nofollow import refuse_links

# Variables that affect pytest's behaviour or output, and reveal nothing about this host.
_PASSED = (AUTOLOAD, "TZ", "LANG", "LC_ALL", "NO_COLOR", "FORCE_COLOR", "PY_COLORS")


def settings_from(config: pytest.Config, launch: LaunchFacts | None) -> RemoteSettings:
    """Return the command line's settings for machines; ``launch`` is the record of a launched run."""
    worker = getattr(config, "workerinput", None) or {}
    count = worker.get("workercount") or getattr(config.option, "numprocesses", None) or 0
    return RemoteSettings(
        values=command_line(config),
        rootdir=config.rootpath,
        written=config.rootpath if launch is None else launch.reports,
        worker=str(worker.get("workerid", "")),
        workers=count if isinstance(count, int) else 0,
    )


def addopts_of(config: pytest.Config, args: Sequence[str]) -> Sequence[str]:
    """Return the part of pytest's arguments that is its configuration's ``addopts``, before the user's.

    ``getini`` may return other words, since ``addopts`` can override themselves (``-o addopts=``).
    """
    users = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *config.invocation_params.args]
    return args[: max(0, len(args) - len(users))]


def artifacts_folder(folder: Path | None, settings: RemoteSettings) -> Path | None:
    """Return the artifacts folder; a project's configuration may only name one below its own folder.

    Args:
        folder: The folder in the merged configuration.
        settings: The command line's settings.

    Raises:
        UsageError: The project names a folder outside its own.
    """
    if folder is None or "artifacts" in settings.values:
        return folder and folder.absolute()
    if settings.written is None:
        raise UsageError(
            f"the project's configuration has artifacts = {str(folder)!r}, which writes on this computer",
            resolution="say --microvm-artifacts=DIR yourself; or --microvm-reports=DIR, a folder for what "
            "the project may write",
        )
    path = Path(os.path.normpath(settings.written / folder))
    if not path.is_relative_to(settings.written):
        raise UsageError(
            f"the project's configuration has artifacts = {str(folder)!r}, outside {settings.written}",
            resolution="say --microvm-artifacts=DIR yourself",
        )
    refuse_links(settings.written, path)
    return path


def workspace_of(config: pytest.Config) -> Path:
    """Return the folder to copy into the guest: the git work tree around the root directory, or that itself.

    Raises:
        UsageError: A path on the command line lies outside it.
    """
    checkout = find_checkout(config.rootpath)
    top = config.rootpath if checkout is None else _spelled(checkout.top, config.rootpath)
    if config.args_source is pytest.Config.ArgsSource.ARGS and not config.option.pyargs:
        for word in config.args:
            path = Path(os.path.normpath(config.invocation_params.dir / word.partition("::")[0]))
            if path.exists() and not path.is_relative_to(top):
                raise UsageError(
                    f"{word} lies outside {top}, which is what the machine gets a copy of",
                    resolution="name a directory that holds both with --rootdir",
                )
    return top


def _spelled(top: Path, folder: Path) -> Path:
    """Return ``top`` in the spelling of ``folder``'s parents, or ``folder`` if it is not one of them."""
    return next((parent for parent in [folder, *folder.parents] if parent.resolve() == top), folder)


def guest_environment(
    plugins: str | None, config: pytest.Config, launch: LaunchFacts | None
) -> tuple[tuple[str, str], ...]:
    """Return the variables for the runner: few, and none that may hold a secret."""
    environ = {**os.environ, **({} if launch is None else {AUTOLOAD: launch.autoload or ""})}
    found = {name: environ[name] for name in _PASSED if name in environ}
    for name in ("CI", "BUILD_NUMBER"):  # pytest shows longer explanations if either is set
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
