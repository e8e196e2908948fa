"""Credentials: they go to their host over TLS, and the guest never gets to see one."""

import base64
import contextlib
import json
import pickle
import ssl
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.errors import UsageError
from pytest_microvm.network.proxy.authority import new_authority
from pytest_microvm.network.proxy.credentials import resolve_credential
from pytest_microvm.network.proxy.echoes import Echoes
from pytest_microvm.settings.credentials import parse_credential
from support.network import PUBLIC, Server, World, headers_of, receive, request

VALUE = "s3cret/value+with=odd chars"


@pytest.fixture
def servers():
    with Server("api.example", "other.example") as api, Server("other.example") as other, Server() as plain:
        yield api, other, plain


@pytest.fixture(scope="module")
def authority():
    return new_authority("m1")


@pytest.fixture(autouse=True)
def _trust(monkeypatch, tmp_path):
    PUBLIC.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("TOKEN", VALUE)


def credential(**keys):
    return resolve_credential(
        parse_credential({"host": "api.example", "value": {"env": "TOKEN"}} | keys, "test")
    ).for_machine()


@pytest.fixture
def world(servers, authority):
    api, other, _plain = servers
    names = {"api.example": api, "other.example": other}
    with World([*names], names, credentials=[credential()], authority=authority) as world:
        yield world


def ask(world, target="/", *headers, host="api.example", method="GET", body=b""):
    trusted = PUBLIC if host == "other.example" else world.authority
    pem = trusted.cert_pem.bytes().decode() if trusted is PUBLIC else trusted.certificate_pem
    tls = world.secure(f"{host}:443", trusted=pem)
    tls.sendall(request(target, *headers, host=host, method=method) + body)
    return receive(tls)


SENT = {
    "bearer": ({}, "authorization", f"Bearer {VALUE}"),
    "basic": ({"scheme": "basic"}, "authorization", "Basic " + base64.b64encode(b"me:pass word").decode()),
    "raw": ({"scheme": "raw"}, "authorization", VALUE),
    "a header of its own": ({"header": "X-Api-Key"}, "x-api-key", VALUE),
    "a header of its own, bearer": ({"header": "X-Auth", "scheme": "bearer"}, "x-auth", f"Bearer {VALUE}"),
}


@pytest.mark.parametrize("how", SENT)
@pytest.mark.parametrize("mine", ["nothing", "the placeholder", "a value of its own"])
def test_the_header_is_added(servers, authority, monkeypatch, how, mine):
    keys, header, expected = SENT[how]
    if keys.get("scheme") == "basic":
        monkeypatch.setenv("TOKEN", "me:pass word")
    made = credential(**keys)
    written = {"nothing": [], "the placeholder": [f"{header}: Bearer {made.placeholder}"]}.get(
        mine, [f"{header.upper()}: mine", f"{header}: another", f"{header.replace('-', '_')}: by CGI"]
    )
    with World(
        ["api.example"], {"api.example": servers[0]}, credentials=[made], authority=authority
    ) as world:
        assert ask(world, "/path", *written)[2] == b"hello"
    (head,) = servers[0].heads
    assert headers_of(head)[header] == expected
    assert head.lower().replace(b"_", b"-").count(header.encode() + b":") == 1


@pytest.mark.parametrize(
    "query", ["", "?", "?a=1&key=mine&b=2&k%65y=mine", "?key", "?a=1;key=mine&b=2&KEY=mine;Key"]
)
def test_the_query_is_extended(servers, authority, query):
    made = credential(query="key")
    with World(
        ["api.example"], {"api.example": servers[0]}, credentials=[made], authority=authority
    ) as world:
        assert ask(world, f"/path{query}")[2] == b"hello"
        assert [entry.path for entry in world.log.list()] == ["/path"]
    others = "a=1&b=2&" if "a=1" in query else ""
    target = servers[0].heads[0].split(b" ")[1].decode()
    assert target == f"/path?{others}key={quote(VALUE, safe='')}"


def test_another_host_gets_nothing(world, servers):
    placeholder = credential().placeholder
    assert ask(world, "/", f"Authorization: Bearer {placeholder}", host="other.example")[0] == 200
    assert headers_of(servers[1].heads[0])["authorization"] == f"Bearer {placeholder}"
    assert VALUE not in repr(servers[1].heads)
    assert world.log.list()[0].method == "CONNECT"  # nobody looks into it


def test_a_redirect_does_not_take_it_along(world, servers):
    status, headers, _body = ask(world, "/redirect?to=https://other.example/")
    assert (status, headers["location"]) == (302, "https://other.example/")
    ask(world, "/", host="other.example")
    assert "authorization" in headers_of(servers[0].heads[0])
    assert "authorization" not in headers_of(servers[1].heads[0])


def test_a_second_host_behind_the_same_address_does_not_get_it(world, servers):
    assert ask(world, "/", host="api.example")[0] == 200
    tls = world.secure("api.example:443", trusted=world.authority.certificate_pem)
    tls.sendall(request("/", host="other.example"))
    assert receive(tls)[0] == 400
    with pytest.raises(ssl.SSLError):
        world.secure("api.example:443", trusted=world.authority.certificate_pem, name="other.example")
    assert len(servers[0].heads) == 1


@pytest.mark.parametrize("port", ["", ":8080"])
def test_without_tls_it_is_not_sent(servers, authority, port):
    rules = ["api.example", "http://api.example:8080/*"]
    with World(rules, {"api.example": servers[2]}, credentials=[credential()], authority=authority) as world:
        status, _headers, body = world.get(f"http://api.example{port}/")
        sock, _status = world.tunnel("api.example:80")
        sock.sendall(request("/", host="api.example"))
        assert receive(sock)[0] == 403
    assert (status, servers[2].heads) == (403, [])
    assert b"use https" in body


def test_it_does_not_allow_its_host(servers, authority):
    with World(
        ["other.example"], {"api.example": servers[0]}, credentials=[credential()], authority=authority
    ) as world:
        assert world.tunnel("api.example:443")[1] == 403
    assert servers[0].connections == 0


def test_it_goes_to_its_port_alone(servers, authority):
    api = servers[0]
    made = credential(host="api.example:8443")
    with World(
        ["api.example:8443", "api.example:443"],
        {"api.example": api},
        credentials=[made],
        authority=authority,
    ) as world:
        tls = world.secure("api.example:8443", trusted=authority.certificate_pem)
        tls.sendall(request("/", host="api.example:8443"))
        assert receive(tls)[0] == 200
        tls = world.secure("api.example:443")  # nobody looks into this one
        tls.sendall(request("/", host="api.example"))
        assert receive(tls)[0] == 200
    assert ["authorization" in headers_of(head) for head in api.heads] == [True, False]


def test_a_server_that_cannot_be_verified_does_not_get_it(world, servers, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    assert ask(world)[0] == 502
    assert servers[0].heads == []


def test_several_for_one_host(servers, authority, monkeypatch):
    monkeypatch.setenv("OTHER", "another-value")
    made = [credential(), credential(header="X-Key", value={"env": "OTHER"})]
    with World(["api.example"], {"api.example": servers[0]}, credentials=made, authority=authority) as world:
        _status, _headers, body = ask(world, "/head-echo")
    found = headers_of(servers[0].heads[0])
    assert (found["authorization"], found["x-key"]) == (f"Bearer {VALUE}", "another-value")
    assert b"another-value" not in body


# What comes back


SPELLINGS = {
    "as it is": VALUE,
    "for a URL": quote(VALUE, safe=""),
    "for a URL's path": quote(VALUE),
    "base64": base64.b64encode(VALUE.encode()).decode(),
    "base64 of a pair": base64.b64encode(f"user:{VALUE}".encode()).decode()[7:42],
    "in JSON": json.dumps({"token": VALUE})[11:-2],
    "in JSON of PHP": VALUE.replace("/", "\\/"),
    "in JSON of .NET": VALUE.replace("+", "\\u002B"),
    "in JSON of Gson": VALUE.replace("=", "\\u003d"),
}


def test_what_a_server_says_back_is_blanked_out(world, servers):
    status, headers, body = ask(world, "/head-echo")
    assert status == 200
    assert VALUE.encode() in servers[0].heads[0]
    assert VALUE.encode() not in body
    assert VALUE not in str(headers)
    assert headers["x-echo"] == "*" * len(f"Bearer {VALUE}")
    assert len(body) == int(headers["content-length"]) == len(servers[0].heads[0])


def test_what_a_server_says_back_as_the_name_of_a_header(servers, authority, monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret-value")
    with World(
        ["api.example"], {"api.example": servers[0]}, credentials=[credential()], authority=authority
    ) as world:
        _status, headers, _body = ask(world, "/head-echo", "X-As-Header: X-s3cret-value:1")
    assert "s3cret-value" not in str(headers)
    assert headers["x-************"] == "1"


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_in_whichever_spelling(world, spelling, framing):
    # The guest knows what it sends here; it stands for a server that says the same by itself.
    body = f"before {spelling} after".encode()
    if framing == "length":
        _status, _headers, echo = ask(
            world, "/body-echo", f"Content-Length: {len(body)}", method="POST", body=body
        )
    else:
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        _status, _headers, echo = ask(
            world, "/body-echo", "Transfer-Encoding: chunked", method="POST", body=chunks
        )
    assert echo == b"before " + b"*" * len(spelling) + b" after"


def test_a_place_it_leads_to(world):
    status, headers, _body = ask(world, f"/redirect?to=https://other.example/{quote(VALUE, safe='')}")
    assert (status, headers["location"]) == (302, "https://other.example/" + "*" * len(quote(VALUE, safe="")))


def test_responses_that_could_not_be_searched_are_not_asked_for(world, servers):
    ask(world, "/", "Accept-Encoding: gzip, br", "Range: bytes=5-9", "If-Range: x", "A-IM: gdiff")
    ask(
        world, "/", "Accept_Encoding: gzip", "If_Range: x", "A_IM: gdiff", "Sec_WebSocket_Extensions: deflate"
    )
    for head in servers[0].heads:
        assert set(headers_of(head)) == {"host", "authorization", "accept-encoding"}
        assert headers_of(head)["accept-encoding"] == "identity"


def test_a_compressed_response_is_refused(world):
    status, _headers, body = ask(world, "/gzip")
    assert status == 502
    assert b"compressed" in body


def test_a_compressed_websocket_is_refused(world):
    tls = websocket(world, "/quiet-socket?deflate")
    status, _headers, body = receive(tls)
    assert status == 502
    assert b"compressed" in body


def websocket(world, target):
    tls = world.secure("api.example:443", trusted=world.authority.certificate_pem)
    tls.sendall(
        request(
            target,
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Extensions: permessage-deflate",
            host="api.example",
        )
    )
    return tls


def test_in_a_websocket(world, servers):
    tls = websocket(world, "/socket")
    came = b""
    while not came.partition(b"\r\n\r\n")[2].endswith(b"\n"):
        came += tls.recv(1000)
    size = len(f"Bearer {VALUE}")
    assert came.endswith(b"\r\n\r\n\x81" + bytes([size + 1]) + b"*" * size + b"\n")
    assert "sec-websocket-extensions" not in headers_of(servers[0].heads[0])
    tls.sendall(b"\x81\x05hello")
    assert tls.recv(100) == b"\x81\x05hello"


def test_in_fragments_of_a_websocket(world):
    tls = websocket(world, "/quiet-socket")
    came = b""
    while not came.endswith(b"\r\n\r\n"):
        came += tls.recv(1000)
    head, tail = VALUE[:6].encode(), VALUE[6:].encode()
    tls.sendall(b"\x01" + bytes([len(head)]) + head + b"\x89\x00")
    assert tls.recv(100) == b"\x89\x00"
    tls.sendall(b"\x80" + bytes([len(tail)]) + tail)
    assert tls.recv(100) == b"\x81" + bytes([len(VALUE)]) + b"*" * len(VALUE)


def test_a_websocket_that_hides_what_it_sends_is_cut(world):
    """A server must not mask its frames: a machine could take the mask off, and nothing was found in them."""
    tls = websocket(world, "/quiet-socket")
    while not tls.recv(1000).endswith(b"\r\n\r\n"):
        pass
    tls.sendall(
        b"\x81" + bytes([0x80 + len(VALUE)]) + b"\1\1\1\1" + bytes(byte ^ 1 for byte in VALUE.encode())
    )
    with contextlib.suppress(OSError):  # it is cut without TLS's own end
        assert tls.recv(100) == b""


def test_message_ending_like_the_credential_is_not_held_back(world):
    tls = websocket(world, "/quiet-socket")
    came = b""
    while not came.endswith(b"\r\n\r\n"):
        came += tls.recv(1000)
    for message in (b"\x81\x06hellos", b"\x81\x05 s3cr", b"\x88\x00"):
        tls.sendall(message)
        assert tls.recv(100) == message
    value = VALUE.encode()
    tls.sendall(b"\x81" + bytes([len(value)]) + value)
    assert tls.recv(100) == b"\x81" + bytes([len(value)]) + b"*" * len(value)


@given(
    st.lists(st.binary(max_size=20) | st.sampled_from([s.encode() for s in SPELLINGS.values()])), st.data()
)
def test_however_it_is_cut(pieces, data):
    text = b"".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEN", VALUE)
        echoes = Echoes([credential()])
        whole = Echoes([credential()])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    out = b"".join(echoes.feed(part) for part in parts if part) + echoes.feed(b"")
    assert len(out) == len(text)
    assert VALUE.encode() not in out
    assert out == whole.feed(text or b"") + whole.feed(b"")


def test_nothing_is_held_back_without_need():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEN", VALUE)
        echoes = Echoes([credential()])
    assert echoes.feed(b"data: an event\n\n") == b"data: an event\n\n"
    assert echoes.feed(b"data: s3cr") == b"data: "
    assert echoes.feed(b"ap\n\n") == b"s3crap\n\n"


# Where it must not be


def test_it_shows_nowhere(world, capfd):
    ask(world, "/head-echo")
    ask(world, "/silence")
    ask(world, "/nonsense")
    made = credential()
    shown = repr((world.log.list(), [str(entry) for entry in world.log.list()], made, world.errors))
    shown += "".join(capfd.readouterr())
    for spelling in SPELLINGS.values():
        assert spelling not in shown
    with pytest.raises(TypeError):
        pickle.dumps(made)


def test_each_machine_has_a_placeholder_of_its_own():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEN", VALUE)
        one = credential()
    assert one.placeholder != one.for_machine().placeholder
    assert VALUE not in one.placeholder


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ("abc", {}),
        ("with\nline", {}),
        ("with\r\nX-Injected: header", {}),
        ("caf\xe9 au lait", {}),
        (" space in front", {}),
        ("no colon", {"scheme": "basic"}),
        ("value", {"host": "api.example:0"}),
        ("value", {"host": "1.2.3.400"}),
    ],
)
def test_what_cannot_be_sent(monkeypatch, value, keys):
    monkeypatch.setenv("TOKEN", value)
    with pytest.raises(UsageError) as caught:
        credential(**keys)
    assert value == "value" or value not in str(caught.value)
