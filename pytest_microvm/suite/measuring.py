"""The :class:`coverage.Coverage` that measures this process, and its settings for machines."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import coverage

_OPTIONS = (
    *("branch", "concurrency", "context", "core", "cover_pylib", "data_file", "disable_warnings"),
    *("dynamic_context", "include", "omit", "patch", "plugins", "relative_files", "sigterm", "source"),
    *("source_dirs", "source_pkgs", "timid"),
)
_OTHERS = ("report:include_namespace_packages",)
_PATTERNS = frozenset(["run:include", "run:omit"])
_NEED_FILE = {"run:patch": "subprocess", "run:concurrency": "multiprocessing"}


def measuring_coverage() -> coverage.Coverage | None:
    """Return the coverage that measures this process, if one does."""
    module: Any = sys.modules.get("coverage")
    current: coverage.Coverage | None = None if module is None else module.Coverage.current()
    return current


def measures_workers(measuring: coverage.Coverage) -> bool:
    """Return True if coverage also measures this process's children, such as workers of pytest-xdist."""
    return "subprocess" in (_option(measuring, "run:patch") or ()) or "COVERAGE_PROCESS_START" in os.environ


def machine_settings(
    measuring: coverage.Coverage, workspace: Path, directory: Path
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings with which a machine measures in the same way, as JSON, and lines for the user.

    Paths in them are absolute: a worker of pytest-xdist gets absolute ones from its controller, and both need
    the same template.

    Args:
        measuring: The coverage of this process.
        workspace: The top of the tree that machines get a copy of.
        directory: The folder that relative paths start from.
    """
    options = {}
    for name in (*(f"run:{option}" for option in _OPTIONS), *_OTHERS):
        value = _plain(_option(measuring, name))
        if value is not None:
            options[name] = _absolute(name, value, directory)
    file = getattr(measuring.config, "config_file", None)
    if isinstance(file, str) and Path(os.path.abspath(file)).is_relative_to(workspace):  # noqa: PTH100 - as it is spelled
        return {"options": options, "config_file": os.path.abspath(file)}, []  # noqa: PTH100 - the same
    told = []
    for name, word in _NEED_FILE.items():
        if word in options.get(name, ()):
            options[name] = [other for other in options[name] if other != word]
            told.append(f"child processes are not measured: {file} is outside the workspace")
    if options.get("run:plugins") and file:
        told.append(f"coverage's plug-ins do not get their options: {file} is outside the workspace")
    return {"options": options, "config_file": None}, told


def _option(measuring: coverage.Coverage, name: str) -> Any:
    import coverage as module  # noqa: PLC0415 - it has been imported

    try:
        return measuring.get_option(name)
    except module.CoverageException:  # this version has no such option
        return None


def _plain(value: object) -> Any:
    """Return an option's value as JSON; ``None`` if it is not set."""
    if isinstance(value, (list, tuple, set)):
        return [str(each) for each in value]
    return value if isinstance(value, (bool, str)) else None


def _absolute(name: str, value: Any, directory: Path) -> Any:
    if name == "run:data_file":
        return os.path.normpath(directory / value)
    if name == "run:source_dirs":
        return [os.path.normpath(directory / path) for path in value]
    if name == "run:source":  # folders, or packages
        return [os.path.normpath(directory / each) if (directory / each).is_dir() else each for each in value]
    if name in _PATTERNS:
        return [each if each.startswith(("*", "?")) else os.path.normpath(directory / each) for each in value]
    return value
