"""Compare a plug-in's run natively with its run in machines: the same, announced, refused, or silent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

SAME = "same"
WARNED = "warned"
REFUSED = "refused"
DIFFERENT = "DIFFERENT"

_USAGE_ERROR = 4
# The guest's own header lines, and the list of files that came back, announce no difference.
_NO_WARNING = ("microvm: in the machine:", "microvm: written by tests:")
_ID = re.compile(
    r"\b(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32,64}|0x[0-9a-f]+)\b", re.IGNORECASE
)
_DURATION = re.compile(r"\b\d+:\d\d:\d\d\b|\b\d+(?:\.\d+)? ?(?:s|ms|us|ns|seconds?)\b")
_NUMBER = re.compile(r"\d+(?:\.\d+)*(?:e[-+]?\d+)?")
_SPACE = re.compile(r"[ \t]+")
_HOST = re.compile(r'(?<="host", "value": ")[^"]+')  # in allure's results; a machine has a name of its own


@dataclass(frozen=True)
class Result:
    """One run of pytest.

    Args:
        status: Its exit status.
        outcomes: Each test's name, outcome and properties, in the order of the JUnit file.
        files: The files that the run made or changed, with their normalised text (empty if it varies).
        counts: The closing line's counts, such as ``2 passed, 1 rerun``.
        missing: Fragments that the plug-in should print and did not.
        announced: The lines that start with ``microvm:``, and usage errors.
        internal_error: Whether pytest or a plug-in reported an internal error.
    """

    status: int
    outcomes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    counts: str = ""
    missing: tuple[str, ...] = ()
    announced: tuple[str, ...] = ()
    internal_error: bool = False


@dataclass(frozen=True)
class Difference:
    """One difference between two runs.

    Args:
        text: The difference in words.
        file: The file concerned, if any.
    """

    text: str
    file: str = ""


@dataclass(frozen=True)
class Verdict:
    """The comparison's result.

    Args:
        word: One of :data:`SAME`, :data:`WARNED`, :data:`REFUSED`, :data:`DIFFERENT`.
        differences: All differences.
        silent: Those that no line of the run announced.
    """

    word: str
    differences: tuple[Difference, ...] = ()
    silent: tuple[Difference, ...] = ()


def normalised(text: str) -> str:
    """Return a text without what changes from run to run: ids, durations, numbers, the width of columns."""
    text = _DURATION.sub("TIME", without_ids(_HOST.sub("HOST", text)))
    return _SPACE.sub(" ", _NUMBER.sub("0", text))


def without_ids(text: str) -> str:
    """Return a text with one word in place of all random ids and digests."""
    return _ID.sub("ID", text)


def judge(names: Sequence[str], native: Result, remote: Result) -> Verdict:
    """Compare two runs.

    Args:
        names: The names that announce a difference of the plug-in: its own, and its options.
        native: The run without machines.
        remote: The run with ``--microvm``.
    """
    found = tuple(differences(native, remote))
    if remote.status == _USAGE_ERROR != native.status and _named(names, remote.announced):
        return Verdict(REFUSED, found)
    silent = tuple(each for each in found if not _announced(each, names, remote.announced))
    word = DIFFERENT if silent else WARNED if found else SAME
    return Verdict(word, found, silent)


def differences(native: Result, remote: Result) -> Iterator[Difference]:
    """Yield the differences between two runs."""
    if native.status != remote.status:
        yield Difference(f"exit status {native.status}, in machines {remote.status}")
    if native.outcomes != remote.outcomes:
        yield Difference(f"outcomes {_unlike(native.outcomes, remote.outcomes)}")
    if native.counts != remote.counts:
        yield Difference(f"counts {native.counts!r}, in machines {remote.counts!r}")
    if remote.internal_error and not native.internal_error:
        yield Difference("an internal error in machines")
    for fragment in remote.missing:
        yield Difference(f"not printed in machines: {fragment!r}")
    for path in sorted(native.files.keys() | remote.files.keys()):
        if path not in remote.files:
            yield Difference(f"{path} is not written in machines", path)
        elif path not in native.files:
            yield Difference(f"{path} is written only in machines", path)
        elif native.files[path] != remote.files[path]:
            yield Difference(f"{path} has another content in machines", path)


def _unlike(native: Sequence[str], remote: Sequence[str]) -> str:
    if sorted(native) == sorted(remote):
        return f"come in the order {list(native)}, in machines {list(remote)}"
    only = [line for line in native if line not in remote]
    return (
        f"{only or len(native)}, in machines {[line for line in remote if line not in native] or len(remote)}"
    )


def _announced(difference: Difference, names: Sequence[str], lines: Sequence[str]) -> bool:
    about_file = [re.sub(r"\d+", "0", line) for line in lines] if difference.file else []
    return _named(names, lines) or _named([re.sub(r"\d+", "0", difference.file)], about_file)


def _named(names: Sequence[str], lines: Sequence[str]) -> bool:
    told = [line for line in lines if not line.startswith(_NO_WARNING)]
    return any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", line) for line in told for name in names)
