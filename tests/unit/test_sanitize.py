"""Text from a guest: what stays, what becomes visible."""

import itertools
import json
import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_microvm.untrusted.output import LiveText
from pytest_microvm.untrusted.text import safe_json, sanitize, sanitize_line, sanitize_part


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[1;31mred\x1b[0m\x1b[m", "\x1b[1;31mred\x1b[0m\x1b[m"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\r\nb\rc", "a\nb\\x0dc"),
        ("\x9b31m", r"\x9b31m"),
        ("\x00\x7f", r"\x00\x7f"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\ud800", r"\ud800"),
        ("::error::x", r":\:error::x"),
        ("a ::error::x", "a ::error::x"),
        ("x\n  y ##[group]y", "x\n  y #\\#[group]y"),
        ("##vso[task] ##teamcity[x]", r"#\#vso[task] #\#teamcity[x]"),
        ("## [heading]", "## [heading]"),
        ("\x1b[31m::error::x", "\x1b[31m:\\:error::x"),
        (":\x1b[m:error::x", ":\x1b[m\\:error::x"),
        ("#\x1b[1m#\x1b[m[x] ##v\x1b[ms\x1b[mo[x]", "#\x1b[1m\\#\x1b[m[x] #\\#v\x1b[ms\x1b[mo[x]"),
        ("test.py::test", "test.py::test"),
        ("ünï 漢字 😀 👩\u200d🔬", "ünï 漢字 😀 👩\u200d🔬"),
        ("a\u2028::error::x", "a\\u2028::error::x"),
        ("\ufffe\uffff\u061c", "\\ufffe\\uffff\\u061c"),
        ("\U000e0041", "\\U000e0041"),
        ("\x1b]8;;http://x\x1b\\", r"\x1b]8;;http://x\x1b\\"[:-1]),
    ],
)
def test_sanitize(text, safe):
    assert sanitize(text) == safe


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a\nb\tc\x1b[31md", r"a\nb\tc\x1b[31md"),
        ("::error::x", r":\:error::x"),
        (" ::error::x", r" :\:error::x"),
        ("test.py::test[##[error]x]", r"test.py::test[#\#[error]x]"),
        ("micro\u200bvm.id\ufeff", r"micro\u200bvm.id\ufeff"),
        ("\ufffe\ud800", r"\ufffe\ud800"),
    ],
)
def test_a_line_stays_one_line(text, safe):
    assert sanitize_line(text) == safe


@pytest.mark.parametrize(
    "command",
    [
        "::error::x",
        " \t::error::x",
        "::\x1b[m:error::x",
        "a ##[error]x",
        "##vso[task]x",
        "#\x1b[m#team\x1b[1mcity[x]x",
    ],
)
def test_no_command_is_made_of_two_parts(command):
    """The second part may be another stream's, or the rest of a line too long to be held back."""
    for cut in range(1, len(command)):
        shown = re.sub(r"\x1b\[[0-9;]*m", "", sanitize_part(command[:cut]) + sanitize_part(command[cut:]))
        assert not re.search(r"^\s*::|##(?:|vso|teamcity)\[", shown, re.MULTILINE), cut


@pytest.mark.parametrize("text", ["", "x", "50 %", "a:", "a::b", "#1", "say: ", "\x1b[m", "x\n", "## v1"])
def test_part_that_begins_no_command_stays(text):
    assert sanitize_part(text) == text


def test_what_is_too_long_is_cut_and_said():
    assert sanitize("x" * 100, 10) == "x" * 10 + "\n[90 more characters were cut]"


@pytest.mark.parametrize(
    "piece", ["\n", " ", "\x1b[", "\x1b[0m", "#", ":", "\t::", "#\x1b[m", "\n:\x1b[m", "##vs"]
)
def test_no_text_takes_longer_than_its_length(piece):
    """A quadratic pattern would need an hour for this."""
    assert sanitize_part(piece * 200_000)


@given(st.text())
def test_nothing_but_colour_can_move_the_cursor(text):
    safe = sanitize(text)
    without_colour = re.sub(r"\x1b\[[0-9;]*m", "", safe)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", without_colour)
    assert not re.search(r"^\s*::|##\[", without_colour, re.MULTILINE)


@given(st.text())
def test_a_safe_line_has_no_control_character(text):
    safe = sanitize_line(text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\n]", safe)
    assert len(safe.splitlines()) <= 1
    assert not re.search(r"^\s*::|##\[", safe)


@pytest.mark.parametrize("make", [sanitize, sanitize_line])
@given(text=st.text(st.characters(blacklist_categories=())))
def test_what_is_safe_can_be_encoded_and_written_as_xml(make, text):
    safe = re.sub(r"\x1b\[[0-9;]*m", "", make(text))
    safe.encode()
    element = ET.Element("a", name=safe)
    assert ET.fromstring(ET.tostring(element)).tag == "a"  # noqa: S314 - our own


def test_json_has_no_command_and_says_the_same():
    value = {"##[error]x": ["a\n::error::x", "\\##vso[x]", "###", "\x1b\x9b"]}
    text = safe_json(value, indent=1)
    assert json.loads(text) == value
    assert "##" not in text
    assert sanitize(text) == text


def fed(*pieces):
    """Return what is shown of output that comes in pieces."""
    live = LiveText()
    return "".join([*map(live.feed, pieces), live.end()])


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ([b"a", b"b"], ["a", "b", ""]),
        ([b"\xe2\x82", b"\xac"], ["", "\N{EURO SIGN}", ""]),
        ([b"a\r", b"\nb"], ["a", "\nb", ""]),
        ([b"a\x1b[3", b"1mb"], ["a", "\x1b[31mb", "\x1b[0m"]),
        ([b"\x1b[31ma", b"\x1b[mb"], ["\x1b[31ma", "\x1b[mb", ""]),
        ([b"## ", b"a##", b"[x]"], ["## ", "a", r"#\#[x]", ""]),
        ([b"a ", b"::error::"], ["a ", "::error::", ""]),
        ([b"a\n ", b":", b":error::"], ["a\n ", "", r":\:error::", ""]),
        ([b"50 #"], ["50 ", "#\\"]),
        ([b"100 %", b"\n"], ["100 %", "\n", ""]),
    ],
)
def test_live_text_waits_only_for_what_may_act(pieces, shown):
    live = LiveText()
    assert [*map(live.feed, pieces), live.end()] == shown


@given(st.binary(), st.lists(st.integers(0, 100)))
@example(b"a\n\x1b[m:\x1b[1m:x\n###[a]\r\n#\x1b[3;1m#vso[x]\xe2\x82\xac", list(range(40)))
def test_live_text_is_the_same_for_any_pieces(data, cuts):
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    shown = fed(*(data[a:b] for a, b in itertools.pairwise(places)))
    assert shown == fed(data)
    without_colour = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", without_colour)
    assert not re.search(r"^\s*::|##(?:|vso|teamcity)\[", without_colour, re.MULTILINE)


@given(st.text(st.sampled_from("#:[vso \n\r\x1bm1;x")), st.lists(st.integers(0, 40)))
def test_live_text_has_no_command_for_any_pieces(text, cuts):
    test_live_text_is_the_same_for_any_pieces.hypothesis.inner_test(text.encode(), cuts)


@pytest.mark.parametrize("piece", ["\n", " ", "\x1b[", "\x1b[0m", "#", ":", "#\x1b[m", "\n:\x1b[m", "##vs"])
def test_live_text_holds_little_and_takes_linear_time(piece):
    live = LiveText()
    data = piece.encode() * 1000
    shown = sum(len(live.feed(data)) for _ in range(200))
    assert shown >= 199 * len(data) - 10_000
