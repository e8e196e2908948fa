"""Log messages from machines: shown by pytest's own handlers, made safe, and checked."""

import logging
import types

import pytest

from pytest_microvm.errors import ProtocolViolation
from pytest_microvm.suite.live_logs import LiveLogs, LogMessage


class Handler(logging.Handler):
    """A handler of pytest that keeps what it shows."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def set_when(self, when):
        self.shown.append(when)

    def emit(self, record):
        self.shown.append(self.format(record))


@pytest.fixture
def handlers():
    return types.SimpleNamespace(log_cli_handler=Handler(), log_file_handler=Handler())


@pytest.fixture
def logs(handlers):
    manager = types.SimpleNamespace(get_plugin=lambda _name: handlers)
    return LiveLogs(types.SimpleNamespace(pluginmanager=manager))


def record(text, when="call", where="shown"):
    return {"k": "log", "where": where, "when": when, "text": text}


def test_a_section_begins_with_each_phase_and_after_what_pytest_shows(logs, handlers):
    for text, when in [("a", "setup"), ("b", "call"), ("c", "call")]:
        logs.show(LogMessage.parse(record(text, when)))
    logs.interrupted()
    logs.show(LogMessage.parse(record("d", "call")))
    assert handlers.log_cli_handler.shown == ["setup", "a", "call", "b", "c", "call", "d"]


def test_messages_are_made_safe(logs, handlers):
    logs.show(LogMessage.parse(record("%s {} \x1b]0;x\x07\n::error::x", where="file", when=None)))
    (text,) = handlers.log_file_handler.shown
    assert text.startswith("%s {} ")
    assert "\x1b" not in text
    assert "\n::error" not in text
    assert handlers.log_cli_handler.shown == []


def test_messages_of_this_computer_are_not_shown(logs, handlers):
    handlers.log_cli_handler.handle(logging.makeLogRecord({"msg": "ours"}))
    assert handlers.log_cli_handler.shown == []


@pytest.mark.parametrize(
    "change", [{"where": "/etc/passwd"}, {"when": "x"}, {"when": 1}, {"text": 1}, {"text": None}]
)
def test_malformed_messages(change):
    with pytest.raises(ProtocolViolation):
        LogMessage.parse({**record("x"), **change})


def test_without_the_plugin_nothing_is_shown():
    manager = types.SimpleNamespace(get_plugin=lambda _name: None)
    LiveLogs(types.SimpleNamespace(pluginmanager=manager)).show(LogMessage.parse(record("x")))
