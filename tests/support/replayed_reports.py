"""Real pytest runs in this process that show given reports or a given collection, however strange."""

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from _pytest.assertion import util
from hypothesis import strategies as st

from pytest_microvm.errors import ProtocolViolation
from pytest_microvm.suite.collected import Collected
from pytest_microvm.suite.collection import Replay
from pytest_microvm.suite.live_display import LiveDisplay
from pytest_microvm.suite.replay import passed_report, rebuild_test_report

SUITE = """
import sys, warnings, pytest

@pytest.fixture
def broken(): raise RuntimeError("in a fixture")

@pytest.fixture
def broken_end():
    yield
    assert 0, "at the end"

def inner(x, y):
    local = [x] * 3
    raise ValueError(f"boom {x} {y}")

def test_passes(record_property):
    record_property("own", {"a": [1, 2.5, None]})
    print("out"); print("err", file=sys.stderr)

def test_fails():
    print("out")
    assert {"a": 1} == {"a": 2}

def test_raises_in_another(): inner(1, "two")
def test_chain():
    try: inner(1, 2)
    except ValueError as error: raise KeyError("second") from error
def test_native(): pytest.fail("no traceback", pytrace=False)
def test_fixture(broken): pass
def test_missing_fixture(no_such_thing): pass
def test_end(broken_end): pass
def test_syntax(): exec("def (")
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
@pytest.mark.xfail(reason="known")
def test_expected(): assert 0
@pytest.mark.xfail
def test_unexpected(): pass
@pytest.mark.parametrize("value", ["a b", "\\x1b[2J", "ü"])
def test_value(value): assert not value
"""
_DUMP = """
import json, pathlib
def pytest_runtest_logreport(report):
    data = CONFIG.hook.pytest_report_to_serializable(config=CONFIG, report=report)
    with open(OUT, "a") as file: file.write(json.dumps(data) + "\\n")
def pytest_configure(config): global CONFIG; CONFIG = config
"""
_RUN = """
import os, sys, pytest
for style in sys.argv[1:]:
    options = ["-q", "-l", f"--tb={style}", "-p", "dump", "-c", os.devnull, "--rootdir", ".", "test_suite.py"]
    assert pytest.main(options) == 1
"""


@functools.cache
def real_reports(styles=("long", "short", "native", "line", "auto")):
    """Return the serialized reports of a real run, in every traceback style, which no caller may change."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.joinpath("test_suite.py").write_text(SUITE)
        place.joinpath("dump.py").write_text(f"OUT = {str(place / 'out')!r}\n{_DUMP}")
        environment = {**os.environ, "PYTHONPATH": folder, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        environment.pop("PYTEST_ADDOPTS", None)
        run = subprocess.run(
            [sys.executable, "-c", _RUN, *styles],
            cwd=folder,
            env=environment,
            check=False,
            capture_output=True,
        )
        assert run.returncode == 0, run.stdout.decode() + run.stderr.decode()
        return [json.loads(line) for line in place.joinpath("out").read_text().splitlines()]


HOSTILE_TEXT = [
    "\x1b[2J", "\x1b]0;title\x07", "\x9b2J", "\r", "\x00", "\u202e", "\u2028::error::x", "\ud800", "\ufffe",
    "::error::x", "\n::set-output name=a::b", "##[error]x", "##vso[task]", ":", "#", "[", "\n", "", " ",
    "microvm.outcome", "microvm.id", "]]>", "<x>&amp;", "../../etc/passwd", "/", "a::b[c", "x" * 5000,
    "%s{}", "\\", "E   x", ">   x",
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(HOSTILE_TEXT),
    st.sampled_from(
        [None, True, -1, 0, 2**53, 10**300, float("nan"), float("inf"), 1.5, [], {}, [[]], ["a"] * 3]
    ),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(st.characters(blacklist_categories=()), max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
)


def places(value, above=()):
    """Yield the path of every value in a JSON value."""
    yield above
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield from places(inner, (*above, key))


def changed(value, path, new):
    """Return ``value`` with what is at ``path`` replaced."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


@st.composite
def mutated(draw, values):
    """Draw one of ``values`` with one to three places changed."""
    value = draw(st.sampled_from(values))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))[1:] or [()]))
        value = changed(value, path, draw(VALUES))
    return value


@dataclass
class Shown:
    """The output of a run: its terminal, its JUnit file, which reports were refused or shown."""

    code: int = 0
    text: str = ""
    xml: ET.Element | None = None
    shown: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def item(number):
    """Return what stands for the test of that number."""
    nodeid = f"a.py::test_{number}"
    return SimpleNamespace(
        nodeid=nodeid,
        location=("a.py", number, f"test_{number}"),
        keywords={},
        guest=SimpleNamespace(raw_nodeid=nodeid),
    )


class _Reports:
    """Tell given reports, each as that of a test of its own."""

    def __init__(self, records, shown):
        self._records = records
        self._shown = shown

    def pytest_collection(self, session):
        session.items = [None] * len(self._records)
        return True

    def pytest_runtestloop(self, session):
        config = session.config
        for number, record in enumerate(self._records):
            test = item(number)
            ours = [("microvm.outcome", "ours")]
            try:
                report = rebuild_test_report(config, {"data": record}, test, ours)
            except ProtocolViolation:
                self._shown.refused.append(test.nodeid)
                continue
            self._shown.shown.append(test.nodeid)
            reports = {when: passed_report(test, when, ours) for when in ("setup", "call", "teardown")}
            reports[report.when] = report
            config.hook.pytest_runtest_logstart(nodeid=test.nodeid, location=test.location)
            for told in reports.values():
                config.hook.pytest_runtest_logreport(report=told)
            config.hook.pytest_runtest_logfinish(nodeid=test.nodeid, location=test.location)
        return True


class _Collection:
    """Replay a given collection and let every test in it pass."""

    def __init__(self, data, shown):
        self._data = data
        self._shown = shown
        self._replay = None

    def pytest_collection(self, session):
        try:
            self._replay = Replay(session, Collected.parse(self._data), LiveDisplay(session.config))
            self._replay.perform()
        except ProtocolViolation as error:
            self._shown.refused.append(str(error))
            raise pytest.UsageError(str(error)) from None
        return True

    def pytest_make_collect_report(self, collector):
        return self._replay.make_report(collector)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        self._shown.shown.append(item.nodeid)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for when in ("setup", "call", "teardown"):
            item.ihook.pytest_runtest_logreport(report=passed_report(item, when, []))
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True


def show_reports(records, *options):
    """Run pytest with ``records`` (serialized test reports) as its tests' reports."""
    numbered = [
        {**record, "nodeid": f"a.py::test_{number}"} if isinstance(record, dict) else record
        for number, record in enumerate(records)
    ]
    shown = Shown()
    return _run(_Reports(numbered, shown), shown, options)


def show_collection(data, *options):
    """Run pytest with ``data`` (a runner's answer to ``collect``) as its collection."""
    shown = Shown()
    return _run(_Collection(data, shown), shown, options)


def _run(plugin, shown, options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "junit.xml")
        arguments = ["-c", os.devnull, "--rootdir", folder, f"--junitxml={path}", "-rA", "-vv", "-s"]
        arguments += ["-p", "no:cacheprovider", "-o", "junit_logging=all", *options]
        out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
        before = Path.cwd()
        patched = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "PYTEST_PLUGINS": ""}
        # pytest keeps these for the whole process, and an inner run takes them away.
        kept = {name: getattr(util, name) for name in ("_reprcompare", "_assertion_pass", "_config")}
        with (
            mock.patch.dict(os.environ, patched),
            contextlib.redirect_stdout(out),
            mock.patch.multiple(util, **kept),
        ):
            os.chdir(folder)
            try:
                shown.code = int(pytest.main(arguments, plugins=[plugin]))
            finally:
                os.chdir(before)
        shown.text = out.buffer.getvalue().decode()
        if path.exists():
            shown.xml = ET.parse(path).getroot()  # noqa: S314 - whether it can be parsed is the question
    return shown


def assert_harmless(shown):
    """Assert that a run ended as runs do, that its file has every test, and that its text moves nothing."""
    assert "INTERNALERROR" not in shown.text, shown.text
    assert shown.code in {0, 1, 2, 4, 5}, shown.text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", plain), ascii(plain)
    assert not re.search(r"^\s*::|##(vso|teamcity)?\[", plain, re.MULTILINE), ascii(plain)
    if shown.shown:
        cases = [case.get("name") for case in shown.xml.iter("testcase")]
        assert len(cases) >= len(shown.shown)
        for name, value in ((prop.get("name"), prop.get("value")) for prop in shown.xml.iter("property")):
            assert not name.startswith("microvm.") or value == "ours"
