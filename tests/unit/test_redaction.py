"""Secret values are taken out of text and bytes, however they are written and cut."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.untrusted import redaction
from pytest_microvm.untrusted.redaction import (
    MASK,
    MIN_LENGTH,
    MIN_PART,
    RedactedStream,
    Redactor,
    _Words,
    variants,
)

TOKEN = "s3cr3t/Tok+en=42&x y<z>"  # noqa: S105 - no real one


def coded(text, chars, code):
    return "".join(code % ord(char) if char in chars else char for char in text)


encodings = {
    "plain": lambda value: value,
    "json": lambda value: json.dumps({"t": value}),
    "json of PHP": lambda value: json.dumps(value).replace("/", "\\/"),
    "json of Go": lambda value: coded(json.dumps(value), "<>&", "\\u%04x"),
    "json of Gson": lambda value: coded(json.dumps(value), "<>&='", "\\u%04x"),
    "json of .NET": lambda value: coded(json.dumps(value), "<>&'+`", "\\u%04X"),
    "url": lambda value: quote(value, safe=""),
    "url path": quote,
    "form": quote_plus,
    "lower-case url": lambda value: re.sub("%..", lambda code: code[0].lower(), quote(value, safe="")),
    "base64": lambda value: base64.b64encode(value.encode()).decode(),
    "basic": lambda value: base64.b64encode(f"user:{value}".encode()).decode(),
    "base64 in the middle": lambda value: base64.b64encode(f"ab{value}cd".encode()).decode(),
    "url-safe base64": lambda value: base64.urlsafe_b64encode(f"a{value}".encode()).decode(),
}


@pytest.mark.parametrize("name", encodings)
def test_each_encoding_is_found(name):
    text = f"before {encodings[name](TOKEN)} after"
    redacted = Redactor([TOKEN]).text(text)
    assert MASK in redacted
    assert redacted.startswith("before ")
    assert redacted.endswith(" after")
    for encode in encodings.values():
        assert encode(TOKEN) not in redacted


KEY = (
    "-----BEGIN KEY-----\n"
    + "\n".join(hashlib.sha256(b"%d" % n).hexdigest() for n in range(6))
    + "\n-----END KEY-----\n"
)


@pytest.mark.parametrize("size", [76, 64])
@pytest.mark.parametrize("value", [TOKEN * 6, KEY, KEY.strip()], ids=["token", "pem", "without its end"])
def test_base64_that_is_cut_into_lines(value, size):
    """As base64(1), openssl(1) and Python's encodebytes do it."""
    encoded = base64.b64encode(value.encode()).decode()
    lines = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    shown = Redactor([value]).text("\n".join(lines)).splitlines()
    assert set(shown) <= {MASK, MASK + "=", MASK + "=="} | {line for line in lines if len(line) < 8}
    assert base64.encodebytes(value.encode()).decode().splitlines() == lines or size == 64


@pytest.mark.parametrize("value", ["horse", "s3cr"])
def test_base64_of_a_short_value(value):
    assert Redactor([value]).text(base64.b64encode(value.encode()).decode()) == MASK


def compared(value):
    """Return what pytest says where a value is not what a test expects."""
    try:
        assert value == "x"  # rewritten by pytest
    except AssertionError as error:
        return str(error)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("assert 'ghp_A1b2C3d4...2M3n4O5p6Q7r8' == 'x'", "assert '***...***' == 'x'"),
        ("{'HOME': '/ro...M3n4O5p6Q7r8'}", "{'HOME': '/ro...***'}"),
        ("ghp_A1b2C3d\N{HORIZONTAL ELLIPSIS}", "***\N{HORIZONTAL ELLIPSIS}"),
        ("ghp_A1b2... and ...6Q7r8'", "***... and ...6Q7r8'"),
        ("ghp_ghp_A1b2....7Q7r8", "ghp_***....7Q7r8"),
        ("ghp_A1b2...p6Q7r8...p6Q7r8", "***...***...***"),
        ("...", "..."),
        ("wait ... ghp_A1b2C3 ...", "wait ... ghp_A1b2C3 ..."),
    ],
)
def test_a_value_that_was_cut_short(text, shown):
    assert Redactor(["ghp_A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8"]).text(text) == shown


def test_a_value_that_pytest_cut_short():
    value = "ghp_A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8"
    said = compared(value)
    assert value not in said.partition("\n")[0], "pytest shows it whole: this test has no object any more"
    shown = Redactor([value]).text(said)
    assert not [value[start : start + 5] for start in range(36) if value[start : start + 5] in shown]


CUT = "ghp_A1b2ghp_A1b2C3p6Q7r8d4Q7r8p6Q7r8"  # its beginning and its end are in it twice
pieces = st.one_of(
    st.integers(1, 36).map(lambda size: CUT[:size]),
    st.integers(1, 36).map(lambda size: CUT[-size:]),
    st.sampled_from(["...", "....", "\N{HORIZONTAL ELLIPSIS}", "X", "g", "8"]),
)


@given(st.lists(pieces, max_size=12).map("".join))
def test_no_part_stays_beside_what_was_left_out(text):
    shown = Redactor([CUT]).text(text)
    for dots in re.finditer(r"\.{3,}|\N{HORIZONTAL ELLIPSIS}", shown):
        for size in range(MIN_PART, len(CUT) + 1):
            assert not shown[: dots.start()].endswith(CUT[:size])
            assert not shown[dots.end() :].startswith(CUT[-size:])


def test_many_dots_take_no_time():
    text = "ghp_A1..." * 100_000
    assert Redactor(["ghp_A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8"]).text(text) == "***..." * 100_000


def test_a_key_of_many_lines_is_looked_for_at_once():
    """A pattern of all lines in all encodings took a minute for a megabyte."""
    bundle = KEY + "".join(hashlib.sha256(b"x%d" % n).hexdigest() + "\n" for n in range(900))
    redactor = Redactor([bundle])
    data = ("an ordinary line of a log\n" * 10_000).encode()
    stream = RedactedStream(redactor)
    shown = b"".join(stream.feed(data[start : start + 4096]) for start in range(0, len(data), 4096))
    assert shown + stream.end() == data
    assert redactor.raw(data + bundle.encode() + data) == data + MASK.encode() + data


def hostile(value):
    """Texts by which a machine that knows a value makes looking for it expensive."""
    encoded = base64.b64encode(value.encode()).decode()
    heads = "".join(sorted({variant[:MIN_LENGTH] for variant in variants(value)}))
    return {
        "first character": value[0],
        "first characters": value[:MIN_LENGTH],
        "more of them": value[:MIN_PART],
        "first characters of every spelling": heads,
        "all but the last": value[:-1],
        "half": value[: len(value) // 2],
        "base64": encoded[:-6],
        "dots": "a...",
        "ellipses": "a\N{HORIZONTAL ELLIPSIS}",
        "beginnings and dots": value[:MIN_PART] + "...",
        "what nearly is a beginning, and dots": value[:MIN_PART] + "X...",
        "many beginnings and dots": value[:MIN_PART] * 41 + "...",
        "dots and ends": "...X" + value[-MIN_PART:] * 4,
    }


def work(redactor, text):
    """Return how many calls, of C functions too, it takes to redact a text and the same as a stream."""
    calls = 0

    def count(_frame, event, _function):
        nonlocal calls
        calls += event in ("call", "c_call")

    data = text.encode()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        redactor.text(text)
        stream = RedactedStream(redactor)
        for start in range(0, len(data), 65536):
            stream.feed(data[start : start + 65536])
        stream.end()
    finally:
        sys.setprofile(before)
    return calls


TOKENS = [hashlib.sha256(b"t%d" % n).hexdigest()[:40] + "/+&" for n in range(30)]


@pytest.mark.parametrize("text", hostile("x" * 8))
@pytest.mark.parametrize(
    "values", [[TOKEN], ["0" * 63 + "1"], [KEY], TOKENS], ids=["token", "zeros", "pem", "many"]
)
def test_work_is_linear_and_the_same_for_many_values(values, text):
    """The clock is looked at by benchmarks/bench_redaction.py."""
    size = 20_000
    text = hostile(values[0])[text]
    text = text * (size // len(text) + 1)
    redactor = Redactor(values)
    work(redactor, "...")  # what it needs is made
    assert work(redactor, text[:size]) < 5 * size
    assert work(redactor, text[: size // 2]) < 0.6 * work(redactor, text[:size]) + 1000


def test_long_value_fed_byte_by_byte_is_not_searched_each_time():
    value = "".join(hashlib.sha256(b"%d" % n).hexdigest() for n in range(40))
    stream = RedactedStream(Redactor([value]))
    searched = []
    real = stream._redactor._bytes.find
    stream._redactor._bytes.find = lambda data: searched.append(data) or real(data)
    for byte in value[:-1].encode():
        assert stream.feed(bytes([byte])) == b""
    assert searched == []
    assert stream.feed(value[-1:].encode()) == MASK.encode()


def plainly(words, text):
    """Return what is to be found, the slow way."""
    position, found = 0, []
    while position < len(text):
        here = max((word for word in words if text.startswith(word, position)), key=len, default="")
        if here:
            found.append((position, position + len(here)))
        position += len(here) or 1
    return found


@pytest.mark.parametrize("start", [5, 7, 128])
@pytest.mark.parametrize("pattern", [1, 60, 8192])
def test_every_word_is_found_however_little_the_pattern_has(start, pattern, monkeypatch):
    monkeypatch.setattr(redaction, "_MAX_START", start)
    monkeypatch.setattr(redaction, "_MAX_PATTERN", pattern)
    words = st.sets(st.text("ab|", min_size=4, max_size=12), max_size=8)

    @given(words, st.text("ab|", max_size=60))
    def check(words, text):
        for kind in (str, str.encode):
            found = _Words(map(kind, words))
            assert list(found.find(kind(text))) == plainly(words, text)
            sizes = range(min(12, len(text)), -1, -1)
            held = (
                n
                for n in sizes
                if any(word.startswith(text[len(text) - n :]) and len(word) > n for word in words)
            )
            assert found.unfinished(kind(text)) == next(held, 0)

    check()


def test_lines_that_begin_with_each_other():
    value = "\n".join("a" * size for size in range(16, 300))
    assert Redactor([value]).text(f"x{'a' * 130}y") == f"x{MASK}y"


def test_ordinary_text_stays():
    text = "nothing of it: s3cr3t Tok en"
    assert Redactor([TOKEN]).text(text) == text
    assert Redactor([]).text(text) == text


def test_short_values_are_not_looked_for():
    assert Redactor(["abc"]).text("abcabc") == "abcabc"
    assert not Redactor(["abc"])


def test_a_line_of_a_longer_value():
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEF\nshort\n-----END KEY-----\n"
    assert "MIIEvQ" not in Redactor([key]).text("the log says MIIEvQIBADANBgkqhkiG9w0BAQEF.")


def test_a_tree_of_json():
    found = Redactor([TOKEN]).tree({TOKEN: ["a", f"b{TOKEN}", 7, None, {"x": TOKEN}]})
    assert TOKEN not in json.dumps(found)
    assert found == {MASK: ["a", f"b{MASK}", 7, None, {"x": MASK}]}


@given(st.lists(st.integers(1, 60), max_size=20), st.sampled_from(sorted(encodings)))
def test_a_stream_cut_anywhere(cuts, name):
    data = f"{TOKEN[:7]} and {encodings[name](TOKEN)} and {TOKEN}{TOKEN[:5]}".encode()
    whole = Redactor([TOKEN]).raw(data)
    stream = RedactedStream(Redactor([TOKEN]))
    shown, position = b"", 0
    for cut in [*cuts, len(data)]:
        shown += stream.feed(data[position : position + cut])
        position += cut
    shown += stream.end()
    assert shown == whole
    assert TOKEN.encode() not in shown


@given(st.binary(max_size=200), st.lists(st.integers(1, 50), max_size=10))
def test_a_stream_loses_nothing(data, cuts):
    stream = RedactedStream(Redactor(["correct horse battery"]))
    shown, position = b"", 0
    for cut in [*cuts, len(data)]:
        shown += stream.feed(data[position : position + cut])
        position += cut
    assert shown + stream.end() == data


@given(st.text(min_size=4, max_size=30))
def test_any_value_is_found(value):
    assert value not in Redactor([value]).text(f"<{value}>").replace(MASK, "") or value in MASK
