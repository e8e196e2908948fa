"""Read an untrusted JUnit file: check its encoding, its size and dangerous XML."""

from __future__ import annotations

import codecs
import os
import re
import stat
from pathlib import Path
from xml.parsers import expat

from pytest_microvm.reports.parsing import Parsing, ReportRefused
from pytest_microvm.reports.text import safe_name
from pytest_microvm.reports.values import Case, Problem, Report, Suite

FILE_LIMIT = 64 * 1024 * 1024
"""Maximum bytes of a file."""
UNREADABLE = "could not be read"
"""The name of the case that represents unreadable content."""

_PIECE = 256 * 1024
_REFERENCE = 16  # maximum characters of a reference to a character

# Characters that XML 1.0 forbids, raw or as a reference; _shown() keeps valid references.
_INVALID = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]|&#(?:x([0-9a-fA-F]{1,8})|([0-9]{1,10}));"
)
# XML 1.0, production 2
_VALID = (range(9, 11), range(13, 14), range(0x20, 0xD800), range(0xE000, 0xFFFE), range(0x10000, 0x110000))
_DECLARED = re.compile(rb"""^<\?xml[^>]{0,100}?encoding\s*=\s*["']([A-Za-z0-9._-]{1,40})["']""")
_ENCODINGS = ("utf-8", "ascii", "iso8859-1", "iso8859-15", "cp1252", "utf-16")


def read_report(path: Path, *, ours: bool = False) -> Report:
    """Return the report in a JUnit file.

    Unreadable content is represented by a case named :data:`UNREADABLE` with the outcome ``error``.

    Args:
        path: The file; a symbolic link is not followed.
        ours: Whether properties whose names begin with ``microvm.`` are trusted.
    """
    parsing = Parsing(ours=ours)
    trouble = ""
    try:
        _feed(parsing, path)
    except (ReportRefused, expat.ExpatError) as error:
        trouble = safe_name(str(error))
    except OSError as error:
        trouble = safe_name(error.strerror or str(error))
    suites = parsing.finish()
    if trouble:
        suites.append(_unreadable(path.name, trouble, sum(len(suite.cases) for suite in suites)))
    return Report(tuple(suites), trouble)


def _unreadable(name: str, trouble: str, count: int) -> Suite:
    name = safe_name(name)
    text = f"{count:,} of its tests are in this report." if count else "None of its tests is in this report."
    problem = Problem("error", f"{name} {UNREADABLE}: {trouble}", text)
    return Suite(name, (Case(name, UNREADABLE, problems=(problem,)),))


def _feed(parsing: Parsing, path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ReportRefused("it is not a regular file")
        if about.st_size > FILE_LIMIT:
            raise ReportRefused(f"it has {about.st_size:,} bytes; at most {FILE_LIMIT:,} are read")
        piece = file.read(_PIECE)
        decoder, rest, taken = _decoder(piece), "", 0
        while piece and taken <= FILE_LIMIT:  # it may grow while it is read
            taken += len(piece)
            text, rest = _complete(rest + decoder.decode(piece))
            parsing.feed(_INVALID.sub(_shown, text))
            piece = file.read(_PIECE)
        parsing.feed(_INVALID.sub(_shown, rest + decoder.decode(b"", final=True)), final=True)


def _decoder(start: bytes) -> codecs.IncrementalDecoder:
    """Return a decoder for the file's encoding; invalid bytes become U+FFFD."""
    name = "utf-8"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "utf-16"
    elif declared := _DECLARED.match(start.removeprefix(codecs.BOM_UTF8)):
        name = declared[1].decode("ascii").lower()
    known = {alias: name for name in _ENCODINGS for alias in (name, codecs.lookup(name).name)}
    known |= {"us-ascii": "ascii", "latin-1": "iso8859-1", "windows-1252": "cp1252", "utf8": "utf-8"}
    known |= {"iso-8859-1": "iso8859-1", "iso-8859-15": "iso8859-15", "ascii": "utf-8"}
    if name not in known:  # looking up an arbitrary name would import a module of that name
        raise ReportRefused(f"its encoding {name} is not known here")
    found = known[name]
    return codecs.getincrementaldecoder("utf-8-sig" if found == "utf-8" else found)("replace")


def _complete(text: str) -> tuple[str, str]:
    """Split ``text`` before a reference at its end that may be incomplete."""
    start = text.rfind("&", max(0, len(text) - _REFERENCE))
    if start < 0 or ";" in text[start:]:
        return text, ""
    return text[:start], text[start:]


def _shown(found: re.Match[str]) -> str:
    """Return the visible form of a character that XML forbids; a reference to a valid one stays."""
    if not found[1] and not found[2]:
        return f"\\x{ord(found[0]):02x}"
    code = int(found[1], 16) if found[1] else int(found[2])
    return found[0] if any(code in valid for valid in _VALID) else f"\\x{code:02x}"
