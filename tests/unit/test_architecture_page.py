"""docs/explanation/architecture.md: its table lists the subpackages, and its steps name existing code."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "pytest_microvm"
PAGE = (REPOSITORY / "docs" / "explanation" / "architecture.md").read_text()
WAYS = PAGE.split("\n## Four ways through the code\n", 1)[1].split("\n## ", 1)[0]
STEPS = re.findall(r"^\d+\. `([\w/]+\.py)`: (.*(?:\n   .*)*)", WAYS, re.MULTILINE)


def names(path):
    """Return what a module defines: functions, classes, and methods as `Class.method`."""
    tree = ast.parse((PACKAGE / path).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = {node.name: node for node in tree.body if isinstance(node, kinds)}
    methods = {
        f"{name}.{inner.name}"
        for name, node in found.items()
        if isinstance(node, ast.ClassDef)
        for inner in node.body
        if isinstance(inner, kinds)
    }
    return {*found, *methods}


def test_four_ways():
    assert len(re.findall(r"^\*\*", WAYS, re.MULTILINE)) == 4
    assert len(STEPS) == len(re.findall(r"^\d+\. ", WAYS, re.MULTILINE)) > 20


@pytest.mark.parametrize(("path", "text"), STEPS, ids=[path for path, _ in STEPS])
def test_every_step_is_there(path, text):
    """The first code word of a step is a name of its file."""
    assert re.match(r"`([\w.]+)`", text), text
    assert re.match(r"`([\w.]+)`", text)[1] in names(path)


def test_every_package():
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert listed == packages
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "errors.py", "events.py"}
