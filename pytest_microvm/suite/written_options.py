"""Options of pytest and its plug-ins that write files in the workspace, and patterns for these files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_microvm.suite.arguments import tokens

_SPECIAL = re.compile(r"([\\*?\[\]!# ])")
_FOLDERS = frozenset(["--alluredir", "--benchmark-storage"])
_FILES = frozenset(["--benchmark-json"])
_FLAGS = {
    "--snapshot-update": ("__snapshots__/", "!**/__snapshots__/**/*.lock"),
    "--benchmark-autosave": ("/.benchmarks/",),
    "--benchmark-save": ("/.benchmarks/",),
    "--regen-all": ("test_*/", "*_test/"),
    "--force-regen": ("test_*/", "*_test/"),
}
_COVERAGE = "--cov-report"
_COVERAGE_FOLDERS = frozenset(["html", "annotate"])


@dataclass(frozen=True)
class WantedFiles:
    """Patterns, as in a .gitignore file, for files of the workspace that come back from machines.

    Args:
        by_user: The user's patterns, and those of options on the command line.
        by_project: Those of options in the project's configuration: only data comes back.
        while_running: Whether files come from all machines, not only from the last one.
        appended: Paths of files to which the last machine adds, and which it gets first.
    """

    by_user: tuple[str, ...]
    by_project: tuple[str, ...]
    while_running: bool
    appended: tuple[str, ...] = ()


def wanted_files(
    patterns: Sequence[str],
    users: Sequence[str],
    projects: Sequence[str],
    arity: Mapping[str, str],
    place: Callable[[str], str | None],
) -> WantedFiles:
    """Return the files that come back.

    Args:
        patterns: The user's patterns.
        users: The user's arguments for pytest.
        projects: The arguments in the project's configuration.
        arity: The known options, from :func:`~pytest_microvm.suite.arguments.option_arity`.
        place: Returns a path relative to the workspace; ``None`` if it lies outside.
    """
    by_users, by_projects = (list(_implied(words, arity, place)) for words in (users, projects))
    return WantedFiles(
        by_user=(*patterns, *(pattern for pattern, _ in by_users)),
        by_project=tuple(pattern for pattern, _ in by_projects),
        appended=_appended([*projects, *users], arity, place),
        while_running=bool(patterns) or any(early for _, early in (*by_users, *by_projects)),
    )


def workspace_place(top: Path, folder: Path) -> Callable[[str], str | None]:
    """Return a function that makes paths relative to ``folder`` relative to the workspace ``top``."""

    def place(path: str) -> str | None:
        relative = os.path.relpath(os.path.normpath(folder / path), top)
        return None if Path(relative).parts[:1] in ((), ("..",)) else relative

    return place


def _implied(
    words: Sequence[str], arity: Mapping[str, str], place: Callable[[str], str | None]
) -> Iterator[tuple[str, bool]]:
    """Yield the patterns that options imply, each with whether tests write there while they run."""
    found = list(tokens(words, arity))
    for number, token in enumerate(found):
        value = token.value
        if value is None and number + 1 < len(found) and not found[number + 1].option:
            value = found[number + 1].words[0]  # of an option that only the machine's pytest knows
        if token.option in _FLAGS:
            for pattern in _FLAGS[token.option]:
                yield pattern, True
        elif value and token.option in _FOLDERS | _FILES:
            yield from _pattern(place(value), folder=token.option in _FOLDERS, early=token.option in _FOLDERS)
        elif value and token.option == _COVERAGE:
            kind, _, path = value.partition(":")
            yield from _pattern(place(path) if path else None, folder=kind in _COVERAGE_FOLDERS, early=False)


def _appended(
    words: Sequence[str], arity: Mapping[str, str], place: Callable[[str], str | None]
) -> tuple[str, ...]:
    data = place(".coverage")
    appends = any(token.option == "--cov-append" for token in tokens(words, arity))
    return (data,) if appends and data is not None else ()


def _pattern(path: str | None, *, folder: bool, early: bool) -> Iterator[tuple[str, bool]]:
    if path is not None:
        yield "/" + _SPECIAL.sub(r"\\\1", path) + ("/" if folder else ""), early
