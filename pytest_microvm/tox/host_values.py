"""What tox's configuration may read of this computer under ``--microvm``: variables and files.

tox expands ``{env:NAME}``, ``{glob:...}``, ``file|PATH``, and ``${NAME}`` in requirements, on this computer,
for commands and variables that go into a machine. Its functions are made to ask first.
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
"""Variables that say nothing that anybody keeps to himself."""

_TOXS = ("TOXENV", "TOX_*")  # its user's words for tox
_MACHINES: Mapping[str, str] = {"HOME": "/root", "PATH": GUEST_PATH}
"""What ``{env:NAME}`` stands for in place of a variable that names a place of this computer."""


class Refused(HandledError):
    """The configuration reads what nobody has allowed."""


@dataclass(frozen=True)
class Guard:
    """Decides what a configuration may read.

    Args:
        file: The configuration.
        named: Globs of variables from the command line, in place of what was allowed; ``None``: it has none.
    """

    file: ToxFile
    named: Sequence[str] | None = None

    def allowed(self, names: Iterable[str]) -> set[str]:
        """Return those of some variables that may be read; the others are to be as if they were not set.

        Args:
            names: Variables that are set.

        Raises:
            Refused: Nobody has said anything about one of them.
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
        """Refuse files that are not in the project, by their names or by where links lead.

        Args:
            paths: The files, absolute.
            said: What the configuration says; names that it does not know are not repeated.

        Raises:
            Refused: Nobody has allowed one.
        """
        folder = self.file.folder
        if not all(is_below(path, folder) for path in paths) and not self.file.is_allowed:
            raise self._refused(f"{said}, which is not in the project", "files in the project")

    def _refused(self, what: str, instead: str) -> Refused:
        return Refused(
            f"{self.file.path} reads {what}, and nobody has allowed that: the machine would have it. "
            f"If you trust it, say `pytest-microvm trust`; else use {instead}"
        )


class Variables(Mapping[str, str]):
    """This computer's variables, as a configuration sees them.

    Args:
        guard: Decides.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def __getitem__(self, name: str) -> str:
        """Return a variable's value.

        Raises:
            KeyError: It is not set, or as if it were not.
            Refused: Nobody has allowed it.
        """
        if _one_of(name, NEVER_PASSED) and not _one_of(name, _TOXS):
            return _MACHINES[name]
        value = os.environ[name]
        if not _one_of(name, _TOXS) and not self._guard.allowed([name]):
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        """Yield the names of those that need nobody's word."""
        return (name for name in os.environ if _one_of(name, HARMLESS))

    def __len__(self) -> int:
        """Return how many these are."""
        return sum(1 for _ in self)


class _Os:
    """The module ``os`` with other variables.

    Args:
        guard: Decides which.
    """

    def __init__(self, guard: Guard) -> None:
        self.environ = Variables(guard)

    def getenv(self, name: str, default: str | None = None) -> str | None:
        """Return a variable's value, or the default."""
        return self.environ.get(name, default)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class _Glob:
    """The module ``glob``, whose matches have to be in the project.

    Args:
        module: The module.
        guard: Decides.
    """

    def __init__(self, module: Any, guard: Guard) -> None:
        self._module = module
        self._guard = guard

    def glob(self, pattern: str, **options: Any) -> list[str]:
        """Return the paths that match.

        Raises:
            Refused: One is not in the project.
        """
        found: list[str] = self._module.glob(pattern, **options)
        self._guard.check_paths(map(Path, found), pattern)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def install(guard: Guard) -> None:
    """Make tox's functions ask a guard, for the rest of the process.

    Raises:
        Refused: This version of tox has other functions.
    """
    try:
        for reader in (replacer, toml_replacer, requirements):
            _put(reader, "os", _Os(guard))
        for finder in (replacer, toml_replacer):
            _put(finder, "glob", _Glob(finder.glob, guard))
        _put(SetEnv, "_stream_env_file", _guarded(SetEnv._stream_env_file, guard))  # noqa: SLF001 - ADR 0020
    except AttributeError as error:
        raise Refused(
            f"--microvm cannot see what this version of tox reads of this computer ({error}): use another one"
        ) from None


def _put(owner: Any, name: str, value: Any) -> None:
    getattr(owner, name)  # a name that tox does not use would guard nothing
    setattr(owner, name, value)


def _guarded(stream: Any, guard: Guard) -> Any:
    def stream_env_file(self: Any, filename: Any, args: Any) -> Iterator[tuple[str, str]]:
        root = self._origin.root if hasattr(self, "_origin") else self._root
        path = root / self._replacer(filename, args.copy())
        guard.check_paths([path], str(path))
        yield from stream(self, filename, args)

    return stream_env_file


def _one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.upper(), pattern.upper()) for pattern in patterns)
