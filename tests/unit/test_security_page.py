"""What SECURITY.md and the page on trust boundaries name as shown by a test is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "SECURITY.md").read_text()
BOUNDARIES = (REPOSITORY / "docs" / "explanation" / "trust-boundaries.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:tests|examples|benchmarks)/[^`]+)`", PAGE + BOUNDARIES)))


@cache
def functions(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("named", NAMED)
def test_what_is_named_is_there(named):
    path, _colons, test = named.partition("::")
    assert (REPOSITORY / path).is_file()
    assert not test or test in functions(REPOSITORY / path)


def test_every_promise_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    tables = [row for row in rows if "measured" not in row and "MiB" not in row and "---" not in row]
    without = [row for row in tables if "shown by" not in row and not re.search(r"`(tests|examples)/", row)]
    assert without == []
    assert len(NAMED) > 20


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", PAGE)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []
