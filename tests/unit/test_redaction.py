"""Secret values are taken out of text and bytes, however they are written and cut."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.redaction import MASK, RedactedStream, Redactor

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
