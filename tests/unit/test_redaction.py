"""Secret values are taken out of text and bytes, however they are written and cut."""

from __future__ import annotations

import base64
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
