"""A pytest session's contents as plain JSON records: nodes, markers, reports, warnings."""

from __future__ import annotations

import inspect
import linecache
import os
from typing import Any

import pytest
from _pytest._io.saferepr import saferepr

_MAX_ITEMS = 50
_MAX_DEPTH = 4
_MAX_OUTPUT = 4_000_000
_DIRECTORY = getattr(pytest, "Directory", ())  # pytest 8.0


class NodeTable:
    """A table that numbers nodes, parents first, and holds one record for each.

    Args:
        session: The pytest session; it gets number 0 and no record.
    """

    def __init__(self, session: pytest.Session) -> None:
        self._numbers: dict[int, int] = {id(session): 0}
        self._nodes: list[Any] = [session]  # keeps nodes alive, so that their ids stay unique
        self.records: list[dict[str, Any]] = []

    def number(self, node: Any) -> int:
        """Return the node's number, adding records for the node and its parents if they are new."""
        known = self._numbers.get(id(node))
        if known is not None:
            return known
        parent = self.number(node.parent) if node.parent is not None else 0
        number = len(self._nodes)
        self._numbers[id(node)] = number
        self._nodes.append(node)
        self.records.append(_describe(node, parent))
        return number


def _describe(node: Any, parent: int) -> dict[str, Any]:
    record = {
        "k": "node",
        "parent": parent,
        "kind": _kind(node),
        "class": type(node).__name__,
        "name": node.name,
        "nodeid": node.nodeid,
        "path": os.fspath(node.path),
        "marks": [[mark.name, *_mark_arguments(mark)] for mark in node.own_markers],
        "extra": [word for word in node.extra_keyword_matches if isinstance(word, str)],
    }
    text = repr(node)
    if text != f"<{type(node).__name__} {node.name}>":
        record["repr"] = text
    doc = inspect.getdoc(_loaded_object(node))
    if doc:
        record["doc"] = doc
    if isinstance(node, pytest.Item):
        path, line, domain = node.location
        record["location"] = [path, line, domain]
        function = getattr(node, "function", None)
        record["attributes"] = [name for name in getattr(function, "__dict__", {}) if isinstance(name, str)]
    return record


def _loaded_object(node: Any) -> Any:
    """Return the node's Python object if it is loaded; accessing ``node.obj`` would import it again."""
    return getattr(node, "_obj", None) or vars(node).get("obj")


def _kind(node: Any) -> str:
    if isinstance(node, pytest.Item):
        return "item"
    if isinstance(node, _DIRECTORY):
        return "directory"
    return "file" if isinstance(node, pytest.File) else "collector"


def _mark_arguments(mark: Any) -> tuple[list[Any], dict[str, Any]]:
    if mark.name == "parametrize":  # every item's marker has the values of all its siblings
        return [], {}
    return (
        [_value(arg) for arg in mark.args],
        {str(key): _value(arg) for key, arg in mark.kwargs.items()},
    )


def _value(value: Any, depth: int = 0) -> Any:
    """Return a marker's argument as a JSON value, or its repr if it is no JSON value, or too deep or long."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth < _MAX_DEPTH and type(value) in (list, tuple) and len(value) <= _MAX_ITEMS:
        return [_value(item, depth + 1) for item in value]
    if depth < _MAX_DEPTH and type(value) is dict and len(value) <= _MAX_ITEMS:
        return {str(key): _value(item, depth + 1) for key, item in value.items()}
    return saferepr(value)


def report_record(config: Any, report: Any) -> dict[str, Any]:
    """Return a test report as pytest's own hooks serialize it."""
    data = config.hook.pytest_report_to_serializable(config=config, report=report)
    if isinstance(data, dict) and report.sections:
        data["sections"] = [(title, cut(content)) for title, content in report.sections]
    text = isinstance(data, dict) and isinstance(data.get("longrepr"), str)
    shown = text and hasattr(report.longrepr, "toterminal")
    return {"k": "report", "data": data, "shown": shown}


def cut(text: str) -> str:
    """Truncate a test's output to the length that the host shows."""
    if len(text) <= _MAX_OUTPUT:
        return text
    return f"{text[:_MAX_OUTPUT]}\n[{len(text) - _MAX_OUTPUT} more characters were cut]"


def warning_record(warning_message: Any, when: str, nodeid: str) -> dict[str, Any]:
    """Return a recorded warning: its text, its place, and the names of its category's classes."""
    category = warning_message.category
    return {
        "k": "warning",
        "when": when,
        "nodeid": nodeid,
        "message": str(warning_message.message),
        "category": [_class_name(kind) for kind in category.__mro__ if issubclass(kind, Warning)],
        "filename": str(warning_message.filename),
        "lineno": warning_message.lineno,
        "line": _source_line(warning_message),
    }


def _source_line(warning_message: Any) -> str:
    """Return the warning's source line; the guest reads it because the host must not open paths it names."""
    if isinstance(warning_message.line, str):
        return warning_message.line
    return linecache.getline(str(warning_message.filename), warning_message.lineno).strip()


def _class_name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
