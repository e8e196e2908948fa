"""Guard this computer's variables and files against tox's configuration under ``--microvm``.

tox expands ``{env:NAME}``, ``{glob:...}``, ``file|PATH``, and ``${NAME}`` in requirements, on this computer,
for commands and variables in a machine. Its functions are patched to consult a guard first.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tox.config.loader import replacer
from tox.config.loader.toml import _replace as toml_replacer
from tox.config.set_env import SetEnv
from tox.report import HandledError
from tox.tox_env.python.pip.req import file as requirements

from pytest_microvm.tox.configuration import ToxFile
from pytest_microvm.tox.environment import GUEST_PATH, NEVER_PASSED
from pytest_microvm.tox.folders import is_below

HARMLESS = (
    "CI", "GITHUB_ACTIONS", "LANG", "LANGUAGE", "LC_*", "TZ", "PYTHON_GIL", "PYTHONHASHSEED",
    "SOURCE_DATE_EPOCH", "TERM", "COLORTERM", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR",
    "CLICOLOR_FORCE", "PY_COLORS",
)  # fmt: skip
"""Variables that hold nothing confidential."""

_TOXS = ("TOXENV", "TOX_*")  # the user's own settings of tox
_MACHINES: Mapping[str, str] = {"HOME": "/root", "PATH": GUEST_PATH}
"""Values of ``{env:NAME}`` for variables that would name a place of this computer."""


class HostValueRefused(HandledError):
    """The configuration reads a value that the user has not allowed."""


@dataclass(frozen=True)
class HostValueGuard:
    """Decides which variables and files a configuration may read.

    Args:
        file: The configuration.
        named: Globs of variables from the command line, which replace earlier grants; ``None``: not given.
    """

    file: ToxFile
    named: Sequence[str] | None = None

    def allowed(self, names: Iterable[str]) -> set[str]:
        """Return the variables that may be read; the others are treated as not set.

        Args:
            names: Names of variables that are set.

        Raises:
            Refused: The user has neither allowed nor excluded one of them.
        """
        names = set(names)
        harmless = {name for name in names if _one_of(name, HARMLESS)}
        if self.named is not None:
            return harmless | {name for name in names if _one_of(name, self.named)}
        if names > harmless and not self.file.is_allowed:
            raise self._refused(
                f"the variables {', '.join(sorted(names - harmless))} of this computer",
                "--microvm-pass-env NAME,... (none: as if no such variable were set)",
            )
        return names

    def check_paths(self, paths: Iterable[Path], said: str) -> None:
        """Refuse files outside the project, whether by their names or through links.

        Args:
            paths: The files, absolute.
            said: The text from the configuration, for the error, which must reveal no other file names.

        Raises:
            Refused: A file is outside the project and not allowed.
        """
        folder = self.file.folder
        if not all(is_below(path, folder) for path in paths) and not self.file.is_allowed:
            raise self._refused(f"{said}, which is not in the project", "files in the project")

    def _refused(self, what: str, instead: str) -> HostValueRefused:
        return HostValueRefused(
            f"{self.file.path} reads {what}, and nobody has allowed that: the machine would have it. "
            f"If you trust it, say `pytest-microvm trust`; else use {instead}"
        )


class Variables(Mapping[str, str]):
    """This computer's environment variables as a configuration may see them.

    Args:
        guard: Decides which variables may be read.
    """

    def __init__(self, guard: HostValueGuard) -> None:
        self._guard = guard

    def __getitem__(self, name: str) -> str:
        """Return a variable's value.

        Raises:
            KeyError: The variable is not set, or treated as not set.
            Refused: The user has not allowed the variable.
        """
        if _one_of(name, NEVER_PASSED) and not _one_of(name, _TOXS):
            return _MACHINES[name]
        value = os.environ[name]
        if not _one_of(name, _TOXS) and not self._guard.allowed([name]):
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the variables that need no permission."""
        return (name for name in os.environ if _one_of(name, HARMLESS))

    def __len__(self) -> int:
        """Return the number of variables that need no permission."""
        return sum(1 for _ in self)


class _Os:
    """Stand-in for the module ``os`` with guarded environment variables.

    Args:
        guard: Decides which variables may be read.
    """

    def __init__(self, guard: HostValueGuard) -> None:
        self.environ = Variables(guard)

    def getenv(self, name: str, default: str | None = None) -> str | None:
        """Return a variable's value, or ``default``."""
        return self.environ.get(name, default)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class _Glob:
    """Stand-in for the module ``glob`` that refuses matches outside the project.

    Args:
        module: The original module.
        guard: Decides which files may be read.
    """

    def __init__(self, module: Any, guard: HostValueGuard) -> None:
        self._module = module
        self._guard = guard

    def glob(self, pattern: str, **options: Any) -> list[str]:
        """Return the matching paths.

        Raises:
            Refused: A match is outside the project and not allowed.
        """
        found: list[str] = self._module.glob(pattern, **options)
        self._guard.check_paths(map(Path, found), pattern)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def install(guard: HostValueGuard) -> None:
    """Patch tox's functions to consult a guard, for the rest of the process.

    Raises:
        Refused: This version of tox lacks one of the functions.
    """
    try:
        for reader in (replacer, toml_replacer, requirements):
            _put(reader, "os", _Os(guard))
        for finder in (replacer, toml_replacer):
            _put(finder, "glob", _Glob(finder.glob, guard))
        _put(SetEnv, "_stream_env_file", _guarded(SetEnv._stream_env_file, guard))  # noqa: SLF001 - ADR 0020
    except AttributeError as error:
        raise HostValueRefused(
            f"--microvm cannot see what this version of tox reads of this computer ({error}): use another one"
        ) from None


def _put(owner: Any, name: str, value: Any) -> None:
    getattr(owner, name)  # fail if tox does not have the name, for it would guard nothing
    setattr(owner, name, value)


def _guarded(stream: Any, guard: HostValueGuard) -> Any:
    def stream_env_file(self: Any, filename: Any, args: Any) -> Iterator[tuple[str, str]]:
        root = self._origin.root if hasattr(self, "_origin") else self._root
        path = root / self._replacer(filename, args.copy())
        guard.check_paths([path], str(path))
        yield from stream(self, filename, args)

    return stream_env_file


def _one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.upper(), pattern.upper()) for pattern in patterns)
