"""Reports from a guest: rebuilt by pytest's own hook, or refused; never with anything unexpected in them."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_microvm.errors import ProtocolViolation
from pytest_microvm.suite.replay import error_report, rebuild_test_report
from support.collected import JSON

ITEM = SimpleNamespace(
    nodeid="a.py::test_a",
    location=("a.py", 1, "test_a"),
    keywords={"test_a": 1},
    guest=SimpleNamespace(raw_nodeid="a.py::test_a"),
)
CRASH = {"path": "a.py", "lineno": 3, "message": "boom"}
ENTRY = {
    "type": "ReprEntry",
    "data": {
        "lines": ["> assert 0"],
        "reprfuncargs": {"args": [["x", "1"]]},
        "style": "long",
        "reprlocals": {"lines": ["x = 1"]},
        "reprfileloc": CRASH,
    },
}
TRACEBACK = {"reprentries": [ENTRY], "extraline": None, "style": "long"}
FAILURE = {
    "reprcrash": CRASH,
    "reprtraceback": TRACEBACK,
    "sections": [["name", "content", "-"]],
    "chain": [[TRACEBACK, CRASH, None]],
}
DATA = {
    "nodeid": "a.py::test_a",
    "location": ["b.py", 9, "other"],
    "keywords": {"slow": 1},
    "outcome": "failed",
    "when": "call",
    "longrepr": FAILURE,
    "sections": [["Captured stdout call", "hello\x07"]],
    "user_properties": [["own", 1], ["microvm.id", "forged"]],
    "duration": 0.5,
    "start": 1.0,
    "stop": 1.5,
    "$report_type": "TestReport",
    "toterminal": "x",
    "extra": "y",
}


def native(*lines):
    entry = {"type": "ReprEntryNative", "data": {"lines": list(lines)}}
    return {**FAILURE, "reprtraceback": {**TRACEBACK, "reprentries": [entry]}, "chain": None}


@pytest.fixture(scope="module")
def config(request):
    return request.config


def rebuild(config, **changes):
    line = {"k": "report", "data": {**DATA, **changes}}
    return rebuild_test_report(config, line, ITEM, [("microvm.outcome", "failed")])


def test_a_failure_is_rebuilt(config):
    report = rebuild(config)
    assert (report.nodeid, report.when, report.outcome) == ("a.py::test_a", "call", "failed")
    assert report.location == ("a.py", 1, "test_a")
    assert report.longrepr.reprcrash.message == "boom"
    assert "> assert 0" in report.longreprtext
    assert report.sections == [("Captured stdout call", r"hello\x07")]
    assert report.user_properties == [("own", 1), ("microvm.outcome", "failed")]
    assert callable(report.toterminal)
    assert report.extra == "y"


def test_data_of_plugins_is_kept_under_names_that_pytest_does_not_use(config):
    own = {"extras": [{"content": "a\x07"}], "json_metadata": {"n": 1}}
    kept = rebuild(config, **own)
    assert kept.extras == [{"content": r"a\x07"}]
    assert kept.json_metadata == {"n": 1}
    taken = {
        "toterminal": "x",
        "passed": False,
        "head_line": "x",
        "node": "x",
        "__class__": "x",
        "_x": 1,
        "a b": 1,
    }
    report = rebuild(config, **taken)
    assert callable(report.toterminal)
    assert report.failed
    assert not {"node", "_x", "a b"} & set(vars(report))


@pytest.mark.parametrize("outcome", ["passed", "skipped"])
def test_a_report_without_reason(config, outcome):
    report = rebuild(config, outcome=outcome, longrepr=None)
    assert report.outcome == outcome


def test_a_skip_and_an_expected_failure(config):
    skip = rebuild(config, outcome="skipped", longrepr=["a.py", 3, "Skipped: why"])
    assert skip.longrepr == ("a.py", 3, "Skipped: why")
    far = rebuild(config, outcome="skipped", longrepr=["a.py", 10**30, "Skipped: why"])
    assert far.longrepr == ("a.py", 0, "Skipped: why")
    assert rebuild(config, outcome="skipped", wasxfail="known").wasxfail == "known"


def test_a_subtest(config):
    context = {"msg": "part", "kwargs": {"n": "1"}}
    report = rebuild(config, **{"_report_type": "SubTestReport", "_subtest.context": context})
    assert report.head_line == "test_a [part] (n=1)"


@pytest.mark.parametrize(
    "change",
    [
        {"nodeid": "a.py::test_b"},
        {"when": "collect"},
        {"outcome": ["failed"]},
        {"longrepr": {}},
        {"longrepr": {**FAILURE, "reprtraceback": {**TRACEBACK, "style": "x"}}},
        {
            "longrepr": {
                **FAILURE,
                "reprtraceback": {**TRACEBACK, "reprentries": [{"type": "Evil", "data": {}}]},
            }
        },
        {"longrepr": {**FAILURE, "reprcrash": {**CRASH, "lineno": "3"}}},
        {"sections": [["a", "b", "c"]]},
        {"user_properties": [["a"]]},
        {"_report_type": "SubTestReport"},
        {"longrepr": native("a", 1)},
    ],
)
def test_what_is_no_report_is_refused(config, change):
    with pytest.raises(ProtocolViolation):
        rebuild(config, **change)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(DATA)), value=JSON)
def test_any_value_is_rebuilt_or_refused(config, key, value):
    try:
        report = rebuild(config, **{key: value})
    except ProtocolViolation:
        return
    assert (report.nodeid, report.location) == (ITEM.nodeid, ITEM.location)
    assert isinstance(report.longreprtext, str)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["reprcrash", "reprtraceback", "sections", "chain"]), value=JSON)
def test_any_failure_is_rebuilt_or_refused(config, path, value):
    try:
        report = rebuild(config, longrepr={**FAILURE, path: value})
    except ProtocolViolation:
        return
    assert isinstance(report.longreprtext, str)


@pytest.mark.parametrize("pieces", [(":", ":error::x\n"), ("a\n", ":", ":error::x"), ("#", "#[error]x")])
def test_a_ci_command_cannot_come_in_pieces(config, pieces):
    """pytest writes the lines of a native traceback with nothing between them."""
    text = rebuild(config, longrepr=native(*pieces)).longreprtext
    assert not re.search(r"^\s*::|##\[", text, re.MULTILINE)


@pytest.mark.parametrize(
    "failure",
    [
        {"reprcrash": {**CRASH, "path": ":"}},
        {"sections": [["error::x", "content", ":"], ["[error]", "content", "#"]]},
        {"reprtraceback": {**TRACEBACK, "reprentries": [{**ENTRY, "data": {**ENTRY["data"], "reprfileloc": {
            "path": " ::error", "lineno": 1, "message": "::x"}}}]}},
    ],
)  # fmt: skip
def test_failure_parts_do_not_combine_to_a_ci_command(config, failure):
    text = rebuild(config, longrepr={**FAILURE, "chain": None, **failure}).longreprtext
    assert not re.search(r"^\s*::|##\[", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("outcome", "longrepr"),
    [
        ("failed", "reprcrash and reprtraceback, as pytest calls them"),
        ("skipped", ["reprcrash", 1, "reprtraceback"]),
    ],
)
def test_a_text_may_hold_the_names_of_a_failures_parts(config, outcome, longrepr):
    """pytest takes it for a failure with these parts; found by fuzzing."""
    report = rebuild(config, outcome=outcome, longrepr=longrepr)
    assert report.longrepr == (longrepr if outcome == "failed" else tuple(longrepr))


def test_deep_values_are_cut_wherever_they_are(config):
    deep = "x"
    for _ in range(400):
        deep = [deep]
    entry = {**ENTRY, "data": {**ENTRY["data"], "reprfuncargs": {"args": [["x", deep]]}}}
    traceback = {**TRACEBACK, "reprentries": [entry]}
    report = rebuild(config, longrepr={**FAILURE, "reprtraceback": traceback, "chain": None})
    assert "..." in str(report.longrepr.reprtraceback.reprentries[0].reprfuncargs.args)
    assert "..." in str(rebuild(config, user_properties=[["own", deep]]).user_properties)


@pytest.mark.parametrize(
    "value", [-1, -0.5, float("nan"), float("inf"), -float("inf"), 10**400, True, "1", None, [1]]
)
def test_a_duration_is_no_nonsense(config, value):
    assert rebuild(config, duration=value).duration == 0.0


def test_our_own_error_is_safe_too():
    report = error_report(ITEM, "call", "crashed \x1b[2J", [], (("console", "\x07"),))
    assert report.failed
    assert report.longreprtext == r"crashed \x1b[2J"
    assert report.sections == [("console", r"\x07")]
