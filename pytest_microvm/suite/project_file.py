"""Find and parse a project's pytest configuration as data, without obeying it.

The search order is pytest's (pytest 9, ``_pytest/config/findpaths.py``; its reference page "Configuration").
The file may be an attack: links are not followed, only regular files are read, up to :data:`MAX_SIZE` bytes.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import iniconfig
import pytest

from pytest_microvm.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_SIZE = 1024 * 1024
"""Maximum size of a configuration file in bytes."""

Values = Mapping[str, Any]


@dataclass(frozen=True)
class ProjectFile:
    """A pytest configuration file and the root directory that pytest derives from it.

    Args:
        rootdir: pytest's root directory.
        path: The file, ``None`` if there is none.
        values: Its keys, as written: text, or TOML values.
    """

    rootdir: Path
    path: Path | None = None
    values: Values = field(default_factory=dict)


def find_project_file(
    directory: Path, paths: Sequence[str], *, file: str | None = None, rootdir: str | None = None
) -> ProjectFile:
    """Return the configuration file and root directory that pytest would use.

    Args:
        directory: The folder that pytest is started in.
        paths: pytest's positional arguments: files, folders, node ids.
        file: The value of ``-c``.
        rootdir: The value of ``--rootdir``.

    Raises:
        UsageError: A file is not readable or not valid, or the root directory does not exist.
    """
    folders = _folders(directory, paths)
    ancestor = _common_ancestor(directory, folders)
    found = _located([ancestor]) if file is None else _named_file(directory, ancestor, file)
    if rootdir is not None:
        chosen = _absolute(directory, os.path.expandvars(rootdir))
        if not chosen.is_dir():
            raise UsageError(
                f"invalid --rootdir: expected a directory, got {chosen}", resolution="name the project's"
            )
        return ProjectFile(chosen, found.path, found.values) if found else ProjectFile(chosen)
    return (
        found
        or _set_up_by_script(ancestor)
        or _located(folders)
        or ProjectFile(_root_of_all(directory, ancestor))
    )


def _named_file(directory: Path, ancestor: Path, file: str) -> ProjectFile:
    path = _absolute(directory, file)
    if path.exists() and not path.is_file() and not path.is_dir():  # such as /dev/null: no configuration
        return ProjectFile(directory if ancestor == Path(ancestor.anchor) else ancestor)
    load = _LOADERS.get(path.name) or _BY_SUFFIX.get(path.suffix)
    text = _text(path)
    if text is None or load is None:
        raise UsageError(
            f"invalid -c: expected a configuration file of pytest, got {path}",
            resolution="name a file that ends in .ini, .cfg or .toml",
        )
    return ProjectFile(path.parent, path, load(path, text) or {})


def _located(folders: Sequence[Path]) -> ProjectFile | None:
    """Return the first configuration in a folder or above it, else a pyproject.toml without one."""
    silent: ProjectFile | None = None
    for base in (base for folder in folders for base in (folder, *folder.parents)):
        for name, load in _LOADERS.items():
            text = _text(base / name)
            if text is None:
                continue
            values = load(base / name, text)
            if values is not None:
                return ProjectFile(base, base / name, values)
            if name == "pyproject.toml" and silent is None:
                silent = ProjectFile(base, base / name)
    return silent


def _set_up_by_script(ancestor: Path) -> ProjectFile | None:
    bases = (base for base in (ancestor, *ancestor.parents) if (base / "setup.py").is_file())
    return next((ProjectFile(base) for base in bases), None)


def _folders(directory: Path, paths: Sequence[str]) -> list[Path]:
    found = [_absolute(directory, path.partition("::")[0]) for path in paths]
    return [path if path.is_dir() else path.parent for path in found if os.path.lexists(path)]


def _common_ancestor(directory: Path, folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath(folders)) if folders else directory


def _root_of_all(directory: Path, ancestor: Path) -> Path:
    common = Path(os.path.commonpath([directory, ancestor]))
    return ancestor if common == Path(common.anchor) else common


def _absolute(directory: Path, path: str) -> Path:
    return Path(os.path.abspath(directory / path))  # noqa: PTH100 - keeps links, which test ids contain


def _text(path: Path) -> str | None:
    """Return the text of a regular file, or ``None`` if there is no regular file at ``path``.

    Raises:
        UsageError: It is a link, not readable, too large, or not UTF-8.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if path.is_symlink():
            raise UsageError(
                f"{path} is a link, and a project's configuration is read without following any",
                resolution="put the file itself there, or name one with -c",
            ) from None
        raise UsageError(f"{path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with open(descriptor, "rb", closefd=False) as opened:
            data = opened.read(MAX_SIZE + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_SIZE:
        raise UsageError(f"{path} has more than {MAX_SIZE} bytes", resolution="name another file with -c")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: invalid text: expected UTF-8 ({error.reason})", resolution="save it as UTF-8"
        ) from error


def _ini(path: Path, text: str) -> Mapping[str, Values]:
    try:
        parsed = iniconfig.IniConfig(os.fspath(path), data=text)
    except iniconfig.ParseError as error:
        raise UsageError(str(error)) from error
    return {section.name: dict(section.items()) for section in parsed}


def _toml(path: Path, text: str) -> Values:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(
            f"{path}: invalid TOML: {error}", resolution="correct the line that it names"
        ) from error


def _pytest_ini(path: Path, text: str) -> Values | None:
    return _ini(path, text).get("pytest", {})


def _shared_ini(path: Path, text: str) -> Values | None:
    return _ini(path, text).get("pytest")


def _cfg(path: Path, text: str) -> Values | None:
    sections = _ini(path, text)
    if "tool:pytest" in sections:
        return sections["tool:pytest"]
    if "pytest" in sections:
        raise UsageError(f"{path}: pytest reads no [pytest] there", resolution="write [tool:pytest]")
    return None


def _pytest_toml(path: Path, text: str) -> Values | None:
    return _table(path, _toml(path, text), "pytest") or {}


def _pyproject(path: Path, text: str) -> Values | None:
    tool = _table(path, _toml(path, text), "tool") or {}
    table = _table(path, tool, "pytest")
    if table is None:
        return None
    if "ini_options" not in table:
        return table or None
    if len(table) > 1:
        raise UsageError(
            f"{path} has both [tool.pytest] and [tool.pytest.ini_options]", resolution="write one of them"
        )
    return _table(path, table, "ini_options")


def _other_toml(path: Path, text: str) -> Values | None:
    found = _pyproject(path, text)
    return _table(path, _toml(path, text), "pytest") if found is None else found


def _table(path: Path, values: Values, key: str) -> Values | None:
    table = values.get(key)
    if table is not None and not isinstance(table, dict):
        raise UsageError(
            f"{path}: invalid {key}: expected a table, got {type(table).__name__}",
            resolution=f"write [{key}]",
        )
    return table


Loader = Callable[[Path, str], "Values | None"]
_SINCE_9: dict[str, Loader] = {"pytest.toml": _pytest_toml, ".pytest.toml": _pytest_toml}
_LOADERS: dict[str, Loader] = {
    **(_SINCE_9 if pytest.version_tuple >= (9, 0) else {}),
    "pytest.ini": _pytest_ini,
    ".pytest.ini": _pytest_ini,
    "pyproject.toml": _pyproject,
    "tox.ini": _shared_ini,
    "setup.cfg": _cfg,
}
_BY_SUFFIX: dict[str, Loader] = {".ini": _shared_ini, ".cfg": _cfg, ".toml": _other_toml}
