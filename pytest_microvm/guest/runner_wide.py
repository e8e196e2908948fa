"""Wide fixtures, whose scope is wider than a test: set up once in one machine, whose copies run the tests.

The machine that sets them up is the keeper. It does what pytest does between two tests: it tears down what
the next test does not need, and sets up what that needs. In its copies these fixtures stand. A copy sets up
and tears down all other fixtures of its test, such as those that the test requests while it runs.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.logging import caplog_records_key
from _pytest.runner import CallInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPEAT = "repeat"
"""Set every fixture up in this machine: it is nobody's copy."""

TELL = "tell"
"""Tell the host before the first wide fixture is set up, and do no more."""

STANDING = "standing"
"""This machine is a copy of the keeper: leave the fixtures that stand."""

_OUTPUT = ("stdout", "stderr")
_CHEAP = 0.01  # seconds; a faster set-up is not worth being told
_OWN = ("_pytest.python", "_pytest.unittest")  # where pytest wraps set-up functions of the user


class WideFixtures:
    """The plug-in that knows which wide fixtures each test needs, and which of them stand.

    Args:
        session: The session, once it has collected.

    Attributes:
        fixtures: For each fixture: its key (its name with its scope, the place that it belongs to, and its
            parameter), its scope, name, the place of its definition, and the names of what it requests.
        needed: For each of the session's items, the numbers of the fixtures that it needs.
    """

    def __init__(self, session: pytest.Session) -> None:
        self._session = session
        self._numbers: dict[str, int] = {}
        self.fixtures: list[tuple[str, str, str, str, list[str]]] = []
        self.needed = [tuple(self._needed(item)) for item in session.items]
        self._standing: dict[int, None] = {}
        self._seconds: dict[int, float] = {}
        self._begun: tuple[int | None, float] = None, 0.0
        self._way = REPEAT
        self._item: Any = None
        self._tell: Callable[[], None] | None = None
        self._own: list[tuple[Any, Any]] = []
        self._complete = False
        self._printed: list[list[tuple[str, str, str]]] = []  # by the last set-ups for copies
        self._shown = 0
        self._others = _not_pytests(session.config)

    # What the runner asks for

    def begin(self, position: int, way: str, tell: Callable[[], None], shown: int = 0) -> None:
        """Get ready for a test.

        Args:
            position: Its position among the session's items.
            way: What to do with wide fixtures: :data:`REPEAT`, :data:`TELL` or :data:`STANDING`.
            tell: Called before the first one is set up, if ``way`` is ``TELL``; does not return.
            shown: Number of the last set-ups for copies whose output is shown with this test.
        """
        self._way, self._tell, self._shown = way, tell, shown
        self._item, self._needs = self._session.items[position], set(self.needed[position])
        self._seconds.clear()
        self._own.clear()
        if way == STANDING:
            state: Any = self._session._setupstate
            type(state).teardown_exact(state, self._item)  # nodes of another test in which nothing stands
            state.teardown_exact = self._tear_down_own

    def output(self, *, keep: bool) -> str:
        """Return what the set-ups that are shown with this test printed while they were captured.

        Args:
            keep: Whether the test's report has it, too.
        """
        shown = self._printed[-self._shown :] if self._shown else []
        text = "".join(text for sections in shown for _when, key, text in sections if key in _OUTPUT)
        if not keep:
            for sections in shown:
                sections[:] = [section for section in sections if section[1] not in _OUTPUT]
        return text

    def cost(self) -> list[tuple[int, float]]:
        """Return the fixtures that took long to set up since :meth:`begin`: numbers and seconds."""
        return [(number, seconds) for number, seconds in self._seconds.items() if seconds >= _CHEAP]

    def prepare(self, position: int, count: int) -> bool:
        """Set up the first ``count`` wide fixtures that a test needs, up to the first that fails.

        Returns:
            Whether none failed.
        """
        item: Any = self._session.items[position]
        self._complete = False
        self.begin(position, REPEAT, lambda: None)
        if hasattr(item, "_request") and not item._request:
            item._initrequest()
        before = len(item._report_sections)
        with _narrowed(item, lambda: self._fill(item, count)):
            self._within_protocol(item, lambda: self._set_up(item))
        self._printed = [*self._printed[-1:], item._report_sections[before:]]  # a test is shown two at most
        del item._report_sections[before:]
        item._initrequest()
        return self._complete

    def tear_down(self, position: int, following: int | None) -> Any:
        """Tear down what the next test does not need; return a report if there is anything to say."""
        item = self._session.items[position]
        nextitem = None if following is None else self._session.items[following]
        before = len(item._report_sections)
        item.stash[caplog_records_key] = {}  # as after a set-up; this test had its own in another machine
        call = CallInfo.from_call(
            partial(self._hook("pytest_runtest_teardown"), item=item, nextitem=nextitem),
            when="teardown",
            reraise=(pytest.exit.Exception, KeyboardInterrupt),
        )
        own = item._report_sections[before:]
        report = pytest.TestReport.from_item_and_call(item, call)
        report.sections = [(f"Captured {key} {when}", content) for when, key, content in own]
        del item._report_sections[before:]
        return report if call.excinfo is not None or own else None

    @property
    def standing(self) -> list[int]:
        """The numbers of the fixtures that stand, also those whose set-up failed."""
        return list(self._standing)

    # Hooks

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> None:
        """Begin to measure a wide fixture's set-up, or tell the host before it begins.

        This is no wrapper, which would appear in the tracebacks of ``--tb=native``: the next set-up, or the
        report, ends the measurement.
        """
        self._stop_clock()
        if fixturedef.scope == "function":
            return
        number = self._numbers.get(_key(request._pyfuncitem, fixturedef, _index(request)))
        if self._way == TELL and number in self._needs and self._tell is not None:
            self._tell()
        if self._way == STANDING:
            self._own.append((fixturedef, request))
        if number is not None:
            self._standing[number] = None
            self._begun = number, perf_counter()

    def pytest_fixture_post_finalizer(self, fixturedef: Any, request: Any) -> None:
        """Notice that a fixture does not stand any more."""
        number = self._numbers.get(_key(request._pyfuncitem, fixturedef, _index(request)))
        if number is not None:
            self._standing.pop(number, None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        """Show the output of wide set-ups as natively: with the test that they were made for."""
        self._stop_clock()
        if self._shown and call.when == "setup":
            sections = [section for printed in self._printed[-self._shown :] for section in printed]
            self._shown = 0
            item._report_sections[:] = _joined([*sections, *item._report_sections])

    # Parts

    def _stop_clock(self) -> None:
        number, since = self._begun
        if number is not None:
            self._seconds[number] = self._seconds.get(number, 0.0) + perf_counter() - since
            self._begun = None, 0.0

    def _needed(self, item: Any) -> Iterator[int]:
        for name in _wide_names(item):
            definition = item._fixtureinfo.name2fixturedefs[name][-1]
            if _is_users(definition):
                callspec = getattr(item, "callspec", None)
                index = None if callspec is None else callspec.indices.get(name)
                key = _key(item, definition, index)
                if key not in self._numbers:
                    self._numbers[key] = len(self._numbers)
                    own = key, definition.scope, definition.argname, _base(definition)
                    self.fixtures.append((*own, list(definition.argnames)))
                yield self._numbers[key]

    def _set_up(self, item: Any) -> None:
        state: Any = self._session._setupstate

        def set_up() -> None:
            state.teardown_exact(item)  # nodes of another test in which nothing stands
            self._hook("pytest_runtest_setup")(item=item)

        call = CallInfo.from_call(
            set_up, when="setup", reraise=(pytest.exit.Exception, KeyboardInterrupt)
        )  # a fixture keeps its exception, which the test's copy reports
        self._complete = call.excinfo is None
        self._stop_clock()
        if item in state.stack:
            state.teardown_exact(item.parent)

    def _fill(self, item: Any, count: int) -> None:
        for name in _wide_names(item):
            definition = item._fixtureinfo.name2fixturedefs[name][-1]
            if _is_users(definition) and not count:
                return
            count -= _is_users(definition)
            item._request.getfixturevalue(name)

    def _tear_down_own(self, _nextitem: Any) -> None:
        """Tear down the test and what was set up in this copy; what stands is the keeper's."""
        state: Any = self._session._setupstate
        steps: list[Callable[[], object]] = [lambda: type(state).teardown_exact(state, self._item.parent)]
        steps += [_finisher(definition, request) for definition, request in reversed(self._own)]
        self._own.clear()
        failure: BaseException | None = None
        for step in steps:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - the first is reported, as by pytest itself
                failure = failure or error
        if failure is not None:
            raise failure

    def _hook(self, name: str) -> Any:
        """Return a hook that only pytest's own plug-ins get: a project's hooks run in the test's machine."""
        return self._session.config.pluginmanager.subset_hook_caller(name, self._others)

    def _within_protocol(self, item: Any, body: Callable[[], None]) -> None:
        """Run ``body`` in the place of a test: pytest's own plug-ins catch warnings around it."""
        manager = self._session.config.pluginmanager
        own = _Body(body)
        manager.register(own, "microvm_body")
        try:
            others = [*self._others, manager.get_plugin("runner")]
            hook = manager.subset_hook_caller("pytest_runtest_protocol", others)
            hook(item=item, nextitem=None)
        finally:
            manager.unregister(own)


class _Body:
    """A plug-in that runs a function instead of a test."""

    def __init__(self, body: Callable[[], None]) -> None:
        self._body = body

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> bool:
        self._body()
        return True


class _narrowed:  # noqa: N801 - reads as the statement it is
    """Replace a test's set-up by another one, and its tear-down by none."""

    def __init__(self, item: Any, set_up: Callable[[], None]) -> None:
        self._item = item
        self._set_up = set_up

    def __enter__(self) -> None:
        self._item.setup, self._item.teardown = self._set_up, lambda: None

    def __exit__(self, *_exc: object) -> None:
        del self._item.setup, self._item.teardown


def _finisher(definition: Any, request: Any) -> Callable[[], object]:
    return lambda: definition.finish(request)


def _not_pytests(config: Any) -> list[Any]:
    """Return the plug-ins that are not pytest's own, and the one that skips tests."""
    manager = config.pluginmanager
    return [plugin for plugin in manager.get_plugins() if not _is_pytests(plugin, manager)]


def _is_pytests(plugin: Any, manager: Any) -> bool:
    module = getattr(plugin, "__name__", None) or type(plugin).__module__
    return module.startswith("_pytest.") and plugin is not manager.get_plugin("skipping")


def _wide_names(item: Any) -> Iterator[str]:
    """Yield the names of the wide fixtures that a test needs from its begin, in the order of their set-up.

    What a fixture requests is set up before it.
    """
    info = getattr(item, "_fixtureinfo", None)
    seen: set[str] = set()

    def visit(name: str) -> Iterator[str]:
        definitions = None if info is None else info.name2fixturedefs.get(name)
        if definitions and definitions[-1].scope != "function" and name not in seen:
            seen.add(name)
            for requested in definitions[-1].argnames:
                yield from visit(requested)
            yield name

    for name in getattr(item, "fixturenames", ()):
        yield from visit(name)


def _is_users(definition: Any) -> bool:
    """Return True for a fixture of the user or a plug-in, not of pytest itself."""
    function = definition.func
    module = getattr(function, "__module__", None) or ""
    if getattr(function, "__name__", "") == "get_direct_param_fixture_func":
        return False
    return not module.startswith("_pytest.") or module in _OWN


def _index(request: Any) -> int | None:
    """Return the position of a fixture's parameter; ``None`` if it has none."""
    return request.param_index if hasattr(request, "param") else None


def _key(item: Any, definition: Any, index: int | None) -> str:
    kinds = {"class": pytest.Class, "module": pytest.Module, "package": pytest.Package}
    kind = kinds.get(definition.scope)
    node = None if kind is None else item.getparent(kind)
    if node is None and definition.scope == "class":
        node = item.getparent(pytest.Module)
    place = "" if node is None else node.nodeid
    return f"{definition.scope} {place} {definition.argname}" + ("" if index is None else f"[{index}]")


def _base(definition: Any) -> str:
    return str(getattr(definition, "baseid", ""))  # deprecated: pytest 10 may lack it


def _joined(sections: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Return sections with the texts of those joined that have the same title."""
    texts: dict[tuple[str, str], str] = {}
    for when, key, text in sections:
        texts[when, key] = texts.get((when, key), "") + text
    return [(when, key, text) for (when, key), text in texts.items()]
