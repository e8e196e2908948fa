"""The display of a running test: what is shown at once, what waits for an outcome, and what is cut."""

import io
import types

import pytest

from pytest_microvm.suite.live_display import LiveDisplay
from pytest_microvm.suite.replay import error_report, passed_report
from pytest_microvm.untrusted.redaction import Redactor
from pytest_microvm.untrusted.text import MAX_TEXT

ITEM = types.SimpleNamespace(nodeid="a.py::test_a", location=("a.py", 1, "test_a"), keywords={})
SETUP, CALL, TEARDOWN = (passed_report(ITEM, when, []) for when in ("setup", "call", "teardown"))
FAILED = error_report(ITEM, "teardown", "why", [])


def display(**attributes):
    """Return a display of a pytest without log handlers."""
    manager = types.SimpleNamespace(get_plugin=lambda _name: None)
    option = types.SimpleNamespace(capture=attributes.pop("capture", "no"))
    return LiveDisplay(types.SimpleNamespace(pluginmanager=manager, option=option, **attributes))


def out(data):
    return {"k": "out", "data": data}


MADE = {"k": "reported"}


@pytest.fixture
def shown(capsys):
    return lambda: capsys.readouterr().out


def take(shows, *records, secrets=()):
    return list(shows.of(Redactor(secrets)).others(records))


@pytest.mark.parametrize(
    ("attributes", "capture"),
    [
        ({}, "no"),
        ({"capture": "tee-sys"}, "tee-sys"),
        ({"capture": "fd"}, None),
        ({"capture": "sys"}, None),
        ({"workerinput": {}}, None),
    ],
)
def test_what_lets_output_be_seen_at_once(attributes, capture):
    assert display(**attributes).capture == capture


def test_what_follows_a_report_waits_for_it(shown):
    shows = display()
    shows.begin()
    others = take(shows, out(b"up "), out(b"call "), MADE, out(b"down "), MADE, out(b"end "), {"k": "end"})
    assert others == [{"k": "end"}]
    assert shown() == "up call "
    shows.reported()
    shows.reported(SETUP)
    assert shown() == ""
    shows.reported(CALL)
    assert shown() == "down "
    shows.reported(FAILED)
    assert shown() == "end "
    shows.end()
    assert shown() == ""


def test_what_waits_for_a_report_that_never_came_is_shown_at_the_end(shown):
    shows = display()
    shows.begin()
    take(shows, MADE, MADE, MADE, out(b"late"))
    for report in (SETUP, CALL, TEARDOWN):
        shows.reported(report)
    assert shown() == ""
    shows.end()
    assert shown() == "late"


def test_tear_down_of_wider_fixtures_waits_for_the_outcome_of_a_crash(shown):
    shows = display()
    shows.begin()
    take(shows, out(b"last words "))
    shows.ran()
    take(shows, out(b"down"))
    shows.reported()
    shows.reported(SETUP)
    assert shown() == "last words "
    shows.reported(error_report(ITEM, "call", "crashed", []))
    assert shown() == "down"


def test_a_test_that_begins_again_shows_nothing_twice(shown):
    shows = display()
    shows.begin()
    shows.wait()
    take(shows, out(b"once "))
    assert shown() == ""
    shows.forget()
    take(shows, out(b"once "))
    assert shown() == "once "


def test_what_waits_is_limited(shown):
    shows = display()
    shows.begin()
    take(shows, MADE, *(out(b"x" * 65535 + b"\n") for _ in range(100)))
    for report in (SETUP, CALL):
        shows.reported(report)
    assert len(shown()) == MAX_TEXT
    shows.end()
    assert shown() == f"\n[{100 * 65536 - MAX_TEXT} more characters were cut]\n"


def test_secrets_in_parts_are_masked(shown):
    shows = display()
    shows.begin()
    take(shows, out(b"is it hunt"), out(b"er22? or hunt"), MADE, secrets=["hunter22"])
    assert shown() == "is it ***? or hunt"


def test_what_this_terminal_cannot_show_is_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    take(display(), out("\N{EURO SIGN}\n".encode()))
    assert terminal.buffer.getvalue() == b"\\u20ac\n"
