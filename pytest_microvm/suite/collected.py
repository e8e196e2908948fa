"""The collection of a guest's pytest as a value, parsed from untrusted records and validated."""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pytest_microvm.suite import checks

_KINDS = frozenset(["directory", "file", "collector", "item"])
_OUTCOMES = frozenset(["passed", "failed", "skipped"])
MAX_NODES = 500_000
"""Collectors and tests that one collection may have; pytest needs a few KiB for each."""
_MAX_CLASSES = 1000
_MAX_SHARING = 10
_SHARED = frozenset(["class", "module", "session"])


@dataclass(frozen=True)
class Mark:
    """A marker of a node; arguments that JSON cannot represent are texts."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class CollectedNode:
    """A collector or an item. ``raw_nodeid`` is the guest's own text; all other texts are safe to show."""

    parent: int
    kind: str
    class_name: str
    name: str
    nodeid: str
    raw_nodeid: str
    path: str
    marks: tuple[Mark, ...] = ()
    extra_keywords: tuple[str, ...] = ()
    doc: str = ""
    representation: str = ""
    location: tuple[str, int | None, str] = ("", None, "")
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CollectOutcome:
    """One collect report: the collector's number, its outcome and results, and the full report if any.

    ``shown``: its failure was an object that renders itself (``toterminal``), serialized as text.
    """

    node: int
    outcome: str
    result: tuple[int, ...]
    report: dict[str, Any] | None
    shown: bool = False


@dataclass(frozen=True)
class WideFixture:
    """A fixture with a scope wider than a test. All texts are as the guest wrote them: not safe to show.

    Args:
        key: Its name with its scope, the place that it belongs to, and its parameter: unique in a run.
        scope: ``session``, ``package``, ``module`` or ``class``.
        name: Its name.
        base: The place of its definition, such as a folder.
        requests: The names of the fixtures that it requests by its arguments.
    """

    key: str
    scope: str
    name: str
    base: str
    requests: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuestWarning:
    """A warning recorded in the guest; ``category`` holds class names, the most specific first."""

    when: str
    nodeid: str
    message: str
    category: tuple[str, ...]
    filename: str
    lineno: int
    line: str | None


@dataclass(frozen=True)
class GuestExit:
    """The end of a guest's pytest that ended by itself: exit code, reason in one word, and message."""

    code: int
    reason: str
    text: str

    @property
    def shown(self) -> bool:
        """True if pytest was only to show something, and has."""
        return self.code == 0 and self.reason == "shown"


@dataclass(frozen=True)
class Collected:
    """The complete result of a collection.

    Args:
        nodes: All nodes; the session is number 0 and not among them, the first has number 1.
        reports: Collect reports in the guest's order.
        order: The items to run, by number, as the project's hooks ordered them.
        deselected: Items that the project's hooks deselected.
        warnings: Warnings recorded so far.
        markers: The project's registered markers.
        python: The guest's Python version.
        pytest: The guest's pytest version.
        header: Lines of the guest's report header.
        speaking: Plug-ins and conftest files that do something at the end of the session.
        outputs: Whether some of them get the ``workeroutput`` of each machine (pytest-xdist's contract).
        asks_for_worker: Whether a test uses the id of its pytest-xdist worker.
        wide: The fixtures with a scope wider than a test.
        needed: For each item of ``order``, the numbers of those that it needs.
        sharing: Plug-ins whose tests need one process, each with the isolation that gives them one.
        executed: What was executed meanwhile, as coverage measured it; not checked.
        printed: Output outside of pytest's capturing, each with the number of files collected before it.
        exit: Set if collection ended early.
    """

    nodes: tuple[CollectedNode, ...] = ()
    reports: tuple[CollectOutcome, ...] = ()
    order: tuple[int, ...] = ()
    deselected: tuple[int, ...] = ()
    warnings: tuple[GuestWarning, ...] = ()
    markers: tuple[str, ...] = ()
    python: str = ""
    pytest: str = ""
    header: tuple[str, ...] = ()
    speaking: tuple[str, ...] = ()
    outputs: bool = False
    asks_for_worker: bool = False
    wide: tuple[WideFixture, ...] = ()
    needed: tuple[tuple[int, ...], ...] = ()
    sharing: tuple[tuple[str, str], ...] = ()
    executed: dict[str, Any] | None = None
    printed: tuple[tuple[int, str], ...] = ()
    exit: GuestExit | None = None

    def pure(self, names: Iterable[str]) -> frozenset[int]:
        """Return the numbers of the session fixtures called ``names``, and of those that they request."""
        requests: dict[str, set[str]] = {}
        for fixture in self.wide:
            requests.setdefault(fixture.name, set()).update(fixture.requests)
        found: set[str] = set()
        new = set(names)
        while new:
            found |= new
            new = set().union(*(requests.get(name, ()) for name in new)) - found
        return frozenset(
            number
            for number, fixture in enumerate(self.wide)
            if fixture.name in found and fixture.scope == "session"
        )

    @classmethod
    def parse(cls, data: bytes) -> Collected:
        """Parse the lines of a runner's answer to ``collect``.

        Raises:
            ProtocolViolation: They do not follow the runner's protocol.
        """
        draft = _Draft()
        records = checks.Records(checks.MAX_COLLECTED_VALUES)
        for line in _lines(data):
            record = records.read(line)
            kind = record.get("k")
            if not isinstance(kind, str) or kind not in _READERS:
                raise checks.violation("a record of an unknown kind")
            _READERS[kind](draft, record)
        if not draft.complete:
            raise checks.violation("a collection without an end")
        return draft.finish()


@dataclass
class _Draft:
    """A :class:`Collected` under construction."""

    values: dict[str, Any] = field(default_factory=dict)
    nodes: list[CollectedNode] = field(default_factory=list)
    reports: list[CollectOutcome] = field(default_factory=list)
    deselected: list[int] = field(default_factory=list)
    warnings: list[GuestWarning] = field(default_factory=list)
    printed: list[tuple[int, str]] = field(default_factory=list)
    class_names: set[str] = field(default_factory=set)
    complete: bool = False

    def finish(self) -> Collected:
        count = len(self.nodes)
        numbers = [*self.values.get("order", ()), *self.deselected]
        for report in self.reports:
            numbers += [number for number in (report.node, *report.result) if number]
        if any(not 1 <= number <= count for number in numbers):
            raise checks.violation("the number of a node that does not exist")
        items = [*self.values.get("order", ()), *self.deselected]
        if any(self.nodes[number - 1].kind != "item" for number in items):
            raise checks.violation("a collector where an item belongs")
        needed = self.values.get("needed", ())
        if needed and len(needed) != len(self.values.get("order", ())):
            raise checks.violation("fixtures of other tests than it collected")
        return Collected(
            nodes=tuple(self.nodes),
            reports=tuple(self.reports),
            deselected=tuple(self.deselected),
            warnings=tuple(self.warnings),
            printed=tuple(self.printed),
            **self.values,
        )


def _lines(data: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(data):  # one at a time: splitting at once would copy all the data
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if end > start:
            yield data[start:end]
        start = end + 1


def _guest(draft: _Draft, record: dict[str, Any]) -> None:
    draft.values["python"] = checks.line(record.get("python"), "Python version")
    draft.values["pytest"] = checks.line(record.get("pytest"), "pytest version")
    header = checks.array(record.get("header"), "header", 1000)
    draft.values["header"] = tuple(checks.line(item, "header line") for item in header)


def _node(draft: _Draft, record: dict[str, Any]) -> None:
    kind, raw = checks.choice(record.get("kind"), _KINDS, "kind of node"), record.get("nodeid")
    nodeid = checks.line(raw, "node id")
    if "::()" in nodeid or not isinstance(raw, str):
        raise checks.violation("a node id that pytest never makes")
    parent = checks.integer(record.get("parent"), "parent", 0, len(draft.nodes))
    if parent and draft.nodes[parent - 1].kind == "item":
        raise checks.violation("a node below an item")
    if len(draft.nodes) >= MAX_NODES:
        raise checks.violation(f"more than {MAX_NODES} collectors and tests")
    draft.nodes.append(
        CollectedNode(
            parent=parent,
            kind=kind,
            class_name=_class_name(draft, record.get("class")),
            name=checks.line(record.get("name"), "node name"),
            nodeid=nodeid,
            raw_nodeid=raw,
            path=checks.line(record.get("path"), "path"),
            marks=tuple(_mark(mark) for mark in checks.array(record.get("marks"), "marker list", 10_000)),
            extra_keywords=_names(record.get("extra"), "keyword list"),
            doc=checks.text(record.get("doc", ""), "doc string"),
            representation=checks.line(record.get("repr", ""), "node"),
            location=_location(record.get("location")) if kind == "item" else ("", None, ""),
            attributes=_names(record.get("attributes", []), "attribute list"),
        )
    )


def _class_name(draft: _Draft, value: object) -> str:
    """Return the name for a node's proxy class; each name creates a class, so their number is limited."""
    name = checks.line(value, "class name")
    if not name.isidentifier() or keyword.iskeyword(name):
        return "Node"
    if name not in draft.class_names and len(draft.class_names) >= _MAX_CLASSES:
        return "Node"
    draft.class_names.add(name)
    return name


def _names(value: object, what: str) -> tuple[str, ...]:
    return tuple(checks.line(name, "name") for name in checks.array(value, what, 10_000))


def _mark(value: object) -> Mark:
    name, args, kwargs = _three(value, "marker")
    return Mark(
        checks.line(name, "marker name"),
        tuple(checks.plain(arg) for arg in checks.array(args, "marker's arguments")),
        checks.plain(checks.mapping(kwargs, "marker's arguments")),
    )


def _three(value: object, what: str) -> tuple[Any, Any, Any]:
    parts = checks.array(value, what, 3)
    if len(parts) != 3:  # noqa: PLR2004 - the name says it
        raise checks.violation(f"a {what} without its three parts")
    return parts[0], parts[1], parts[2]


def _location(value: object) -> tuple[str, int | None, str]:
    path, number, domain = _three(value, "location")
    return (
        checks.line(path, "path"),
        None if number is None else checks.integer(number, "line number", -1),
        _domain(domain),
    )


def _domain(value: object) -> str:
    """Return a test's name in its file; pytest shows dots as ``::``, a CI command if at the start."""
    name = checks.line(value, "test name")
    return f"\\{name}" if name.lstrip().startswith((".", ":")) else name


def _collected(draft: _Draft, record: dict[str, Any]) -> None:
    report = record.get("data")
    draft.reports.append(
        CollectOutcome(
            node=checks.integer(record.get("node"), "node number"),
            outcome=checks.choice(record.get("outcome"), _OUTCOMES, "outcome"),
            result=_numbers(record.get("result")),
            report=None if report is None else checks.mapping(report, "collect report"),
            shown=record.get("shown") is True,
        )
    )


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(checks.integer(number, "node number", 1) for number in checks.array(value, "list of nodes"))


def _deselected(draft: _Draft, record: dict[str, Any]) -> None:
    draft.deselected += _numbers(record.get("items"))


def parse_warning(record: dict[str, Any]) -> GuestWarning:
    """Parse a ``warning`` record.

    Raises:
        ProtocolViolation: It is malformed.
    """
    source = record.get("line")
    when = checks.line(record.get("when"), "phase")
    return GuestWarning(
        when=when if when in {"config", "collect", "runtest"} else "runtest",
        nodeid=checks.line(record.get("nodeid"), "node id"),
        message=checks.text(record.get("message"), "warning"),
        category=_names(record.get("category"), "warning category"),
        filename=checks.path(record.get("filename"), "path"),
        lineno=checks.integer(record.get("lineno"), "line number"),
        line=None if source is None else checks.line(source, "source line"),
    )


def parse_exit(record: dict[str, Any]) -> GuestExit:
    """Parse an ``exit`` record.

    Raises:
        ProtocolViolation: It is malformed.
    """
    code = record.get("code")
    return GuestExit(
        code=2 if code is None else checks.integer(code, "exit code", -255, 255),
        reason=checks.line(record.get("reason"), "reason"),
        text=checks.text(record.get("text"), "message"),
    )


def _warning(draft: _Draft, record: dict[str, Any]) -> None:
    draft.warnings.append(parse_warning(record))


def _exit(draft: _Draft, record: dict[str, Any]) -> None:
    draft.values["exit"] = parse_exit(record)
    draft.complete = True


def _items(draft: _Draft, record: dict[str, Any]) -> None:
    draft.values["order"] = _numbers(record.get("order"))
    draft.values["asks_for_worker"] = record.get("worker") is True
    draft.values["markers"] = _names(record.get("markers"), "marker list")


def _ending(draft: _Draft, record: dict[str, Any]) -> None:
    draft.values["speaking"] = _names(record.get("plugins"), "list of plug-ins")
    draft.values["outputs"] = record.get("outputs") is True


def _wide(draft: _Draft, record: dict[str, Any]) -> None:
    fixtures = tuple(map(_fixture, checks.array(record.get("fixtures"), "list of fixtures")))
    draft.values["wide"] = fixtures
    draft.values["needed"] = tuple(
        tuple(checks.integer(number, "number of a fixture", 0, len(fixtures) - 1) for number in numbers)
        for numbers in (
            checks.array(each, "list of fixtures") for each in checks.array(record.get("needed"), "list")
        )
    )


def _fixture(value: object) -> WideFixture:
    parts = checks.array(value, "fixture", 5)
    if len(parts) != 5 or not all(isinstance(each, str) for each in parts[:4]):  # noqa: PLR2004 - its fields
        raise checks.violation("a fixture without its five parts")
    key, scope, name, base, requests = parts
    if not all(isinstance(each, str) for each in checks.array(requests, "list of requests")):
        raise checks.violation("a request that is not text")
    return WideFixture(key, scope, name, base, tuple(requests))


def _printed(draft: _Draft, record: dict[str, Any]) -> None:
    files = checks.integer(record.get("files"), "number of files")
    draft.printed.append((files, checks.text(record.get("text"), "output")))


def _sharing(draft: _Draft, record: dict[str, Any]) -> None:
    isolation = checks.choice(record.get("isolation"), _SHARED, "isolation")
    known = draft.values.get("sharing", ())
    if len(known) < _MAX_SHARING:
        draft.values["sharing"] = (*known, (checks.line(record.get("plugin"), "plug-in"), isolation))


def _coverage(draft: _Draft, record: dict[str, Any]) -> None:
    draft.values["executed"] = record


def _end(draft: _Draft, _record: dict[str, Any]) -> None:
    draft.complete = True


_READERS = {
    "guest": _guest,
    "node": _node,
    "collected": _collected,
    "deselected": _deselected,
    "warning": _warning,
    "items": _items,
    "ending": _ending,
    "wide": _wide,
    "sharing": _sharing,
    "coverage": _coverage,
    "printed": _printed,
    "exit": _exit,
    "end": _end,
}
