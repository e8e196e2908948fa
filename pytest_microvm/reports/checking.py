"""Check a JUnit file for content that its reader would reject or misread."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from pytest_microvm.reports.parsing import OUR_MARK, ReportRefused, refuse_declarations
from pytest_microvm.reports.profiles import DEFAULT_PROFILE, PROFILES, Profile
from pytest_microvm.reports.reading import read_report
from pytest_microvm.reports.text import safe_name

MOST_FINDINGS = 200

_RESULTS = {"failure": "failures", "error": "errors", "skipped": "skipped"}
_NUMBER = re.compile(r"\s*([0-9]+(\.[0-9]*)?|\.[0-9]+|[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]*)?)\s*", re.ASCII)
_DECIMAL_COMMA = re.compile(r"\s*[0-9.]+,[0-9]+\s*", re.ASCII)


@dataclass(frozen=True)
class Finding:
    """Something that a reader would reject or misread.

    Args:
        line: Line in the file; the first is 1; 0: the file as a whole.
        text: Description.
    """

    line: int
    text: str


def check_report(path: Path, profile: Profile | None = None) -> list[Finding]:
    """Return the findings in a file, in its order; none if it is valid.

    Args:
        path: The file.
        profile: Its reader's; by default the one named in the file, else the generic one.
    """
    report = read_report(path, ours=True)
    if report.trouble:
        return [Finding(0, f"it cannot be read: {report.trouble}")]
    named = {dict(suite.properties).get(OUR_MARK) for suite in report.suites}
    marked = PROFILES.get(next(iter(named)) or "") if len(named) == 1 else None
    checking = _Checking(profile or marked or PROFILES[DEFAULT_PROFILE])
    data = path.read_bytes()
    try:
        checking.run(data)
    except (
        expat.ExpatError,
        ReportRefused,
        LookupError,
        ValueError,
    ) as error:  # read_report repairs these, other readers do not
        line = error.lineno if isinstance(error, expat.ExpatError) else 0
        checking.findings.append(Finding(line, f"it is not well-formed XML: {safe_name(str(error))}"))
    checking.whole(len(data))
    return checking.findings[:MOST_FINDINGS]


@dataclass
class _CheckedSuite:
    line: int
    told: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    names: Counter[tuple[str, str]] = field(default_factory=Counter)
    pytest: bool = False
    ours: bool = False


@dataclass
class _CheckedCase:
    line: int
    told: dict[str, str]
    results: list[str] = field(default_factory=list)


class _Checking:
    """Walks through a file that is known to be safe to parse."""

    def __init__(self, profile: Profile) -> None:
        self.findings: list[Finding] = []
        self._profile = profile
        self._suites: list[_CheckedSuite] = []
        self._root: dict[str, str] = {}
        self._case: _CheckedCase | None = None
        self._result = ""
        self._text: list[str] = []
        self._names: Counter[tuple[str, str]] = Counter()
        self._cases = 0
        self._parser = parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse_declarations
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text.append

    def run(self, data: bytes) -> None:
        """Check every element."""
        self._parser.Parse(data, True)

    def whole(self, size: int) -> None:
        """Check the file as a whole."""
        limit, most = self._profile.file_limit, self._profile.case_limit
        if size > limit:
            self._say(0, f"it has {size:,} bytes; {self._profile.name} takes {limit:,}")
        if self._cases > most:
            self._say(0, f"it has {self._cases:,} tests; {self._profile.name} takes {most:,}")
        if not self._cases:
            self._say(0, "it has no test")

    def _say(self, line: int, text: str) -> None:
        self.findings.append(Finding(line, text))

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        line = self._parser.CurrentLineNumber
        self._text.clear()
        if tag == "testsuites":
            self._root = attributes
        elif tag == "testsuite":
            pytest = self._root.get("name") == "pytest tests" or attributes.get("name") == "pytest"
            self._suites.append(_CheckedSuite(line, attributes, pytest=pytest))
        elif tag == "testcase":
            self._case = _CheckedCase(line, attributes)
        elif tag in _RESULTS and self._case is not None:
            self._case.results.append(tag)
        elif tag == "property" and self._suites and attributes.get("name") == OUR_MARK:
            self._suites[-1].ours = True
        if tag == "properties" and self._case is not None and not self._profile.case_properties:
            self._say(line, f"properties of a test: {self._profile.name} has no place for them")

    def _end(self, tag: str) -> None:
        if tag == "testcase" and self._case is not None:
            self._end_case(self._case)
            self._case = None
        elif tag in ("failure", "error") and self._case is not None:
            if self._profile.message_in_text and not "".join(self._text).strip():
                self._say(
                    self._case.line, f"<{tag}> without text: {self._profile.name} shows nothing else of it"
                )
        elif tag == "testsuite":
            self._end_suite(self._suites.pop())

    def _end_case(self, case: _CheckedCase) -> None:
        told, say = case.told, self._say
        name, classname = told.get("name", ""), told.get("classname", "")
        about = f"test {safe_name(name, 80)!r}"
        self._cases += 1
        if not name:
            say(case.line, "a test without a name")
        if not classname:
            say(case.line, f"{about} has no classname")
        if "time" in told and not _NUMBER.fullmatch(told["time"]):
            comma = _DECIMAL_COMMA.fullmatch(told["time"])
            why = "has a decimal comma, which readers skip" if comma else "is no number of seconds"
            say(case.line, f"{about}: time={told['time'][:40]!r} {why}")
        self._check_place(case, about)
        if len(case.results) > 1:
            say(
                case.line,
                f"{about} has {len(case.results)} results ({', '.join(case.results)}): readers take one",
            )
        if self._profile.safe_paths and (re.search(r"[/\\]", classname) or not classname.strip(".")):
            say(case.line, f"{about}: its classname is a path; {self._profile.name} takes files from there")
        names = self._names if self._profile.flat or not self._suites else self._suites[-1].names
        names[classname, name] += 1
        if names[classname, name] == 2:  # noqa: PLR2004 - reported once
            where = "this file" if self._profile.flat else "this suite"
            say(case.line, f"{about} of {safe_name(classname, 80)!r} is in {where} more than once")
        if self._suites:
            for suite in self._suites:  # an outer suite counts the tests of its inner suites
                suite.counts.update(["tests", *(_RESULTS[result] for result in case.results[:1])])

    def _check_place(self, case: _CheckedCase, about: str) -> None:
        place = case.told.get("line")
        suite = self._suites[-1] if self._suites else None
        if case.told.keys() & {"file", "line"} and not self._profile.places:
            self._say(
                case.line, f"{about} has file or line, for which {self._profile.name}'s schema has no place"
            )
        elif place is not None and suite is not None and suite.pytest and not suite.ours:
            self._say(case.line, f"{about}: pytest counts lines from 0, readers from 1")
        elif place is not None and not re.fullmatch(r"[1-9][0-9]{0,7}", place, re.ASCII):
            self._say(case.line, f"{about}: line={place[:40]!r} is no line; the first is 1")

    def _end_suite(self, suite: _CheckedSuite) -> None:
        name = safe_name(suite.told.get("name", ""), 80)
        if not name:
            self._say(suite.line, "a suite without a name")
        for key in ("tests", *_RESULTS.values()):
            told = suite.told.get(key)
            if told is not None and told.strip() != str(suite.counts[key]):
                self._say(suite.line, f"suite {name!r} says {key}={told[:20]!r}, but has {suite.counts[key]}")
            elif told is None and key != "skipped":
                self._say(suite.line, f"suite {name!r} does not say how many {key}")
