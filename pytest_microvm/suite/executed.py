"""What machines executed, as coverage measured it: checked JSON, and the files that it is about."""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_microvm.errors import UsageError
from pytest_microvm.images.mirror.environment import running_environment
from pytest_microvm.suite import checks

_KINDS = frozenset(["lines", "arcs"])
_PLACES = re.compile(r"(?:-?[0-9]{1,7}(?: -?[0-9]{1,7})*)?")
_MAX_PLACES = 4 * 1024**2  # bytes of the lines of one file
_MAX_ENTRIES = 1_000_000
_MAX_NAME = 4096
_MAX_NAMES = 32 * 1024**2  # characters of all files' names
_ENTRY = 64  # bytes of an entry besides its texts and numbers, as an upper bound
_ARC = 32  # bytes


@dataclass(frozen=True)
class ExecutedPlaces:
    """Lines of a file, or branches as pairs of lines, that were executed in one context.

    Args:
        context: The context's name; empty if there is none.
        file: The file, by its name in coverage's data.
        kind: ``lines`` or ``arcs``.
        text: The numbers, with spaces between them.
    """

    context: str
    file: str
    kind: str
    text: str

    def numbers(self) -> set[Any]:
        """Return the lines, or the pairs of lines."""
        numbers = [int(number) for number in self.text.split()]
        if self.kind == "lines":
            return set(numbers)
        return set(zip(numbers[::2], numbers[1::2], strict=True))

    @property
    def size(self) -> int:
        """An upper bound of the bytes in coverage's data, which has a bit for each line up to the last."""
        numbers = self.text.split()
        places = max(map(int, numbers), default=0) // 8 if self.kind == "lines" else _ARC * len(numbers)
        return _ENTRY + len(self.context) + len(self.file) + places


@dataclass(frozen=True)
class Executed:
    """What a process executed.

    Args:
        places: Lines and branches.
        tracers: Which of coverage's plug-ins traces a file.
        touched: Files that could have been executed.
    """

    places: tuple[ExecutedPlaces, ...]
    tracers: dict[str, str]
    touched: frozenset[str]


class MeasuredFiles:
    """The files of this computer that coverage may name: of the workspace, and of the mirrored Python.

    Others exist in machines alone, or are none of the project's business: a report shows the files' content.

    Args:
        workspace: The top of the tree that machines get a copy of.
        directory: The folder that relative names start from.

    Attributes:
        left_out: Names that were asked for and that are not among them, and those of unknown plug-ins.
    """

    def __init__(self, workspace: Path, directory: Path) -> None:
        self.left_out: dict[str, None] = {}
        self._directory = directory
        self._roots = [os.path.realpath(root) for root in (workspace, *_of_python())]
        self._names: dict[str, str | None] = {}
        self._size = 0

    def name_of(self, value: object) -> str | None:
        """Return a file's name in coverage's data on this computer, or ``None``.

        Raises:
            ProtocolViolation: It is malformed, or there have been too many.
        """
        if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME:
            raise checks.violation("a measured file without a name")
        if value not in self._names:
            self._size += len(value)
            if self._size > _MAX_NAMES:
                raise checks.violation("coverage of too many files")
            self._names[value] = found = self._find(value)
            if found is None:
                self.left_out[value] = None
        return self._names[value]

    def leave_out(self, value: str) -> None:
        """Do without a file."""
        self._names[value] = None
        self.left_out[value] = None

    def _find(self, name: str) -> str | None:
        if not name.isprintable() or os.path.normpath(name) != name or name.startswith(".."):
            return None
        path = os.path.realpath(self._directory / name)
        if not os.path.isfile(path) or not any(path.startswith(root + os.sep) for root in self._roots):  # noqa: PTH113 - thousands of paths
            return None
        return path if name.startswith(os.sep) else name


def _of_python() -> Iterator[Path]:
    """Yield the folders from which this Python imports what is installed, and from which machines do, too."""
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield Path(sysconfig.get_path(name))
    with contextlib.suppress(UsageError):  # it cannot be mirrored
        yield from running_environment().editable_sources()


def parse_executed(record: dict[str, Any], files: MeasuredFiles, tracers: frozenset[str]) -> Executed:
    """Return what a process executed in files that this computer has.

    Args:
        record: See ``guest/runner_measuring.py``.
        files: Those files.
        tracers: The plug-ins of coverage on this computer.

    Raises:
        ProtocolViolation: The record is malformed.
    """
    traced = checks.mapping(record.get("tracers"), "list of plug-ins")
    for file, tracer in traced.items():
        if files.name_of(file) is not None and checks.line(tracer, "plug-in") not in tracers:
            files.leave_out(file)
    found = checks.array(record.get("found"), "list of executed lines", _MAX_ENTRIES)
    touched = [files.name_of(file) for file in checks.mapping(record.get("touched"), "list of files")]
    return Executed(
        tuple(places for each in found if (places := _places(each, files)) is not None),
        {name: tracer for file, tracer in traced.items() if (name := files.name_of(file)) is not None},
        frozenset(name for name in touched if name is not None),
    )


def _places(value: object, files: MeasuredFiles) -> ExecutedPlaces | None:
    parts = checks.array(value, "record of executed lines", 4)
    if len(parts) != 4:  # noqa: PLR2004 - context, kind, file, places
        raise checks.violation("a record of executed lines without its four parts")
    context, kind, file, text = parts
    kind = checks.choice(kind, _KINDS, "kind of coverage")
    if not isinstance(text, str) or len(text) > _MAX_PLACES or not _PLACES.fullmatch(text):
        raise checks.violation("executed lines that are no numbers, or too many")
    if (kind == "lines" and "-" in text) or (kind == "arcs" and text and text.count(" ") % 2 == 0):
        raise checks.violation("executed lines that are none of their kind")
    context = checks.line(context, "context")
    name = files.name_of(file)
    return None if name is None else ExecutedPlaces(context, name, kind, text)
