"""Heads of requests: whatever comes is refused or understood in one way, and written so that all agree."""

import asyncio

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.network.proxy.heads import Origin, attempted, parse_head, read_head, split_host
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.network.proxy.relaying import GuestStream
from support.network import request

INSIDE = Origin("https", "a.example", 443)


def parsed(raw, fixed=None):
    """Return what is asked for, after having checked what would be sent for it."""
    asked, _http = parse_head(raw, fixed)
    if asked.method != "CONNECT":
        sent = h11.Connection(h11.CLIENT).send(asked.outgoing())
        again = h11.Connection(h11.SERVER, 1 << 20)
        again.receive_data(sent)
        head = again.next_event()
        assert sent.count(b"\r\n\r\n") == 1
        assert dict(head.headers)[b"host"].decode() == asked.origin.authority
        assert head.target.decode() == asked.path + asked.query
        assert head.method.decode() == asked.method
        lengths = [name for name, _ in head.headers if name in (b"content-length", b"transfer-encoding")]
        assert len(lengths) <= 1
    return asked


@pytest.mark.parametrize(
    ("target", "origin", "path", "query"),
    [
        ("http://a.example/b?c", Origin("http", "a.example", 80), "/b", "?c"),
        ("http://a.example", Origin("http", "a.example", 80), "/", ""),
        ("http://a.example?c", Origin("http", "a.example", 80), "/", "?c"),
        ("http://A.EXAMPLE.:81//b/", Origin("http", "a.example", 81), "//b/", ""),
        ("http://[2001:DB8::0:1]:81/", Origin("http", "2001:db8::1", 81), "/", ""),
        ("http://127.1/", Origin("http", "127.0.0.1", 80), "/", ""),
        ("ws://a.example/", Origin("http", "a.example", 80), "/", ""),
    ],
)
def test_what_is_asked_for(target, origin, path, query):
    authority = target.partition("://")[2].partition("/")[0].partition("?")[0]
    asked = parsed(request(target, host=authority))
    assert (asked.origin, asked.path, asked.query) == (origin, path, query)


def test_what_is_asked_for_in_a_tunnel():
    asked = parsed(request("/b?c"), INSIDE)
    assert (asked.origin, asked.path, asked.query) == (INSIDE, "/b", "?c")


def test_a_tunnel():
    asked = parsed(request("a.example:443", method="CONNECT", host="a.example"))
    assert (asked.origin, asked.path) == (Origin(None, "a.example", 443), "")


@pytest.mark.parametrize(
    "text", ["", ":80", "a b", "a:", "a:x", "a:0", "a:65536", "[::1", "::1", "a@b", "a/b", "1.2.3.256"]
)
def test_what_is_no_host(text):
    with pytest.raises(Refused):
        split_host(text)


TOKENS = st.text("GETPOSAbc-x", min_size=1, max_size=8)
VALUES = st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=20)
NAMES = st.sampled_from(
    ["Host", "Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "Expect", "TE", "X-A", "host "]
)
HEADERS = st.lists(
    st.tuples(NAMES, st.sampled_from(["a.example", "chunked", "4", "close", "b"]) | VALUES), max_size=5
)
TARGETS = (
    st.sampled_from(["http://a.example/", "http://a.example/b?c#d", "/b", "a.example:443", "*"]) | VALUES
)


@given(TOKENS, TARGETS, st.sampled_from(["1.1", "1.0", "2.0"]) | VALUES, HEADERS, st.booleans())
def test_a_head_like_others(method, target, version, headers, host):
    lines = [f"{method} {target} HTTP/{version}", *(["Host: a.example"] if host else [])]
    judged("\r\n".join([*lines, *[f"{name}: {value}" for name, value in headers], "", ""]).encode("latin-1"))


@given(st.binary(max_size=300), st.integers(0, 60), st.integers(0, 20))
def test_a_head_that_was_changed(new, at, dropped):
    good = request("http://a.example/b?c", "Content-Length: 4", method="POST")
    judged(new)
    judged(good[:at] + new + good[at + dropped :])


def judged(raw):
    """Read and judge bytes; they are refused, or come to a host that is written in one way."""
    attempted(raw)
    for fixed in (None, INSIDE):
        try:
            head = asyncio.run(read(raw))
            if head is not None:
                asked = parsed(head, fixed)
                assert asked.origin.host == asked.origin.host.lower()
                assert fixed is None or asked.origin == fixed
        except Refused as refused:
            check(refused.response())


def check(response):
    assert response.startswith(b"HTTP/1.1 ")
    assert response.count(b"\r\n\r\n") == 1
    assert len(response) < 2000


async def read(raw):
    reader = asyncio.StreamReader()
    reader.feed_data(raw)
    reader.feed_eof()
    return await read_head(GuestStream(reader, None))
