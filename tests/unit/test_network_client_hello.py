"""The first message of TLS: read whole or in pieces, and refused where it could be read in two ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.network.proxy.client_hello import MAX_BYTES, BadHello, ClientHello, HelloReader
from support.network import client_hello, in_records

HELLO = client_hello("a.example")


def read_client_hello(data):
    return HelloReader().feed(data)


@pytest.mark.parametrize(
    "name", ["a.example", "A.Example", "xn--caf-dma.example", "a_b.example", "a" * 63 + ".example"]
)
def test_the_name_that_is_asked_for(name):
    assert read_client_hello(client_hello(name)) == ClientHello(name.lower())


def test_no_name():
    assert read_client_hello(client_hello(None)) == ClientHello(None)
    assert read_client_hello(client_hello("127.0.0.1")) == ClientHello(None)


@pytest.mark.parametrize("size", [1, 2, 3, 50, 16384])
def test_cut_anywhere(size):
    hello = in_records(HELLO, size)
    reader = HelloReader()
    for byte in hello[:-1]:
        assert reader.feed(bytes([byte])) is None
    assert reader.feed(hello[-1:]) == ClientHello("a.example")
    assert reader.data == hello
    assert read_client_hello(hello) == ClientHello("a.example")
    assert read_client_hello(hello + b"\x14\x03\x03\x00\x01\x01") == ClientHello("a.example")


def built(extensions, *, session=b"", before=b"\x03\x03" + bytes(32)):
    """Return a hello of these parts."""
    ciphers, compression = b"\0\x02\x13\x01", b"\x01\0"
    body = before + bytes([len(session)]) + session + ciphers + compression + extensions
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


def extension(kind, content):
    return kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content


def listed(*extensions):
    content = b"".join(extensions)
    return len(content).to_bytes(2, "big") + content


def server_names(*names, kind=0):
    entries = b"".join(bytes([kind]) + len(name).to_bytes(2, "big") + name for name in names)
    return extension(0, len(entries).to_bytes(2, "big") + entries)


def test_without_extensions():
    assert read_client_hello(built(b"")) == ClientHello(None)
    assert read_client_hello(built(listed())) == ClientHello(None)
    assert read_client_hello(built(listed(extension(43, b"\x02\x03\x04")))) == ClientHello(None)


AMBIGUOUS = {
    "two names": built(listed(server_names(b"a.example", b"b.example"))),
    "two lists of names": built(listed(server_names(b"a.example"), server_names(b"b.example"))),
    "the same name twice": built(listed(server_names(b"a.example"), server_names(b"a.example"))),
    "no name in the list": built(listed(server_names())),
    "a name of another kind": built(listed(server_names(b"a.example", kind=1))),
    "an empty name": built(listed(server_names(b""))),
    "a NUL in the name": built(listed(server_names(b"a.example\0.b.example"))),
    "a dot at the end": built(listed(server_names(b"a.example."))),
    "an address for a name": built(listed(server_names(b"::1"))),
    "letters outside of ASCII": built(listed(server_names("caf\xe9.example".encode()))),
    "a list that is too long": built(listed(extension(0, b"\0\x20\0\0\x09a.example"))),
    "a name that is too long": built(listed(extension(0, b"\0\x0c\0\0\x20a.example"))),
    "something behind the name": built(listed(extension(0, b"\0\x0c\0\0\x09a.example!"))),
    "something behind the extensions": built(listed(server_names(b"a.example")) + b"!"),
    "extensions that are too long": built(b"\xff\xff" + server_names(b"a.example")),
    "a session that is too long": built(b"", before=b"\x03\x03" + bytes(32) + b"\xff"),
    "another message": HELLO[:5] + b"\x02" + HELLO[6:],
    "another record": b"\x17" + HELLO[1:],
    "another record later": in_records(HELLO, 50)[:55] + b"\x17\x03\x01\x00\x01\x00",
    "an empty record": b"\x16\x03\x01\x00\x00" + HELLO,
    "a record that is too long": b"\x16\x03\x01\x40\x01",
    "another version": b"\x16\x02\x01" + HELLO[3:],
    "a message that is too long": b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",
    "records without end": b"\x16\x03\x01\x00\x04\x01\x00\x70\x00"
    + b"\x16\x03\x01\x00\x01\xff" * (MAX_BYTES // 6),
}


@pytest.mark.parametrize("data", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_could_be_read_in_two_ways(data):
    with pytest.raises(BadHello):
        read_client_hello(data)


@given(st.binary(max_size=600))
def test_anything(data):
    judged(data)
    judged(b"\x16\x03\x01" + data)


@given(st.integers(0, len(HELLO) - 1), st.binary(min_size=1, max_size=4), st.integers(0, 8))
def test_a_hello_that_was_changed(at, new, dropped):
    judged(HELLO[:at] + new + HELLO[at + dropped :])


def judged(data):
    """However it is cut, the same comes of it."""
    verdicts = []
    for size in (1, 7, len(data) or 1):
        reader = HelloReader()
        try:
            found = (reader.feed(data[start : start + size]) for start in range(0, len(data), size))
            verdicts.append(next((hello for hello in found if hello), None))
        except BadHello as error:
            verdicts.append(str(error))
    assert len(set(verdicts)) == 1
