"""Parse JUnit's elements into values: the dialects of pytest, surefire, jest, Go, googletest and others."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from xml.parsers import expat

from pytest_microvm.reports.reruns import join_attempts
from pytest_microvm.reports.text import NAME_LIMIT, first_line, safe_name, safe_text
from pytest_microvm.reports.values import Case, Kind, Problem, Suite

CASE_LIMIT = 200_000
"""Maximum number of tests of one file."""
OUR_MARK = "microvm.junit_profile"
"""The property that marks a suite as written by this package: its lines count from 1."""

_ELEMENT_LIMIT = 2_000_000
_DEPTH_LIMIT = 64
_PART_LIMIT = 8 * 1024 * 1024  # characters of one tag, with its attributes: expat keeps it whole
_ENTRY_LIMIT = 100  # failures, attempts, outputs of one test
_PROPERTY_LIMIT = 1000
_GROUPED = re.compile(r"[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]*)?")
_GROUPED_BY_DOTS = re.compile(r"[1-9][0-9]{0,2}(\.[0-9]{3})+,[0-9]+")
_UNFINISHED = Problem("error", "the test did not finish: its report has neither a name nor a result")
"""pytest gives a test its name when it ends; one that ends the process stays nameless."""

_LONGEST = 1e9  # seconds; no test takes 30 years
_MESSAGE_LIMIT = 4 * NAME_LIMIT

_KINDS: dict[str, Kind] = {
    "failure": "failure",
    "error": "error",
    "skipped": "skipped",
    "disabled": "skipped",
}
_ATTEMPTS: dict[str, Kind] = {
    "rerunFailure": "failure",
    "flakyFailure": "failure",
    "rerunError": "error",
    "flakyError": "error",
}
_OUTPUTS = ("system-out", "system-err")
_TEXTS = frozenset({*_KINDS, *_ATTEMPTS, *_OUTPUTS, "stackTrace"})
# googletest and others report a result with an attribute.
_NOT_RUN = frozenset({"notrun", "disabled", "ignored", "skipped", "suppressed"})
_FAILED = frozenset({"fail", "failed", "failure", "error"})
# pytest counts lines from 0 (location of its reports); these names of its own identify its reports.
_PYTEST_ROOT, _PYTEST_SUITE = "pytest tests", "pytest"

_CLAIM = re.compile(r"^[ \t]*\[\[ATTACHMENT\|([^\[\]|\n]{1,4096})\]\][ \t]*(?:\n|\Z)", re.MULTILINE)


class ReportRefused(Exception):
    """The file, or the rest of it, is rejected; the message is the reason."""


@dataclass
class _OpenSuite:
    """A suite whose end tag has not been parsed yet."""

    name: str
    file: str = ""
    timestamp: str = ""
    hostname: str = ""
    line_base: int = 1
    cases: list[Case] = field(default_factory=list)
    properties: list[tuple[str, str]] = field(default_factory=list)
    outputs: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in _OUTPUTS})


@dataclass
class _OpenCase:
    """A test whose end tag has not been parsed yet."""

    attributes: dict[str, str]
    problems: list[Problem] = field(default_factory=list)
    attempts: list[Problem] = field(default_factory=list)
    properties: list[tuple[str, str]] = field(default_factory=list)
    outputs: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in _OUTPUTS})


@dataclass
class _OpenProblem:
    """A failure, an error, a skip or another attempt whose end tag has not been parsed yet."""

    kind: Kind
    attempt: bool
    message: str
    type: str
    text: str = ""


class Parsing:
    """Incremental parser: takes XML piece by piece, and collects suites and their tests.

    Args:
        ours: Whether properties whose names begin with ``microvm.`` are trusted.
    """

    def __init__(self, *, ours: bool) -> None:
        self._ours = ours
        self._stack: list[str] = []
        self._suites: list[_OpenSuite] = []
        self._done: list[Suite] = []
        self._case: _OpenCase | None = None
        self._problem: _OpenProblem | None = None
        self._property: tuple[str, list[str]] | None = None
        self._text: list[str] | None = None
        self._root = ""
        self._elements = self._cases = 0
        self._pending = 0  # characters since the parser's last callback
        # The input is text; expat encodes it in this way, whatever the file declares.
        self._parser = parser = expat.ParserCreate("utf-8")
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse_declarations
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._data

    def feed(self, text: str, *, final: bool = False) -> None:
        """Parse the next piece.

        Raises:
            Refused: It has forbidden content, or too much.
            expat.ExpatError: It is not well-formed XML.
        """
        self._pending += len(text)
        self._parser.Parse(text, final)
        if self._pending > _PART_LIMIT:
            raise ReportRefused(f"it has a tag, or a comment, of more than {_PART_LIMIT:,} characters")

    def finish(self) -> list[Suite]:
        """Return the suites, including those without an end tag."""
        if self._case is not None:
            self._end_case()
        while self._suites:
            self._end_suite()
        return self._done

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._pending = 0
        self._elements += 1
        self._stack.append(tag)
        if self._elements > _ELEMENT_LIMIT or len(self._stack) > _DEPTH_LIMIT:
            raise ReportRefused("it has more elements, or deeper ones, than are read")
        if len(self._stack) == 1 and tag not in ("testsuites", "testsuite"):
            raise ReportRefused(f"its root is <{safe_name(tag, 60)}>, not <testsuites> or <testsuite>")
        if tag in _TEXTS:
            self._text = []
        if tag == "testsuites":
            self._root = attributes.get("name", "")
        elif tag == "testsuite" and self._case is None:
            self._start_suite(attributes)
        elif tag == "testcase" and self._case is None:
            self._start_case(attributes)
        elif tag in _KINDS or tag in _ATTEMPTS:
            kind = _KINDS.get(tag) or _ATTEMPTS[tag]
            message, name = attributes.get("message", ""), attributes.get("type", "")
            self._problem = _OpenProblem(kind, tag in _ATTEMPTS, message, safe_name(name))
        elif tag == "property":
            self._property = (attributes.get("name", ""), [attributes.get("value", "")])

    def _end(self, tag: str) -> None:
        self._pending = 0
        self._stack.pop()
        text = ""
        if tag in _TEXTS:
            text, self._text = "".join(self._text or ()), None
        if tag == "testsuite" and self._case is None and self._suites:
            self._end_suite()
        elif tag == "testcase" and "testcase" not in self._stack:
            self._end_case()
        elif (tag in _KINDS or tag in _ATTEMPTS) and self._problem is not None:
            self._end_problem(text)
        elif tag == "stackTrace" and self._problem is not None:
            self._problem.text = text
        elif tag in _OUTPUTS and self._problem is None and text.strip():
            self._holder.outputs[tag] += [text] if len(self._holder.outputs[tag]) < _ENTRY_LIMIT else []
        elif tag == "property" and self._property is not None:
            self._end_property()

    def _data(self, data: str) -> None:
        self._pending = 0
        if self._text is not None:
            self._text.append(data)
        elif self._property is not None and self._stack[-1] == "property":
            self._property[1].append(data)

    @property
    def _holder(self) -> _OpenSuite | _OpenCase:
        if self._case is None and not self._suites:
            self._start_suite({})
        return self._case or self._suites[-1]

    def _start_suite(self, attributes: dict[str, str]) -> None:
        own = safe_name(attributes.get("name", ""))
        outer = self._suites[-1] if self._suites else None
        name = safe_name(" / ".join(filter(None, (outer.name if outer else "", own))))
        pytest = self._root == _PYTEST_ROOT or own == _PYTEST_SUITE
        self._suites.append(
            _OpenSuite(
                name or "tests",
                file=attributes.get("file", outer.file if outer else ""),
                timestamp=safe_name(attributes.get("timestamp", ""), 60),
                hostname=safe_name(attributes.get("hostname", ""), 250),
                line_base=0 if pytest else 1,
            )
        )

    def _end_suite(self) -> None:
        suite = self._suites.pop()
        out, err = (safe_text("\n".join(suite.outputs[name]).strip("\n")) for name in _OUTPUTS)
        if suite.cases or out or err:
            self._done.append(
                Suite(
                    suite.name,
                    tuple(join_attempts(suite.cases)),
                    properties=tuple(suite.properties),
                    timestamp=suite.timestamp,
                    hostname=suite.hostname,
                    out=out,
                    err=err,
                )
            )

    def _start_case(self, attributes: dict[str, str]) -> None:
        self._cases += 1
        if self._cases > CASE_LIMIT:
            raise ReportRefused(f"it has more than {CASE_LIMIT:,} tests")
        if not self._suites:
            self._start_suite({})
        self._case = _OpenCase(attributes)

    def _end_case(self) -> None:
        assert self._case is not None
        case, self._case = self._case, None
        suite, told = self._suites[-1], case.attributes
        if not case.problems:
            case.problems += _problem_of(told)
        if not case.problems and not told.get("name", "").strip():
            case.problems.append(_UNFINISHED)
        claims: list[str] = []
        outputs = []
        for name in _OUTPUTS:
            text = "\n".join(case.outputs[name])
            claims += _CLAIM.findall(text)
            outputs.append(safe_text(_CLAIM.sub("", text).strip("\n")))
        suite.cases.append(
            Case(
                safe_name(told.get("classname", "")) or suite.name,
                safe_name(told.get("name", "")) or "(no name)",
                file=_file(told.get("file", suite.file)),
                line=_line(told.get("line", ""), suite.line_base),
                seconds=seconds(told.get("time", "")),
                problems=tuple(case.problems),
                attempts=tuple(case.attempts),
                out=outputs[0],
                err=outputs[1],
                properties=tuple(case.properties),
                claims=tuple(claims[:_ENTRY_LIMIT]),
            )
        )

    def _end_problem(self, text: str) -> None:
        assert self._problem is not None
        problem, self._problem = self._problem, None
        whole = safe_text((problem.text or text).strip("\n"))
        message = safe_text(problem.message, _MESSAGE_LIMIT).strip() or first_line(whole)
        found = Problem(problem.kind, message, whole, problem.type)
        if self._case is not None:
            entries = self._case.attempts if problem.attempt else self._case.problems
            if len(entries) < _ENTRY_LIMIT:
                entries.append(found)
        elif self._suites and len(self._suites[-1].cases) < CASE_LIMIT:  # the suite itself could not run
            suite = self._suites[-1]
            suite.cases.append(Case(suite.name, "(suite)", problems=(found,)))

    def _end_property(self) -> None:
        assert self._property is not None
        (name, values), self._property = self._property, None
        name, holder = safe_name(name), self._holder
        if not name or (name.startswith("microvm.") and not self._ours):
            return
        if name == OUR_MARK and isinstance(holder, _OpenSuite):
            holder.line_base = 1
        if len(holder.properties) < _PROPERTY_LIMIT:
            holder.properties.append((name, safe_text("".join(values), _MESSAGE_LIMIT)))


def refuse_declarations(*_: object) -> None:
    """Raise an error for a declared document type or entity: no report needs them, and attacks do."""
    raise ReportRefused("it declares a document type or entities, which no report needs")


def _problem_of(attributes: dict[str, str]) -> list[Problem]:
    """Return the problem that an attribute reports instead of an element: not run, or failed."""
    for name in ("status", "result"):
        word = attributes.get(name, "").lower()
        if word in _NOT_RUN:
            return [Problem("skipped", word)]
        if word in _FAILED:
            return [Problem("failure", word)]
    return []


def _file(text: str) -> str:
    """Return a file's name, safe to show, relative to a guest's workspace if it is in one."""
    return safe_name(text).removeprefix("/workspace/").removeprefix("./")


def _line(text: str, base: int) -> int | None:
    if not re.fullmatch(r"\s*[0-9]{1,7}\s*", text, re.ASCII):
        return None
    return int(text) + 1 - base or None


def seconds(text: str) -> float:
    """Parse a duration as reports write it; return 0 if it is invalid.

    A comma, or a dot, that groups digits by three is dropped (``1,234.5``, ``1.234,5``); any other comma is a
    decimal comma (``0,160``, ``12,5``).
    """
    text = text.strip().removesuffix("s")
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    elif _GROUPED_BY_DOTS.fullmatch(text):
        text = text.replace(".", "").replace(",", ".")
    elif text.count(",") == 1 and "." not in text:
        text = text.replace(",", ".")
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and 0 <= value <= _LONGEST else 0.0
