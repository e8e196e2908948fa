"""Find the project's files that pip will read for its arguments; nothing is fetched or built here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_microvm.errors import UsageError
from pytest_microvm.untrusted.nofollow import read_below

_FILES = {"-r": True, "--requirement": True, "-c": True, "--constraint": True}
_FOLDERS = ("-e", "--editable", "-f", "--find-links")
_NESTED = re.compile(r"(-r|-c|-e|-f|--requirement|--constraint|--editable|--find-links)[=\s]*(.+)")
_ARCHIVE = re.compile(r"\.(whl|zip|tar\.gz|tgz|tar\.bz2|tar\.xz|tar)$", re.IGNORECASE)
_NAMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\s*(\[[^\]]*\]\s*)?($|[<>=!~;(@,\s-].*)", re.DOTALL)
_SCHEME = re.compile(r"(?:[a-z0-9]+\+)?(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_MOST = 200  # requirement files
_LONGEST = 1024 * 1024  # bytes of one requirement file


@dataclass(frozen=True)
class Needed:
    """The project's files that pip reads.

    Args:
        files: Requirement and constraint files, below the project's folder.
        all: Whether pip installs something from the project, so that any of its files may matter.
    """

    files: tuple[str, ...] = ()
    all: bool = False


def needed(arguments: Sequence[str], root: Path) -> Needed:
    """Return the files of the project in ``root`` that pip reads for ``arguments``.

    Raises:
        UsageError: A requirement file is outside the project, or cannot be read.
    """
    files: dict[str, None] = {}
    local = [_note(kind, value, root, root, files) for kind, value in _pairs(arguments)]
    return Needed(tuple(files), any(local))


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each argument with the option it belongs to, ``""`` for a requirement."""
    option = ""
    for argument in arguments:
        if option:
            yield option, argument
            option = ""
        elif argument in _FILES or argument in _FOLDERS:
            option = argument
        elif match := _NESTED.fullmatch(argument):
            yield match[1], match[2]
        elif not argument.startswith("-"):
            yield "", argument


def _note(option: str, value: str, folder: Path, root: Path, files: dict[str, None]) -> bool:
    """Record the files that one argument reads; return True if it installs something from the project."""
    value = value.strip().strip("\"'")
    if option not in _FILES:
        return (not _SCHEME.match(value)) if option else is_local(value)
    if _SCHEME.match(value):
        return False
    path = Path(os.path.normpath(folder / value))
    if not path.resolve().is_relative_to(root.resolve()) or not path.is_relative_to(root):
        raise UsageError(
            f"{path} is not in the project, and would not be in the machine",
            resolution="copy the requirement file into the project",
        )
    name = os.fspath(path.relative_to(root))
    if name in files:
        return False
    files[name] = None
    if len(files) > _MOST:
        raise UsageError(f"{name}: more than {_MOST} requirement files")
    try:
        content = read_below(root, name, _LONGEST)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if content is None:
        raise UsageError(f"{path} is no file", resolution="check the name of the requirement file")
    text = content.decode("utf-8", "replace")
    lines = text.replace("\\\n", " ").splitlines()
    local = [_line(line, path.parent, root, files) for line in lines]  # no short circuit: process each line
    return any(local)


def _line(line: str, folder: Path, root: Path, files: dict[str, None]) -> bool:
    line = re.sub(r"(^|\s)#.*$", "", line).strip()
    if not line:
        return False
    if match := _NESTED.fullmatch(line):
        return _note(match[1], match[2], folder, root, files)
    return False if line.startswith("-") else is_local(line)


def is_local(requirement: str) -> bool:
    """Return True if pip looks for a requirement among files: it is neither a project's name nor a URL."""
    requirement = requirement.strip()
    if _SCHEME.match(requirement):
        return False
    name, at, url = requirement.partition("@")
    if at and _NAMED.fullmatch(name.strip()):
        return not _SCHEME.match(url.strip())
    bare = requirement.partition(";")[0].strip()
    return not _NAMED.fullmatch(requirement) or bool(_ARCHIVE.search(bare))
