"""Reports and collections with anything anywhere: refused, or shown by a real pytest run without harm."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_microvm.errors import ProtocolViolation
from pytest_microvm.suite import collection, running
from support.collected import GOOD, lines
from support.replayed_reports import (
    HOSTILE_TEXT,
    assert_harmless,
    changed,
    item,
    mutated,
    places,
    real_reports,
    show_collection,
)
from support.replayed_reports import show_reports as show
from support.tiers import thorough_but

FEW = settings(
    max_examples=settings.default.max_examples // 4,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_real_reports_are_shown():
    shown = show(real_reports())
    assert_harmless(shown)
    assert not shown.refused
    assert [case.get("name") for case in shown.xml.iter("testcase")] == [
        f"test_{number}" for number in range(len(real_reports()))
    ]
    assert "boom 1 two" in shown.text


CHOSEN_TEXT = ["\x1b[2J", "\x1b]0;title\x07", "\u2028::error::x", "\ud800", "##vso[task]", "\n", "]]>"]


@pytest.mark.parametrize("text", thorough_but(HOSTILE_TEXT, *CHOSEN_TEXT))
def test_hostile_text_in_every_place_of_a_failure(text):
    """Each text of a failure with a chain, and of one without a traceback, replaced in turn."""
    richest = max(real_reports(), key=lambda report: len(list(places(report))))
    native = next(report for report in real_reports() if isinstance(report["longrepr"], str))
    rich = next(
        report for report in real_reports() if report["user_properties"] and len(report["sections"]) > 1
    )
    records = []
    for report in (richest, native, rich):
        texts = [path for path in places(report) if isinstance(at(report, path), str)]
        records += [changed(report, path, text) for path in texts]
    shown = show(records)
    assert_harmless(shown)
    assert shown.shown


def at(value, path):
    for key in path:
        value = value[key]
    return value


@FEW
@given(
    records=st.lists(st.deferred(lambda: mutated(real_reports())), min_size=8, max_size=8),
    colour=st.sampled_from(["yes", "no"]),
)
def test_mutated_reports(records, colour):
    shown = show(records, f"--color={colour}")
    assert_harmless(shown)
    assert len(shown.shown) + len(shown.refused) == len(records)


@pytest.mark.parametrize(
    "told",
    [[], [("setup", "passed")], [("setup", "passed"), ("call", "rerun"), ("teardown", "passed")]],
    ids=str,
)
def test_a_test_cannot_vanish_from_the_results(request, told):
    test = item(0)
    test.config = request.config
    passed = next(report for report in real_reports() if report["outcome"] == "passed")
    reports = [
        {"k": "report", "data": {**passed, "nodeid": test.nodeid, "when": when, "outcome": outcome}}
        for when, outcome in told
    ]
    with pytest.raises(ProtocolViolation, match="nothing about the test"):
        running._read(test, [*reports, {"k": "end"}], None, None, retries=0, asked=[])


@FEW
@given(records=mutated([GOOD]))
def test_mutated_collections(records):
    data = (
        b"".join(json.dumps(record).encode() + b"\n" for record in records)
        if isinstance(records, list)
        else b"x"
    )
    assert_harmless(show_collection(data))


def test_a_collection_is_replayed():
    shown = show_collection(lines(*GOOD))
    assert_harmless(shown)
    assert shown.shown == ["test_a.py::test_a"]


def test_a_tree_too_deep_to_walk():
    nodes = [
        {**GOOD[1], "parent": number, "kind": "collector", "nodeid": f"n{number}"} for number in range(3000)
    ]
    reports = [{"k": "collected", "node": n, "outcome": "passed", "result": [n + 1]} for n in range(3000)]
    shown = show_collection(
        lines(GOOD[0], *nodes, *reports, {"k": "items", "order": [], "markers": []}, {"k": "end"})
    )
    assert "a collection tree with a loop" in shown.refused[0]


def test_a_tree_that_names_one_file_forever(monkeypatch):
    monkeypatch.setattr(collection, "_SPARE_VISITS", 5000)
    reports = [
        {"k": "collected", "node": 0, "outcome": "passed", "result": [1] * 15_000},
        {"k": "collected", "node": 1, "outcome": "passed", "result": []},
    ]
    end = [{"k": "items", "order": [], "markers": []}, {"k": "end"}]
    shown = show_collection(lines(*GOOD[:2], *reports, *end))
    assert "a collection tree that never ends" in shown.refused[0]


def test_many_deselected_tests_take_no_longer_than_their_number():
    """Quadratic work would need hours for these."""
    nodes = [{**GOOD[2], "parent": 0, "nodeid": f"a.py::t{n}", "marks": [], "extra": []} for n in range(5000)]
    numbers = list(range(1, 5001))
    shown = show_collection(
        lines(
            GOOD[0],
            *nodes,
            {"k": "collected", "node": 0, "outcome": "passed", "result": numbers},
            {"k": "deselected", "items": numbers * 40},
            {"k": "items", "order": [], "markers": []},
            {"k": "end"},
        )
    )
    assert not shown.refused
