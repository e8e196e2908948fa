"""Rebuild reports that a guest's pytest serialized, through a strict schema and pytest's own hook."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, cast

import pytest
from _pytest._code.code import TerminalRepr
from _pytest._io import TerminalWriter

from pytest_microvm.suite import checks
from pytest_microvm.suite.collected import CollectOutcome
from pytest_microvm.untrusted.text import sanitize
from pytest_microvm.wire.fields import is_whole

_PHASES = frozenset(["setup", "call", "teardown"])
_OUTCOME = re.compile("[a-z][a-z_]{0,39}")  # plug-ins have their own: rerun, retried
_STYLES = frozenset(["long", "short", "line", "no", "native", "value", "auto"])
_SEPARATORS = frozenset("-_=*~!+.")
_COLOURS = frozenset(["red", "green", "yellow", "blue", "purple", "cyan", "white", "bold", "light"])
_MAX_ENTRIES = 10_000
_RESERVED = frozenset(
    [
        *dir(pytest.TestReport),
        *("nodeid", "location", "keywords", "when", "outcome", "sections", "user_properties", "duration"),
        *("start", "stop", "wasxfail", "longrepr", "result", "context"),
        *("node", "worker_id", "testrun_uid", "item_index"),  # of pytest-xdist
    ]
)
_RESERVED_PREFIXES = ("_", "microvm")


def rebuild_test_report(
    config: pytest.Config, line: dict[str, Any], item: Any, properties: list[tuple[str, str]]
) -> pytest.TestReport:
    """Return the test report in ``line``, which must be about ``item``.

    Args:
        config: The host's pytest configuration.
        line: The runner's record; its ``data`` is the result of ``pytest_report_to_serializable``.
        item: The proxy of the requested test.
        properties: Our own user properties, appended to the test's.

    Raises:
        ProtocolViolation: It is malformed, or about another test.
    """
    record = checks.mapping(line.get("data"), "test report")
    if record.get("nodeid") != item.guest.raw_nodeid:
        raise checks.violation("a report about another test than the one it was asked for")
    when = checks.choice(record.get("when"), _PHASES, "phase")
    outcome = _outcome(record.get("outcome"))
    clean: dict[str, Any] = {
        "$report_type": "TestReport",
        "nodeid": item.nodeid,
        "location": item.location,
        "keywords": dict.fromkeys(_keywords(record.get("keywords")), 1),
        "when": when,
        "outcome": outcome,
        "sections": _sections(record.get("sections", [])),
        "user_properties": [*_properties(record.get("user_properties", [])), *properties],
        "duration": checks.seconds(record.get("duration")),
        "start": checks.seconds(record.get("start")),
        "stop": checks.seconds(record.get("stop")),
    }
    if "wasxfail" in record:
        clean["wasxfail"] = checks.text(record["wasxfail"], "reason")
    if record.get("_report_type") == "SubTestReport":
        clean["_report_type"] = "SubTestReport"
        clean["_subtest.context"] = _subtest(record.get("_subtest.context"))
    longrepr = _longrepr(record.get("longrepr"), outcome)
    report = cast("pytest.TestReport", _rebuilt(config, clean, longrepr, shown=line.get("shown") is True))
    for name, value in _added(record):
        setattr(report, name, value)
    if line.get("debugged") is True and report.failed:
        report._pdbshown = True  # type: ignore[attr-defined] # noqa: SLF001 - pytest's own mark
    if "status" in line:
        report.microvm_status = _status(line["status"])  # type: ignore[attr-defined]
    return report


def _outcome(value: object) -> str:
    if not isinstance(value, str) or not _OUTCOME.fullmatch(value):
        raise checks.violation("an unknown outcome")
    return value


def _added(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the JSON data that the guest's plug-ins put on a report, under names that pytest does not use."""
    for name, value in record.items():
        if name.isidentifier() and not name.startswith(_RESERVED_PREFIXES) and name not in _RESERVED:
            yield name, checks.plain(value)


def _status(value: object) -> tuple[str, str, str | tuple[str, dict[str, bool]]]:
    """Return the category, letter and word by which the guest's plug-ins name an outcome."""
    parts = checks.array(value, "status", 3)
    if len(parts) != 3:  # noqa: PLR2004 - category, letter, word
        raise checks.violation("a status without its three parts")
    category, letter, word = parts
    if isinstance(word, list) and len(word) == 2:  # noqa: PLR2004 - word, markup
        colours = {name: True for name in checks.mapping(word[1], "markup") if name in _COLOURS}
        word = (checks.line(word[0], "word"), colours)
    else:
        word = checks.line(word, "word")
    return checks.line(category, "category"), checks.line(letter, "letter"), word


def rebuild_collect_report(
    config: pytest.Config, collected: CollectOutcome, nodeid: str, result: list[Any]
) -> pytest.CollectReport:
    """Return a collect report for the collector ``nodeid`` with the proxies ``result``.

    Raises:
        ProtocolViolation: It is malformed.
    """
    record = collected.report or {}
    clean = {
        "$report_type": "CollectReport",
        "nodeid": nodeid,
        "outcome": collected.outcome,
        "sections": _sections(record.get("sections", [])),
        "result": None,
    }
    longrepr = _longrepr(record.get("longrepr"), collected.outcome)
    report = cast("pytest.CollectReport", _rebuilt(config, clean, longrepr, shown=collected.shown))
    report.result = result
    return report


def _rebuilt(
    config: pytest.Config, clean: dict[str, Any], longrepr: Any, *, shown: bool
) -> pytest.TestReport | pytest.CollectReport:
    """Return the report that pytest makes of ``clean``, with the failure ``longrepr``."""
    # pytest looks for its keys with ``in``, which would also find them in a text.
    data = {**clean, "longrepr": longrepr if isinstance(longrepr, dict) else None}
    report = config.hook.pytest_report_from_serializable(config=config, data=data)
    assert isinstance(report, (pytest.TestReport, pytest.CollectReport))
    if not isinstance(longrepr, dict):
        report.longrepr = Shown(longrepr) if shown and isinstance(longrepr, str) else longrepr
    return report


class Shown(TerminalRepr):
    """A failure representation that consists of its text only, such as that of a missing fixture."""

    def __init__(self, text: str) -> None:
        self._text = text

    def toterminal(self, out: TerminalWriter) -> None:
        """Write the text, with its error lines in red."""
        for line in self._text.splitlines():
            out.line(line, red=line.startswith("E "))


class _Repr:
    """A text that is its own ``repr``: pytest calls ``repr`` again on a subtest's arguments."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def error_report(
    item: Any,
    when: Literal["setup", "call", "teardown"],
    message: str,
    properties: list[tuple[str, str]],
    sections: tuple[tuple[str, str], ...] = (),
) -> pytest.TestReport:
    """Return our own failed report, with a machine's error in place of the test's result."""
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="failed",
        longrepr=sanitize(message),
        when=when,
        sections=[(title, sanitize(content)) for title, content in sections],
        user_properties=properties,
    )


def passed_report(
    item: Any, when: Literal["setup", "call", "teardown"], properties: list[tuple[str, str]]
) -> pytest.TestReport:
    """Return our own passed report, so that every test has a setup and a teardown."""
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="passed",
        longrepr=None,
        when=when,
        user_properties=properties,
    )


def _keywords(value: object) -> list[str]:
    return [checks.line(name, "keyword") for name in checks.mapping(value, "keywords")]


def _pairs(value: object, what: str) -> list[list[Any]]:
    pairs = [checks.array(pair, what, 2) for pair in checks.array(value, f"list of {what}s", _MAX_ENTRIES)]
    if any(len(pair) != 2 for pair in pairs):  # noqa: PLR2004 - a pair
        raise checks.violation(f"a {what} without its two parts")
    return pairs


def _sections(value: object) -> list[tuple[str, str]]:
    pairs = _pairs(value, "section")
    return [(checks.line(title, "title"), checks.text(content, "section")) for title, content in pairs]


def _properties(value: object) -> list[tuple[str, Any]]:
    pairs = _pairs(value, "property")
    named = [(checks.line(name, "property name"), checks.plain(content)) for name, content in pairs]
    return [(name, content) for name, content in named if not name.startswith("microvm.")]


def _subtest(value: object) -> dict[str, Any]:
    context = checks.mapping(value, "subtest")
    message = context.get("msg")
    arguments = checks.mapping(context.get("kwargs"), "subtest's arguments")
    return {
        "msg": None if message is None else checks.text(message, "message"),
        "kwargs": {
            checks.line(name, "name"): _Repr(checks.text(arg, "value")) for name, arg in arguments.items()
        },
    }


def _longrepr(value: object, outcome: str) -> Any:
    """Return a failure's ``longrepr``: ``None``, a text, the place and reason of a skip, or tracebacks."""
    if isinstance(value, list):
        if len(value) != 3:  # noqa: PLR2004 - path, line, reason
            raise checks.violation("a skip without its three parts")
        path, number, reason = value
        line_number = number if is_whole(number, -1, 2**53) else 0
        return (checks.path(path, "path"), line_number, checks.text(reason, "reason"))
    if value is None and outcome == "passed":
        return None
    if value is None or isinstance(value, str):
        text = sanitize(value or "no reason was given")
        return ("", 0, text) if outcome == "skipped" else text
    record = checks.mapping(value, "failure")
    chain = record.get("chain")
    links = [] if chain is None else checks.array(chain, "chain of failures", 1000)
    return {
        "reprcrash": _crash(record.get("reprcrash")),
        "reprtraceback": _traceback(record.get("reprtraceback")),
        "sections": [
            _failure_section(section) for section in checks.array(record.get("sections"), "sections")
        ],
        "chain": [_link(link) for link in links] or None,
    }


def _failure_section(value: object) -> tuple[str, str, str]:
    parts = checks.array(value, "section", 3)
    if len(parts) != 3:  # noqa: PLR2004 - name, content, separator
        raise checks.violation("a section without its three parts")
    name, content, separator = parts
    safe = separator if isinstance(separator, str) and separator in _SEPARATORS else "-"
    return checks.line(name, "title"), checks.text(content, "section"), safe


def _link(value: object) -> tuple[Any, Any, str | None]:
    parts = checks.array(value, "failure", 3)
    if len(parts) != 3:  # noqa: PLR2004 - traceback, crash, description
        raise checks.violation("a failure without its three parts")
    traceback, crash, description = parts
    return (
        _traceback(traceback),
        _crash(crash),
        None if description is None else checks.text(description, "description"),
    )


def _crash(value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    record = checks.mapping(value, "place")
    return {
        "path": checks.path(record.get("path"), "path"),
        "lineno": checks.integer(record.get("lineno"), "line number", -1),
        "message": checks.text(record.get("message"), "message"),
    }


def _traceback(value: object) -> dict[str, Any]:
    record = checks.mapping(value, "traceback")
    extra = record.get("extraline")
    entries = checks.array(record.get("reprentries"), "traceback", _MAX_ENTRIES)
    return {
        "reprentries": [_entry(entry) for entry in entries],
        "extraline": None if extra is None else checks.text(extra, "line"),
        "style": checks.choice(record.get("style"), _STYLES, "traceback style"),
    }


def _entry(value: object) -> dict[str, Any]:
    entry = checks.mapping(value, "traceback entry")
    data = checks.mapping(entry.get("data"), "traceback entry")
    if entry.get("type") == "ReprEntryNative":
        return {"type": "ReprEntryNative", "data": {"lines": _joined(data.get("lines"))}}
    if entry.get("type") != "ReprEntry":
        raise checks.violation("an unknown traceback entry")
    arguments, local_names = data.get("reprfuncargs"), data.get("reprlocals")
    return {
        "type": "ReprEntry",
        "data": {
            "lines": _text_lines(data.get("lines")),
            "reprfuncargs": None if arguments is None else {"args": _arguments(arguments)},
            "reprlocals": None if local_names is None else {"lines": _local_lines(local_names)},
            "reprfileloc": _crash(data.get("reprfileloc")),
            "style": checks.choice(data.get("style"), _STYLES, "traceback style"),
        },
    }


def _text_lines(value: object) -> list[str]:
    return [checks.text(line, "line") for line in checks.array(value, "lines", 100_000)]


def _joined(value: object) -> list[str]:
    """Join and sanitize pieces of text as one, because pytest shows them without separators."""
    pieces = checks.array(value, "lines", 100_000)
    if not all(isinstance(piece, str) for piece in pieces):
        raise checks.violation("a line that is not text")
    return [sanitize("".join(pieces))]


def _local_lines(value: object) -> list[str]:
    return _text_lines(checks.mapping(value, "local variables").get("lines"))


def _arguments(value: object) -> list[tuple[str, str]]:
    pairs = _pairs(checks.mapping(value, "arguments").get("args"), "argument")
    return [
        (checks.line(name, "name"), checks.text(str(checks.plain(shown)), "value")) for name, shown in pairs
    ]
