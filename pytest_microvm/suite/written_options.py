"""Options of pytest and its plug-ins that write files, and the files that come back because of them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_microvm.suite.arguments import INLINE_SNAPSHOT, tokens, with_values
from pytest_microvm.untrusted.nofollow import refuse_links
from pytest_microvm.untrusted.text import sanitize_line

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
_CLEANING = "--clean-alluredir"
_REWRITING = frozenset(["create", "fix", "trim", "update"])  # values of INLINE_SNAPSHOT
_REWRITTEN = ("*.py", "/.inline-snapshot/", "__inline_snapshot__/")


@dataclass(frozen=True)
class OutsidePath:
    """A path outside the workspace that the user named for an option's files; they come back there.

    Args:
        path: The path; absolute, and the same in machines.
        is_folder: Whether the option writes a folder.
        early: Whether tests write there while they run, and not only the last machine.
    """

    path: Path
    is_folder: bool
    early: bool

    @property
    def folder(self) -> Path:
        """The folder itself, or that of the file."""
        return self.path if self.is_folder else self.path.parent

    def holds(self, path: str) -> bool:
        """Return True if a machine's path is this one, or in this folder."""
        return path.startswith(f"{self.path}/") if self.is_folder else path == str(self.path)


@dataclass(frozen=True)
class WantedFiles:
    """The files that come back from machines; patterns are as in a .gitignore file, for the workspace.

    Args:
        by_user: The user's patterns, and those of options on the command line.
        by_project: Those of options in the project's configuration: only data comes back.
        while_running: Whether files come from all machines, not only from the last one.
        appended: Paths of files to which the last machine adds, and which it gets first.
        outside: Paths outside the workspace that the user named.
        temporary: Patterns of tests' temporary folders, which come back in another way.
        lines: What the user should know before the first test, safe to show.
    """

    by_user: tuple[str, ...]
    by_project: tuple[str, ...]
    while_running: bool
    appended: tuple[str, ...] = ()
    outside: tuple[OutsidePath, ...] = ()
    temporary: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Places:
    """The places that paths of a command line mean.

    Args:
        top: The workspace.
        directory: The folder that pytest was started in.
        mounted: Targets of mounts, from which files come back in another way.
    """

    top: Path
    directory: Path
    mounted: tuple[Path, ...] = ()

    def absolute(self, path: str) -> Path:
        """Return the absolute path."""
        return Path(os.path.normpath(self.directory / path))

    def inside(self, path: str) -> str | None:
        """Return the path relative to the workspace; ``None`` if it lies outside."""
        relative = os.path.relpath(self.absolute(path), self.top)
        return None if Path(relative).parts[:1] in ((), ("..",)) else relative

    def is_mounted(self, path: Path) -> bool:
        """Return True if the path is in a mount."""
        return any(path.is_relative_to(target) for target in self.mounted)


@dataclass(frozen=True)
class _NamedPlace:
    """What an option of a command line writes.

    Args:
        option: The option.
        path: The path as written.
        is_folder: Whether it is a folder.
        early: Whether tests write there while they run.
    """

    option: str
    path: str
    is_folder: bool
    early: bool


def wanted_files(
    patterns: Sequence[str],
    users: Sequence[str],
    projects: Sequence[str],
    arity: Mapping[str, str],
    places: Places,
    *,
    basetemp: str | None = None,
) -> WantedFiles:
    """Return the files that come back.

    Args:
        patterns: The user's patterns.
        users: The user's arguments for pytest.
        projects: The arguments in the project's configuration.
        arity: The known options, from :func:`~pytest_microvm.suite.arguments.option_arity`.
        places: What paths mean.
        basetemp: The folder of temporary folders that come back in another way, as written.

    Raises:
        UsageError: The path to a place outside the workspace goes through a link of the project.
    """
    by_users = list(_implied(users, arity, places))
    by_projects = list(_implied(projects, arity, places))
    outside, lines = _outside(_named(users, arity), places)
    return WantedFiles(
        by_user=(*patterns, *(pattern for pattern, _ in by_users)),
        by_project=tuple(pattern for pattern, _ in by_projects),
        appended=_appended([*projects, *users], arity, places),
        while_running=bool(patterns)
        or any(early for _, early in (*by_users, *by_projects))
        or any(place.early for place in outside),
        outside=tuple(outside),
        temporary=() if basetemp is None else tuple(_patterns(places.inside(basetemp), is_folder=True)),
        lines=(*lines, *_lines_about_projects(_named(projects, arity), places), *_lines_about(users, arity)),
    )


def rewriting_option(users: Sequence[str], arity: Mapping[str, str]) -> str | None:
    """Return the user's option with which a plug-in rewrites the tests' source, as written."""
    for option, value in _values(users, arity):
        if option == INLINE_SNAPSHOT and not _REWRITING.isdisjoint(value.split(",")):
            return f"{option}={value}"
    return None


def folders_of(users: Sequence[str], arity: Mapping[str, str], places: Places) -> tuple[Path, ...]:
    """Return the folders of this computer in which paths of the user's options lie.

    Plug-ins write there and do not make them, as there is no need to natively: so machines get them, empty.
    """
    found: dict[Path, None] = {}
    for _option, value in _values(users, arity):
        for path in (value, value.partition(":")[2]):
            folder = places.absolute(path).parent
            if "/" in path and path.isprintable() and folder.is_dir():
                found[folder] = None
    return tuple(found)


def _values(words: Sequence[str], arity: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the options that have a value, with it."""
    for token in with_values(words, arity):
        if token.option and token.value:
            yield token.option, token.value


def _named(words: Sequence[str], arity: Mapping[str, str]) -> Iterator[_NamedPlace]:
    """Yield the places that options name for their files."""
    for option, value in _values(words, arity):
        if option in _FOLDERS | _FILES:
            is_folder = option in _FOLDERS
            yield _NamedPlace(option, value.removeprefix("file://"), is_folder, early=is_folder)
        elif option == _COVERAGE:
            kind, _, path = value.partition(":")
            if path:
                yield _NamedPlace(option, path, kind in _COVERAGE_FOLDERS, early=False)


def _implied(words: Sequence[str], arity: Mapping[str, str], places: Places) -> Iterator[tuple[str, bool]]:
    """Yield the patterns that options imply, each with whether tests write there while they run."""
    for token in tokens(words, arity):
        for pattern in _FLAGS.get(token.option, ()):
            yield pattern, True
    if rewriting_option(words, arity) is not None:
        yield from ((pattern, True) for pattern in _REWRITTEN)
    for written in _named(words, arity):
        for pattern in _patterns(places.inside(written.path), is_folder=written.is_folder):
            yield pattern, written.early


def _outside(named: Iterator[_NamedPlace], places: Places) -> tuple[list[OutsidePath], list[str]]:
    """Return the places outside the workspace that come back, and lines about those that do not."""
    found, lines = [], []
    for written in named:
        path = places.absolute(written.path)
        if places.inside(written.path) is not None or places.is_mounted(path):
            continue
        holds = next((what for what, inner in _precious(places) if _is_in(inner, path)), None)
        if written.is_folder and holds is not None:
            lines.append(
                f"microvm: {written.option}={sanitize_line(written.path)} holds {holds}: files written there "
                "stay in the machines; name a folder of its own"
            )
            continue
        refuse_links(places.top, places.directory / written.path)
        found.append(OutsidePath(path, written.is_folder, written.early))
    return found, lines


def _precious(places: Places) -> Iterator[tuple[str, Path]]:
    """Yield folders in which a machine must not replace any file, with their names for people."""
    yield "the project itself", places.top
    with contextlib.suppress(RuntimeError):  # this user has none
        yield "your home folder", Path.home()


def _is_in(inner: Path, folder: Path) -> bool:
    return inner.resolve().is_relative_to(folder.resolve())


def _lines_about_projects(named: Iterator[_NamedPlace], places: Places) -> Iterator[str]:
    """Yield lines about places outside the workspace that a project's configuration names."""
    for written in named:
        if places.inside(written.path) is None and not places.is_mounted(places.absolute(written.path)):
            yield (
                f"microvm: {written.option} in the project's addopts names {sanitize_line(written.path)}, "
                "outside the project: its files stay in the machines; give the option on the command line"
            )


def _lines_about(users: Sequence[str], arity: Mapping[str, str]) -> Iterator[str]:
    if any(token.option == _CLEANING for token in tokens(users, arity)):
        yield f"microvm: {_CLEANING} finds an empty folder in each machine: this computer's keeps its files"


def _appended(words: Sequence[str], arity: Mapping[str, str], places: Places) -> tuple[str, ...]:
    data = places.inside(".coverage")
    appends = any(token.option == "--cov-append" for token in tokens(words, arity))
    return (data,) if appends and data is not None else ()


def _patterns(path: str | None, *, is_folder: bool) -> Iterator[str]:
    if path is not None:
        yield "/" + _SPECIAL.sub(r"\\\1", path) + ("/" if is_folder else "")
