"""The policy proxy, from a guest's side: what is allowed arrives whole, and each step is written down."""

import asyncio
import json
import socket
import socketserver
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor

import h11
import pytest

from pytest_microvm.network.policy.rules import parse_rules
from pytest_microvm.network.proxy.access import Access
from pytest_microvm.network.proxy.authority import new_authority
from pytest_microvm.network.proxy.log import NetworkLog
from pytest_microvm.network.proxy.server import Proxy
from support import guards
from support.network import (
    PUBLIC,
    Server,
    Silent,
    Speaker,
    World,
    client_hello,
    headers_of,
    receive,
    request,
)

ACCESS_DENIED = r"(?i)access.denied"  # OpenSSL 1 and 3 write it differently


@pytest.fixture
def plain():
    with Server() as server:
        yield server


@pytest.fixture
def secure():
    with Server("secure.example", "other.example", "127.0.0.1") as server:
        yield server


@pytest.fixture(autouse=True)
def _trust(monkeypatch, tmp_path):
    PUBLIC.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))


@pytest.fixture
def world(plain):
    with World(["a.example"], {"a.example": plain}) as world:
        yield world


# Requests


def test_a_request_goes_out(world, plain):
    status, _headers, body = world.get("http://a.example/path?secret=1")
    assert (status, body) == (200, b"hello")
    assert plain.heads[0].startswith(b"GET /path?secret=1 HTTP/1.1\r\nHost: a.example\r\n")
    world.served.result(guards.PROCESS)
    (entry,) = world.log.list()
    assert (entry.allowed, entry.method, entry.host, entry.port) == (True, "GET", "a.example", 80)
    assert (entry.path, entry.rule, entry.status) == ("/path", "a.example", 200)
    assert (entry.sent_bytes, entry.received_bytes) == (48, 43)


def test_nothing_is_allowed_unless_a_rule_says_so(plain):
    with World([], {"a.example": plain}) as world:
        status, headers, body = world.get("http://a.example/path")
    assert status == 403
    assert headers["x-microvm-denied"] == world.denied[0].reason
    assert b'network = ["a.example"]' in body
    assert plain.heads == []


def test_a_response_to_head_has_no_body(world):
    status, headers, body = world.get("http://a.example/", method="HEAD")
    assert (status, headers["content-length"], body) == (200, "5", b"")


def test_a_response_in_chunks(world):
    status, headers, body = world.get("http://a.example/chunks")
    assert (status, headers["transfer-encoding"], body) == (200, "chunked", b"one two three")
    assert "x-hop" not in headers


def test_a_response_that_ends_with_its_connection(world):
    assert world.get("http://a.example/until-closed")[2] == b"until the end"


def test_http_1_0_gets_no_chunks_and_no_other_request(world):
    sock = world.connect()
    one = b"GET http://a.example/chunks HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    sock.sendall(one + one)
    answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.endswith(b"\r\n\r\none two three")
    assert b"chunked" not in answer.lower()
    assert len(world.log.list()) == 1


def test_many_requests_over_one_connection(world, plain):
    sock = world.connect()
    for path in ("/", "/chunks", "/big", "/"):
        sock.sendall(request(f"http://a.example{path}"))
        assert receive(sock)[0] == 200
    sock.sendall(request("http://a.example/body-echo", "Content-Length: 3", method="POST") + b"abc")
    assert receive(sock)[2] == b"abc"
    assert plain.connections == 2  # the last one could not have been repeated
    assert [entry.path for entry in world.log.list()] == ["/", "/chunks", "/big", "/", "/body-echo"]


def test_a_connection_that_the_server_has_closed_is_made_anew(world, plain):
    sock = world.connect()
    for _ in range(3):
        sock.sendall(request("http://a.example/early"))
        assert receive(sock)[2] == b"no need for the body"
    assert plain.connections == 3


def test_extra_response_does_not_answer_the_next_request(world, plain):
    sock = world.connect()
    sock.sendall(request("http://a.example/two-responses"))
    assert receive(sock)[2] == b"ok"
    sock.sendall(request("http://a.example/"))
    assert receive(sock)[2] == b"hello"
    assert plain.connections == 2


def test_a_response_that_comes_later_is_not_the_next_ones_either(world, plain):
    sock = world.connect()
    sock.sendall(request("http://a.example/late-response"))
    assert receive(sock)[2] == b"ok"
    plain.go_on.set()
    assert plain.gone_on.wait(guards.PROCESS)
    world.wait(asyncio.sleep(0.05))  # the loop hears what lies in its socket
    sock.sendall(request("http://a.example/"))
    assert receive(sock)[2] == b"hello"
    assert plain.connections == 2


@pytest.mark.parametrize("framing", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
def test_a_large_body(world, plain, framing):
    body = bytes(range(250)) * 4000
    sent = body if "Length" in framing else b"f4240\r\n" + body + b"\r\n0\r\n\r\n"
    status, _headers, echo = world.get("http://a.example/body-echo", framing, method="PUT", body=sent)
    assert (status, echo == body) == (200, True)
    assert plain.bodies == [body]


def test_a_body_is_sent_when_it_is_expected(world, plain):
    sock = world.connect()
    sock.sendall(
        request("http://a.example/body-echo", "Expect: 100-continue", "Content-Length: 3", method="POST")
    )
    assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    sock.sendall(b"abc")
    assert receive(sock)[2] == b"abc"
    assert "expect" not in headers_of(plain.heads[0])


def test_a_body_is_not_asked_for_when_the_request_is_denied(world):
    sock = world.connect()
    sock.sendall(
        request(
            "http://b.example/", "Expect: 100-continue", "Content-Length: 3", method="POST", host="b.example"
        )
    )
    assert receive(sock)[0] == 403


def test_a_server_that_answers_before_the_body(world):
    sock = world.connect()
    sock.sendall(request("http://a.example/early", "Content-Length: 1000000", method="POST") + b"abc")
    assert receive(sock)[2] == b"no need for the body"
    assert sock.recv(1) == b""


def test_hints_before_a_response_are_dropped(world):
    assert world.get("http://a.example/early-hints")[2] == b"after hints"


def test_a_response_that_is_cut_is_not_taken_for_whole(world):
    sock = world.connect()
    sock.sendall(request("http://a.example/cut"))
    answer = b""
    try:
        while piece := sock.recv(65536):
            answer += piece
    except ConnectionResetError:
        pass
    assert b"Content-Length: 1000" in answer
    assert answer.endswith(b"only this")


@pytest.mark.parametrize("path", ["silence", "nonsense", "forced-switch"])
def test_a_server_that_does_not_answer(world, path):
    status, headers, body = world.get(f"http://a.example/{path}")
    assert status == 502
    assert b"a.example" in body
    assert "x-microvm-denied" not in headers
    (entry,) = world.log.list()
    assert (entry.allowed, entry.status) == (True, 502)


def test_port_without_a_listener_is_a_bad_gateway():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with World(["a.example"], {"a.example": sock.getsockname()[1]}) as world:
            assert world.get("http://a.example/")[0] == 502
            assert world.tunnel("a.example:443")[1] == 502
            assert [(entry.allowed, entry.status) for entry in world.log.list()] == [(True, 502)] * 2


def test_a_redirect_is_decided_like_every_request(world, plain):
    status, headers, _body = world.get("http://a.example/redirect?to=http://b.example/")
    assert (status, headers["location"]) == (302, "http://b.example/")
    assert world.get(headers["location"])[0] == 403
    assert len(plain.heads) == 1


def test_methods_and_paths(plain):
    with World(["GET,HEAD http://a.example/open/*"], {"a.example": plain}) as world:
        assert world.get("http://a.example/open/x")[0] == 200
        assert world.get("http://a.example/open/x", method="POST", body=b"")[0] == 403
        assert world.get("http://a.example/closed")[0] == 403
        assert world.get("http://a.example/open/../closed")[0] == 403
        assert world.get("http://a.example/open/%2e%2e/closed")[0] == 403
    assert len(plain.heads) == 1


# WebSockets


def talk(sock, host, *headers):
    sock.sendall(
        request(
            f"http://{host}/socket" if host == "a.example" else "/socket",
            "Connection: keep-alive, Upgrade",
            "Upgrade: WebSocket",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version: 13",
            *headers,
            host=host,
        )
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(1)
    first = b""
    while not first.endswith(b"\n"):
        first += sock.recv(1)
    sock.sendall(b"\x81\x85\0\0\0\0hello")
    echo = b""
    while len(echo) < 11:
        echo += sock.recv(100)
    return head, first, echo


def test_a_websocket(world, plain):
    head, _first, echo = talk(world.connect(), "a.example")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"upgrade: websocket\r\n" in head.lower()
    assert echo == b"\x81\x85\0\0\0\0hello"
    assert headers_of(plain.heads[0])["connection"] == "Upgrade"
    assert (world.log.list()[0].status, world.log.list()[0].path) == (101, "/socket")


def test_a_websocket_over_tls(secure):
    with World(["secure.example"], {"secure.example": secure}) as world:
        head, _first, echo = talk(world.secure("secure.example:443"), "secure.example")
    assert (head[:12], echo) == (b"HTTP/1.1 101", b"\x81\x85\0\0\0\0hello")


def test_a_websocket_that_is_looked_into(secure):
    authority = new_authority("m1")
    with World(
        ["GET https://secure.example/socket"], {"secure.example": secure}, authority=authority
    ) as world:
        sock = world.secure("secure.example:443", trusted=authority.certificate_pem)
        head, _first, echo = talk(sock, "secure.example")
    assert (head[:12], echo) == (b"HTTP/1.1 101", b"\x81\x85\0\0\0\0hello")


# Tunnels


def test_a_tunnel_carries_tls(secure):
    with World(["secure.example"], {"secure.example": secure}) as world:
        with world.secure("secure.example:443") as tls:
            tls.sendall(request("/", "Connection: close", host="secure.example"))
            assert receive(tls)[2] == b"hello"
        world.served.result(guards.PROCESS)
    (entry,) = world.log.list()
    assert (entry.method, entry.host, entry.status, entry.path) == ("CONNECT", "secure.example", 200, "")
    assert entry.received_bytes > 500  # the certificate


def test_a_tunnel_that_an_older_client_asks_for(secure):
    with World(["secure.example"], {"secure.example": secure}) as world:
        sock = world.connect()
        sock.sendall(b"CONNECT secure.example:443 HTTP/1.0\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_tunnel_to_an_address_needs_no_name(secure):
    with World([f"127.0.0.1:{secure.port}"]) as world:
        with world.secure(f"127.0.0.1:{secure.port}") as tls:
            tls.sendall(request("/", host=f"127.0.0.1:{secure.port}"))
            assert receive(tls)[2] == b"hello"
        assert world.tunnel(f"127.0.0.2:{secure.port}")[1] == 403


def test_a_server_that_speaks_first_on_a_port_of_its_own():
    with Server(handler=Speaker) as speaker, World(["mail.example:25"], {"mail.example": speaker}) as world:
        sock, status = world.tunnel("mail.example:25")
        assert (status, sock.recv(100)) == (200, b"220 welcome\r\n")
        sock.sendall(b"EHLO")
        sock.shutdown(socket.SHUT_WR)  # half a connection: the answer comes after that
        assert b"".join(iter(lambda: sock.recv(100), b"")) == b"you said EHLO"
        world.served.result(guards.PROCESS)
        assert world.log.list()[0].sent_bytes == 4


def test_another_name_on_a_port_of_its_own(secure):
    with World(["secure.example:8443"], {"secure.example": secure}) as world:
        with world.secure("secure.example:8443") as tls:
            tls.sendall(request("/", host="secure.example:8443"))
            assert receive(tls)[2] == b"hello"
        with pytest.raises(ssl.SSLError, match=ACCESS_DENIED):
            world.secure("secure.example:8443", name="other.example")
    assert "other.example" in world.denied[0].reason


def test_another_name_after_the_server_has_ended():
    with (
        Server(handler=Silent) as silent,
        World(["secure.example:8443"], {"secure.example": silent}) as world,
    ):
        sock, status = world.tunnel("secure.example:8443")
        assert (status, sock.recv(1)) == (200, b"")
        sock.sendall(client_hello("other.example"))
        world.served.result(guards.PROCESS)
    assert "other.example" in world.denied[0].reason


# Looking into TLS


@pytest.fixture
def watched(secure):
    authority = new_authority("m1")
    rules = ["GET https://secure.example/open/*", "deny:https://secure.example/open/secret/*"]
    with World(rules, {"secure.example": secure}, authority=authority) as world:
        yield world


def ask(world, target, *headers, method="GET", host="secure.example", name=None):
    tls = world.secure("secure.example:443", trusted=world.authority.certificate_pem, name=name)
    tls.sendall(request(target, *headers, host=host, method=method))
    return receive(tls)


def test_requests_in_tls_are_decided_one_by_one(watched, secure):
    assert ask(watched, "/open/x")[2] == b"hello"
    assert ask(watched, "/open/secret/x")[0] == 403
    assert ask(watched, "/open/x", method="DELETE")[0] == 403
    tls = watched.secure("secure.example:443", trusted=watched.authority.certificate_pem)
    for path, expected in (("/open/1", 200), ("/open/2", 200), ("/closed", 403)):
        tls.sendall(request(path, host="secure.example"))
        assert receive(tls)[0] == expected
    assert tls.recv(1) == b""
    assert [head.split(b" ")[1] for head in secure.heads] == [b"/open/x", b"/open/1", b"/open/2"]
    assert secure.connections == 2
    assert [(entry.method, entry.path, entry.allowed) for entry in watched.log.list()] == [
        ("GET", "/open/x", True),
        ("GET", "/open/secret/x", False),
        ("DELETE", "/open/x", False),
        ("GET", "/open/1", True),
        ("GET", "/open/2", True),
        ("GET", "/closed", False),
    ]


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("/open/x", "other.example"),
        ("/open/x", "secure.example:80"),
        ("https://other.example/open/x", "other.example"),
        ("https://secure.example/open/x", "secure.example"),
    ],
)
def test_another_host_inside_of_tls(watched, secure, target, host):
    assert ask(watched, target, host=host)[0] == 400
    assert secure.heads == []
    assert watched.denied[0].host == "secure.example"


def test_a_tunnel_inside_of_a_tunnel(watched):
    assert ask(watched, "other.example:443", method="CONNECT")[0] == 405


def test_another_name_in_tls_that_is_looked_into(watched, secure):
    with pytest.raises(ssl.SSLError, match=ACCESS_DENIED):
        ask(watched, "/open/x", name="other.example")
    assert secure.connections == 0


def test_no_tls_where_it_is_looked_into(watched):
    sock, _status = watched.tunnel("secure.example:443")
    sock.sendall(request("/open/x", host="secure.example:443"))
    assert receive(sock)[0] == 403


def test_the_guest_has_to_trust_its_own_authority_alone(watched):
    with pytest.raises(ssl.SSLCertVerificationError):
        watched.secure("secure.example:443")
    with pytest.raises(ssl.SSLCertVerificationError):
        watched.secure("secure.example:443", trusted=new_authority("m2").certificate_pem)


def test_a_server_that_cannot_be_verified_is_not_asked(watched, secure, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    status, _headers, body = ask(watched, "/open/x")
    assert (status, secure.heads) == (502, [])
    assert b"could not be verified" in body


def test_server_with_another_hosts_certificate_gets_no_request():
    authority = new_authority("m1")
    with (
        Server("other.example") as server,
        World(["GET https://secure.example/*"], {"secure.example": server}, authority=authority) as world,
    ):
        status, _headers, body = ask(world, "/")
    assert (status, server.heads) == (502, [])
    assert b"secure.example" in body


def test_a_companys_authority_is_trusted(watched, monkeypatch, tmp_path):
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    assert ask(watched, "/open/x")[0] == 200


def test_without_an_authority_nothing_is_looked_into(secure):
    with (
        World(["GET https://secure.example/open/*"], {"secure.example": secure}) as world,
        pytest.raises(ssl.SSLError, match=ACCESS_DENIED),
    ):
        world.secure("secure.example:443")
    assert "no authority" in world.denied[0].reason


def test_http_on_a_port_of_its_own_is_looked_into(plain):
    with World(["http://a.example:8080/open/*"], {"a.example": plain}) as world:
        sock, status = world.tunnel("a.example:8080")
        assert status == 200
        sock.sendall(request("/open/x", host="a.example:8080"))
        assert receive(sock)[2] == b"hello"
        sock.sendall(request("/closed", host="a.example:8080"))
        assert receive(sock)[0] == 403


# Addresses


class Names:
    """A resolver that gives one answer after another."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    async def __call__(self, host, port):
        self.asked.append((host, port))
        return self.answers.pop(0)


def test_a_name_is_looked_up_after_the_decision_alone():
    names = Names()
    with World(["a.example"], resolve=names) as world:
        assert world.get("http://b.example/")[0] == 403
        assert world.tunnel("b.example:443")[1] == 403
    assert names.asked == []


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "fd00:ec2::254",
     "100.64.0.1", "0.0.0.1", "224.0.0.1", "64:ff9b::7f00:1", "fe80::1%eth0", "nonsense"],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["a.example", "all"])
def test_name_that_resolves_to_a_non_public_address_is_denied(address, rule):
    with World([rule], resolve=Names([address], [address])) as world:
        assert world.get("http://a.example/")[0] == 403
        assert world.tunnel("a.example:443")[1] == 403
    assert [entry.allowed for entry in world.log.list()] == [False, False]


def test_name_that_later_resolves_to_another_address_is_denied(plain):
    names = Names(["127.0.0.1"], ["127.0.0.2"], ["127.0.0.1"])
    rules = [f"a.example:{plain.port}", f"127.0.0.1:{plain.port}"]
    with World(rules, resolve=names) as world:
        host = f"a.example:{plain.port}"
        assert [world.get(f"http://{host}/")[0] for _ in range(3)] == [200, 403, 200]
    assert names.asked == [("a.example", plain.port)] * 3  # once for each connection, not again to connect
    assert world.denied[0].reason == (
        "a.example resolves to 127.0.0.2, which is loopback, and no rule names that address as well"
    )


def test_allowed_addresses_of_a_name_are_tried_in_turn(plain):
    names = Names(["10.0.0.1", "127.0.0.3", "127.0.0.1"])
    rules = [f"a.example:{plain.port}", f"127.0.0.3:{plain.port}", f"127.0.0.1:{plain.port}"]
    with World(rules, resolve=names) as world:
        assert world.get(f"http://a.example:{plain.port}/")[0] == 200


def test_a_name_that_the_user_leads_somewhere(plain):
    names = Names()
    with World(["a.example"], {"a.example": plain}, resolve=names) as world:
        assert world.get("http://a.example/")[0] == 200
    with World(["a.example", "deny:127.0.0.0/8"], {"a.example": plain}, resolve=names) as world:
        assert world.get("http://a.example/")[0] == 403
        assert world.denied[0].rule == "deny:127.0.0.0/8"
    assert names.asked == []


class Speechless(socketserver.StreamRequestHandler):
    """A server that never answers."""

    def handle(self):
        self.rfile.read()


def test_the_end_comes_in_the_very_moment_of_an_answer():
    """Before Python 3.12 that cancellation is lost, and nobody would end the connection that is made next."""
    ends = []

    async def resolve(_host, _port):
        ends.append(asyncio.ensure_future(world.proxy.close()))
        return ["127.0.0.1"]

    with Server(handler=Speechless) as server:
        host = f"a.example:{server.port}"
        with World([host, f"127.0.0.1:{server.port}"], resolve=resolve) as world:
            client = world.connect()
            client.sendall(f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            client.settimeout(guards.PROCESS)
            assert client.recv(65536) == b""
        assert [end.done() for end in ends] == [True]


def test_a_name_that_does_not_resolve():
    async def fail(_host, _port):
        raise socket.gaierror(-2, "Name or service not known")

    with World(["a.example"], resolve=fail) as world:
        assert world.get("http://a.example/")[0] == 502
    assert world.log.list()[0].reason == "a.example does not resolve"


def test_names_that_never_resolve_keep_no_other_machine_waiting(plain, monkeypatch):
    stuck = threading.Event()

    def look_up(host, *_words, **_keys):
        if host != "a.example":
            stuck.wait(guards.PROCESS)
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    rules = parse_rules([f"a.example:{plain.port}", "127.0.0.1"], "test")
    with World(["*.b.example"]) as world:
        other = Proxy(Access(rules), NetworkLog(), world.meter)  # of another machine, on the same loop
        for number in range(50):
            host = f"n{number}.b.example"
            world.connect().sendall(request(f"http://{host}/", host=host))
        world.wait(asyncio.sleep(0))  # each is with its proxy
        hostile, world.proxy = world.proxy, other
        try:
            assert world.get(f"http://a.example:{plain.port}/")[2] == b"hello"
        finally:
            stuck.set()
            world.proxy = hostile
            world.wait(other.close())


def test_names_that_are_loopback_by_themselves(plain):
    names = Names()
    with World([f"api.localhost:{plain.port}"], resolve=names) as world:
        assert world.get(f"http://api.localhost:{plain.port}/")[0] == 200
        assert world.get(f"http://localhost:{plain.port}/")[0] == 403
    assert names.asked == []


# Quotas, and many at once


def test_bytes_over_the_quota(plain):
    with World(["a.example"], {"a.example": plain}, network_bytes=500_000) as world:
        idle = world.connect()
        sock = world.connect()
        sock.sendall(request("http://a.example/big"))
        with pytest.raises((ConnectionResetError, h11.RemoteProtocolError)):
            receive(sock)
        assert idle.recv(1) == b""
        ((quota, limit, observed),) = world.exceeded
        assert (quota, limit) == ("network_bytes", 500_000)
        assert 500_000 < observed <= 600_000
        assert world.connect().recv(1) == b""


def test_bytes_up_to_the_quota(plain):
    with World(["a.example"], {"a.example": plain}, network_bytes=1_100_000) as world:
        assert len(world.get("http://a.example/big")[2]) == 1_000_000
        assert 1_000_000 < world.meter.moved_bytes < 1_001_000
        assert world.exceeded == []


def test_connections_over_the_quota(plain):
    with World(["a.example"], {"a.example": plain}, connections=2) as world:
        assert [world.get("http://a.example/")[0] for _ in range(2)] == [200, 200]
        sock = world.connect()
        sock.sendall(request("http://a.example/"))
        with pytest.raises((ConnectionResetError, h11.RemoteProtocolError)):
            receive(sock)
        assert world.exceeded == [("connections", 2, 3)]
    assert plain.connections == 2


def test_downloads_are_whole_however_slow(plain):
    with World(["a.example"], {"a.example": plain}, bandwidth=10_000_000) as world:
        with ThreadPoolExecutor(4) as pool:
            bodies = list(pool.map(lambda _: world.get("http://a.example/big")[2], range(4)))
        assert [len(body) for body in bodies] == [1_000_000] * 4


def test_200_downloads_at_once(plain):
    with World(["a.example"], {"a.example": plain}) as world:
        start = threading.Barrier(200)

        def download(_number):
            start.wait(guards.PROCESS)
            return world.get("http://a.example/big")

        with ThreadPoolExecutor(200) as pool:
            results = list(pool.map(download, range(200)))
        assert {(status, len(body)) for status, _headers, body in results} == {(200, 1_000_000)}
        assert (world.log.allowed, world.log.denied) == (200, 0)


def test_more_connections_than_there_may_be(world):
    socks = [world.connect() for _ in range(513)]
    assert socks[-1].recv(1) == b""
    socks[0].sendall(request("http://a.example/"))
    assert receive(socks[0])[0] == 200


@pytest.mark.parametrize("started", [b"", b"GET http://a.ex"])
def test_a_guest_that_says_nothing(world, monkeypatch, started):
    monkeypatch.setattr("pytest_microvm.network.proxy.server.IDLE", 0.05)
    monkeypatch.setattr("pytest_microvm.network.proxy.server.HEAD", 0.05)
    sock = world.connect()
    sock.sendall(started)
    assert sock.recv(1) == b""


def test_the_end_of_a_machine(plain):
    with World(["a.example"], {"a.example": plain}) as world:
        socks = [world.connect() for _ in range(3)]
        socks[0].sendall(request("http://a.example/"))
        assert receive(socks[0])[0] == 200
        world.wait(world.proxy.close())
        assert [sock.recv(1) for sock in [*socks, world.connect()]] == [b""] * 4


def test_the_log_has_no_query_and_no_secret(plain):
    with World(
        ["a.example"], {"a.example": plain}, redact=lambda text: text.replace("hunter2", "***")
    ) as world:
        world.get("http://a.example/hunter2?token=abc")
        world.get("http://hunter2.example/?token=abc")
    shown = json.dumps([str(entry) for entry in world.log.list()]) + repr(world.log.list())
    assert "hunter2" not in shown
    assert "token" not in shown
