"""The policy proxy, from a guest's side: what is allowed arrives, all else is refused and written down."""

import ssl

import pytest

from .network_world import PUBLIC, Server, Speaker, World, headers_of, receive, request


@pytest.fixture(scope="module")
def plain():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def secure():
    with Server("secure.example", "other.example", "127.0.0.1") as server:
        yield server


@pytest.fixture(autouse=True)
def _fresh(plain, secure, monkeypatch, tmp_path):
    for server in (plain, secure):
        server.heads.clear()
        server.bodies.clear()
        server.connections = 0
    PUBLIC.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))


def test_a_request_goes_out(plain):
    with World(["a.example"], {"a.example": plain}) as world:
        status, headers, body = world.get("http://a.example/path?secret=1")
    assert (status, body) == (200, b"hello")
    assert plain.heads[0].startswith(b"GET /path?secret=1 HTTP/1.1\r\nHost: a.example\r\n")
    (entry,) = world.log.list()
    assert (entry.allowed, entry.method, entry.host, entry.port, entry.path) == (
        True,
        "GET",
        "a.example",
        80,
        "/path",
    )
    assert (entry.rule, entry.status) == ("a.example", 200)
    assert (entry.sent_bytes, entry.received_bytes) == (48, 43)


def test_nothing_is_allowed_unless_a_rule_says_so(plain):
    with World([], {"a.example": plain}) as world:
        status, headers, body = world.get("http://a.example/path")
    assert status == 403
    assert headers["x-microvm-denied"] == world.denied[0].reason
    assert b'network = ["a.example"]' in body
    assert plain.heads == []


def test_a_tunnel_carries_tls(secure):
    with World(["secure.example"], {"secure.example": secure}) as world:
        with world.secure("secure.example:443") as tls:
            tls.sendall(request("/", "Connection: close", host="secure.example"))
            assert receive(tls)[2] == b"hello"
        world.served.result(10)
    (entry,) = world.log.list()
    assert (entry.method, entry.host, entry.status, entry.path) == ("CONNECT", "secure.example", 200, "")
    assert entry.received_bytes > 1000  # the certificate


def test_a_tunnel_to_what_is_not_allowed(secure):
    with World(["a.example"], {"secure.example": secure}) as world:
        assert world.tunnel("secure.example:443")[1] == 403
    assert secure.connections == 0
    assert world.denied[0].method == "CONNECT"


def test_another_name_in_tls_than_in_the_tunnel(secure):
    with World(["secure.example"], {"secure.example": secure}) as world:
        with pytest.raises(ssl.SSLError, match="(?i)access.denied"):
            world.secure("secure.example:443", name="other.example")
    assert "other.example" in world.denied[0].reason
