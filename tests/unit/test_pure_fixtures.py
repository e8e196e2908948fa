"""Which fixtures are pure, what is told about those that are not kept, and what identifies their link."""

import pytest

from pytest_microvm.errors import ProtocolViolation, UsageError
from pytest_microvm.settings.configuration import Settings, merged
from pytest_microvm.suite.backend import PureSetUp, TestLimits
from pytest_microvm.suite.collected import Collected, WideFixture
from pytest_microvm.suite.missing import lines_about_pure_fixtures
from pytest_microvm.suite.template_chain import fixtures_step
from support.collected import GOOD, lines

LIMITS = TestLimits(timeout=60, output=1000)


def fixture(name, *requests, scope="session", base="", key=None):
    return WideFixture(key or f"{scope}  {name}", scope, name, base, requests)


def collected(*fixtures, needed=()):
    return Collected(wide=fixtures, needed=needed)


def test_requests_of_a_pure_fixture_are_pure():
    found = collected(
        fixture("settings"), fixture("database", "settings", "request"), fixture("app", "database")
    )
    assert found.pure(["database"]) == {0, 1}
    assert found.pure(["app"]) == {0, 1, 2}
    assert found.pure([]) == found.pure(["unknown"]) == set()


def test_requests_in_a_circle_end():
    """As of a fixture that overrides another one of its name."""
    assert collected(fixture("a", "b"), fixture("b", "a", "b")).pure(["a"]) == {0, 1}


def test_only_session_fixtures_are_pure():
    assert collected(fixture("rows", scope="module"), fixture("database")).pure(["rows", "database"]) == {1}


def test_each_parameter_is_a_fixture():
    found = collected(
        fixture("server", key="session  server[0]"), fixture("server", key="session  server[1]")
    )
    assert found.pure(["server"]) == {0, 1}


BEHIND = collected(
    fixture("other"),
    fixture("database"),
    fixture("app", "database"),
    fixture("rows", scope="module"),
    needed=((0, 1, 2), (1, 3), ()),
)


@pytest.mark.parametrize(
    ("pure", "told"),
    [
        (["database"], []),
        (["app"], ["app is not kept: other is set up before it, and is not among them"]),
        (["app", "other"], []),
        (["rows"], ["rows is not kept: its scope is not session"]),
        (["databse"], ["no test needs a session fixture databse"]),
    ],
)
def test_reason_for_not_keeping_is_reported(pure, told):
    assert lines_about_pure_fixtures(BEHIND, pure) == [f"microvm: pure_fixtures: {line}" for line in told]


def test_guest_names_are_made_safe():
    found = collected(fixture("\x1b[2J"), fixture("database"), needed=((0, 1),))
    (line,) = lines_about_pure_fixtures(found, ["database"])
    assert "\x1b" not in line


def test_link_is_identified_by_each_part_of_its_fixtures():
    others = [
        fixture("database"),
        fixture("other"),
        fixture("database", base="sub"),
        fixture("database", key="session  database[1]"),
        fixture("database", scope="module"),
    ]
    steps = [fixtures_step(PureSetUp(0, (each,)), LIMITS) for each in others]
    steps.append(fixtures_step(PureSetUp(0, (others[0], others[1])), LIMITS))
    steps.append(fixtures_step(PureSetUp(0, (others[1], others[0])), LIMITS))
    assert len({step.inputs for step in steps}) == len(steps)


def test_limits_do_not_identify_a_link():
    """One that is not exceeded has no effect."""
    one = PureSetUp(0, (fixture("database"),))
    assert fixtures_step(one, LIMITS) == fixtures_step(one, TestLimits(timeout=1, output=1))


@pytest.mark.parametrize(
    "told",
    [
        "database",
        ["key", "session", "database", ""],
        ["key", "session", "database", "", "database"],
        ["key", "session", "database", 0, []],
        ["key", "session", "database", "", [0]],
        ["key", "session", "database", "", [], ""],
    ],
)
def test_malformed_fixture_is_refused(told):
    record = {"k": "wide", "fixtures": [told], "needed": [[0]]}
    with pytest.raises(ProtocolViolation):
        Collected.parse(lines(*GOOD[:-1], record, GOOD[-1]))


def test_fixture_is_read():
    told = ["session  database", "session", "database", "sub", ["settings"]]
    record = {"k": "wide", "fixtures": [told], "needed": [[0]]}
    found = Collected.parse(lines(*GOOD[:-1], record, GOOD[-1]))
    assert found.wide == (fixture("database", "settings", base="sub"),)


@pytest.mark.parametrize("value", ["database", [""], ["data base"], ["a\n"], ["\x1b[2J"], [1]])
def test_invalid_names_are_refused(value):
    with pytest.raises(UsageError, match="pure_fixtures: invalid"):
        merged(Settings(), {"pure_fixtures": value}, "pyproject.toml")
