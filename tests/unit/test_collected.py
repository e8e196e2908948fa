"""What a guest says it collected: good values are read, anything else is a violation."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.errors import ProtocolViolation
from pytest_microvm.suite import collected as collected_module
from pytest_microvm.suite.checks import Records
from pytest_microvm.suite.collected import Collected, Mark
from support.collected import END, FILE, GOOD, GUEST, ITEM, JSON, ORDER, SESSION, lines


def test_a_collection_is_read():
    collected = Collected.parse(lines(*GOOD))
    file, item = collected.nodes
    assert (file.kind, file.class_name, file.parent) == ("file", "Module", 0)
    assert (item.raw_nodeid, item.location) == ("test_a.py::test_a", ("test_a.py", 3, "test_a"))
    assert item.marks == (Mark("slow", (1,), {"level": 2}),)
    assert collected.order == (2,)
    assert [report.result for report in collected.reports] == [(1,), (2,)]
    assert (collected.python, collected.pytest, collected.header) == ("3.11", "7.2", ("a line",))


def test_text_is_made_safe():
    item = {**ITEM, "name": "test_a[\x1b[2J]", "nodeid": "a.py::test_a[\x1b[2J\n]", "class": "no name"}
    node = Collected.parse(lines(GUEST, FILE, item, END)).nodes[1]
    assert (node.name, node.class_name) == (r"test_a[\x1b[2J]", "Node")
    assert (node.nodeid, node.raw_nodeid) == (r"a.py::test_a[\x1b[2J\n]", "a.py::test_a[\x1b[2J\n]")


def test_an_exit_ends_a_collection():
    collected = Collected.parse(lines({"k": "exit", "code": 4, "reason": "usage", "text": "ERROR: no"}))
    assert (collected.exit.code, collected.exit.reason, collected.exit.text) == (4, "usage", "ERROR: no")


BAD = {
    "not JSON": b"{\n",
    "not an object": b"[1]\n",
    "an unknown record": lines({"k": "pickle"}),
    "no end": lines(GUEST, FILE),
    "a parent that comes later": lines({**FILE, "parent": 5}, END),
    "a child of an item": lines(FILE, ITEM, {**ITEM, "parent": 2}, END),
    "an unknown kind": lines({**FILE, "kind": "tree"}, END),
    "a node id pytest never makes": lines({**FILE, "nodeid": "a.py::()"}, END),
    "an order of collectors": lines(FILE, {**ORDER, "order": [1]}, END),
    "an order of nobody": lines(FILE, ITEM, {**ORDER, "order": [7]}, END),
    "a result of nobody": lines(FILE, {**SESSION, "result": [9]}, END),
    "a negative number": lines(FILE, {**SESSION, "result": [-1]}, END),
    "true for a number": lines(FILE, {**SESSION, "node": True}, END),
    "an unknown outcome": lines(FILE, {**SESSION, "outcome": "maybe"}, END),
    "deep nesting": b"[" * 100_000 + b"\n",
    "a location of two": lines(FILE, {**ITEM, "location": ["a", 1]}, END),
    "a location without": lines(FILE, {key: value for key, value in ITEM.items() if key != "location"}, END),
    "a marker of one": lines({**FILE, "marks": [["slow"]]}, END),
    "an exit code of text": lines({"k": "exit", "code": "4", "reason": "usage", "text": ""}),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_a_violation_is_one(data):
    with pytest.raises(ProtocolViolation, match=r"the guest's pytest sent"):
        Collected.parse(data)


@given(st.integers(0, len(GOOD) - 1), st.data())
def test_any_value_anywhere_is_read_or_refused(index, data):
    records = [dict(record) for record in GOOD]
    records[index][data.draw(st.sampled_from(sorted(records[index])))] = data.draw(JSON)
    with contextlib.suppress(ProtocolViolation):
        Collected.parse(lines(*records))


def test_values_are_counted_before_they_are_made():
    assert Records(5).read(b'{"k":[1,2]}')
    assert Records(3).read(b'{"k":",,,,[[[[{{{{\\",,,,"}') == {"k": ',,,,[[[[{{{{",,,,'}
    with pytest.raises(ProtocolViolation, match="too many values"):
        Records(5).read(b'{"k":[[],[],[]]}')
    records = Records(10)
    for _ in range(2):
        records.read(b'{"k":[1,2,3]}')
    with pytest.raises(ProtocolViolation, match="too many values"):
        records.read(b'{"k":[1,2,3]}')


@pytest.mark.parametrize(
    "line",
    [
        b'{"k":' + b"[" * 200_000,
        b'{"k":' + b'{"a":' * 200_000,
        b'{"k":' + b"9" * 5_000_000 + b"}",
        b'{"k":"' + b'\\"' * 2_000_000,
        b'"' * 2_000_001,
        b"\\" * 2_000_000,
        b'{"k":"\xff"}',
        b'{"k":"\x00"}',
        b"[]",
        b"",
    ],
    ids=[
        "lists",
        "objects",
        "digits",
        "open text",
        "quotes",
        "backslashes",
        "no utf-8",
        "nul",
        "list",
        "none",
    ],
)
def test_what_is_no_record_is_refused_soon(line):
    """Quadratic work would need hours for these."""
    with pytest.raises(ProtocolViolation):
        Records(10_000_000).read(line)


@pytest.mark.parametrize("kind", [["node"], {"node": 1}, None, 1, "toString"])
def test_a_kind_that_is_none(kind):
    with pytest.raises(ProtocolViolation, match="unknown kind"):
        Collected.parse(lines({"k": kind}, END))


def test_classes_are_made_for_a_bounded_number_of_names():
    many = [{**ITEM, "parent": 0, "class": f"Class{number}"} for number in range(3000)]
    collected = Collected.parse(lines(GUEST, *many, END))
    assert len({node.class_name for node in collected.nodes}) == 1001


def test_the_number_of_nodes_is_bounded(monkeypatch):
    monkeypatch.setattr(collected_module, "MAX_NODES", 3)
    with pytest.raises(ProtocolViolation, match="more than 3 collectors and tests"):
        Collected.parse(lines(GUEST, *[{**ITEM, "parent": 0}] * 4, END))


@pytest.mark.parametrize("domain", [".error..x", " .error..x", "::error::x"])
def test_name_with_dots_does_not_become_a_ci_command(domain):
    """With the node id ``.error..x`` pytest would begin the test's line with ``::error::``."""
    item = {**ITEM, "parent": 0, "nodeid": domain, "location": ["x", 1, domain]}
    (node,) = Collected.parse(lines(GUEST, item, END)).nodes
    assert node.location[2].startswith("\\")
