"""Ways out that a hostile guest tries at its proxy: each is refused and written down, and reaches nobody."""

import socket

import pytest

from support.network import PUBLIC, Server, World, client_hello, in_records, receive, request


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def secure():
    with Server("a.example", "evil.example") as server:
        yield server


@pytest.fixture(autouse=True)
def _trust(monkeypatch, tmp_path):
    PUBLIC.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))


@pytest.fixture
def world(server):
    """May reach one name; the others lead to the same server, so nothing but the policy is in the way."""
    with World(["a.example"], dict.fromkeys(["a.example", "evil.example"], server)) as world:
        yield world


URL = "http://a.example/"
ATTACKS = {
    "another host": request("http://evil.example/", host="evil.example"),
    "another host, the allowed one in Host": request("http://evil.example/"),
    "another host in Host": request(URL, host="evil.example"),
    "another port in Host": request(URL, host="a.example:8080"),
    "no Host": b"GET http://a.example/ HTTP/1.1\r\n\r\n",
    "an empty Host": request(URL, host=""),
    "two hosts": request(URL, "Host: evil.example"),
    "two hosts, spelt differently": request(URL, "hOsT: a.example"),
    "two hosts in one header": request(URL, host="a.example, evil.example"),
    "a space before the colon": request(URL, "Host : evil.example"),
    "a folded header": request(URL, "X-A: 1\r\n Host: evil.example"),
    "a folded first header": b"GET http://a.example/ HTTP/1.1\r\n X: 1\r\nHost: a.example\r\n\r\n",
    "a host of its own below the allowed one": request("http://a.example.evil.example/", host="a.example"),
    "below the allowed host": request("http://x.a.example/", host="x.a.example"),
    "a user": request("http://a.example@evil.example/"),
    "a user on the allowed host": request("http://user:password@a.example/"),
    "a user that looks like a port": request("http://a.example:80@evil.example/"),
    "a backslash": request("http://a.example\\@evil.example/"),
    "a fragment": request("http://a.example#@evil.example/"),
    "an escaped host": request("http://%61.example/"),
    "an escaped slash in the host": request("http://a.example%2f@evil.example/"),
    "a comma in the host": request("http://a.example,evil.example/"),
    "letters outside of ASCII": request("http://\uff41.example/".encode().decode("latin-1")),
    "a zone": request("http://[fe80::1%25eth0]/", host="[fe80::1%25eth0]"),
    "no port after the colon": request("http://a.example:/"),
    "port 0": request("http://a.example:0/", host="a.example:0"),
    "a port too large": request("http://a.example:65616/", host="a.example:65616"),
    "another port": request("http://a.example:8080/", host="a.example:8080"),
    "TLS's port without TLS": request("http://a.example:443/", host="a.example:443"),
    "https without a tunnel": request("https://a.example/"),
    "ftp": request("ftp://a.example/"),
    "file": request("file:///etc/passwd", host=""),
    "a path alone": request("/"),
    "a path with a host": request("//a.example/"),
    "an asterisk": request("*", method="OPTIONS"),
    "an empty authority": request("http:///", host=""),
    "both lengths": request(URL, "Content-Length: 4", "Transfer-Encoding: chunked", method="POST")
    + b"0\r\n\r\n",
    "two lengths": request(URL, "Content-Length: 4", "Content-Length: 5", method="POST") + b"12345",
    "a list of lengths": request(URL, "Content-Length: 4, 5", method="POST") + b"12345",
    "a negative length": request(URL, "Content-Length: -1", method="POST"),
    "a signed length": request(URL, "Content-Length: +4", method="POST") + b"1234",
    "chunked twice": request(URL, "Transfer-Encoding: chunked, chunked", method="POST") + b"0\r\n\r\n",
    "chunked in two headers": request(
        URL, "Transfer-Encoding: chunked", "Transfer-Encoding: identity", method="POST"
    ),
    "nearly chunked": request(URL, "Transfer-Encoding: xchunked", method="POST") + b"0\r\n\r\n",
    "chunked with a vertical tab": request(URL, "Transfer-Encoding: \x0bchunked", method="POST"),
    "chunked in HTTP/1.0": b"POST http://a.example/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "line feeds alone": b"GET http://a.example/ HTTP/1.1\nHost: a.example\n\n",
    "one line feed alone": b"GET http://a.example/ HTTP/1.1\r\nHost: a.example\nX: 1\r\n\r\n",
    "a carriage return alone": request(URL, "X: 1\rHost: evil.example"),
    "a NUL": request(URL, "X: 1\x002"),
    "a control character": request(URL, "X: 1\x1b[2J"),
    "no colon": request(URL, "Host evil.example"),
    "a space in the target": request("http://a.example/ HTTP/1.1\r\nHost: evil.example\r\nX:"),
    "a tab in the request's line": b"GET\thttp://a.example/\tHTTP/1.1\r\nHost: a.example\r\n\r\n",
    "a line before the request": b"\r\n" + request(URL),
    "HTTP/0.9": b"GET http://a.example/\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": request(URL).replace(b"HTTP/1.1", b"HTTP/1.2"),
    "no method": b" http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "TRACE": request(URL, method="TRACE"),
    "TRACK": request(URL, method="TRACK"),
    "a method in lower case": request("evil.example:443", method="connect"),
    "an expectation": request(URL, "Expect: 200-ok"),
    "a head without end": request(URL, "X: " + "a" * 70000),
    "a thousand headers": request(URL, *[f"X-{number}: {'a' * 100}" for number in range(1000)]),
    "not HTTP at all": b"\x05\x01\x00" + b"\r\n" * 3,
    "SMTP": b"EHLO a.example\r\nMAIL FROM: <a>\r\n\r\n",
    "this computer": request("http://127.0.0.1/", host="127.0.0.1"),
    "this computer as a number": request("http://2130706433/", host="2130706433"),
    "this computer in hexadecimal": request("http://0x7f.1/", host="0x7f.1"),
    "this computer in IPv6": request("http://[::1]/", host="[::1]"),
    "this computer in two protocols": request("http://[::ffff:127.0.0.1]/", host="[::ffff:127.0.0.1]"),
    "this computer's name": request("http://localhost/", host="localhost"),
    "the metadata service": request("http://169.254.169.254/latest/meta-data/", host="169.254.169.254"),
    "nowhere": request("http://0.0.0.0/", host="0.0.0.0"),  # noqa: S104
    "a tunnel to another host": request("evil.example:443", method="CONNECT", host="evil.example:443"),
    "a tunnel to another port": request("a.example:22", method="CONNECT", host="a.example:22"),
    "a tunnel to this computer": request("127.0.0.1:443", method="CONNECT", host="127.0.0.1:443"),
    "a tunnel with another Host": request("a.example:443", method="CONNECT", host="evil.example:443"),
    "a tunnel with a user": request("user@a.example:443", method="CONNECT", host="a.example"),
    "a tunnel without a port": request("a.example", method="CONNECT"),
    "a tunnel with a body": request("a.example:443", "Content-Length: 5", method="CONNECT") + b"hello",
    "a tunnel by URL": request("https://a.example/", method="CONNECT"),
}


@pytest.mark.parametrize("raw", ATTACKS.values(), ids=ATTACKS)
def test_it_is_refused(world, server, raw):
    status, headers, _body = world.send(raw)
    assert status in {400, 403, 405, 417, 431, 501, 505}
    (entry,) = world.log.list()
    assert (entry.allowed, entry.status) == (False, status)
    assert entry.reason.isprintable()
    assert headers["x-microvm-denied"]
    assert (server.connections, server.heads) == (0, [])


ALLOWED = {
    "as clients ask": request(URL),
    "in capitals": request("HTTP://A.Example/", host="a.EXAMPLE"),
    "with a dot at the end": request("http://a.example./", host="a.example"),
    "with the port": request("http://a.example:80/"),
    "with the port in Host": request(URL, host="a.example:80"),
    "without a path": request("http://a.example"),
    "HTTP/1.0": b"GET http://a.example/ HTTP/1.0\r\n\r\n",
    "HTTP/1.0 with Host": b"GET http://a.example/ HTTP/1.0\r\nHost: a.example\r\n\r\n",
    "WebSocket's scheme": request("ws://a.example/"),
    "a body": request(URL, "Content-Length: 4", method="POST") + b"1234",
    "a body twice as long": request(URL, "Content-Length: 4", "Content-Length: 4", method="POST") + b"1234",
    "a body in chunks": request(URL, "Transfer-Encoding: CHUNKED", method="POST")
    + b"2\r\n12\r\n0\r\nX: 1\r\n\r\n",
    "a method nobody knows": request(URL, method="BREW"),
    "a large head": request(URL, "X: " + "a" * 60000),
}


@pytest.mark.parametrize("raw", ALLOWED.values(), ids=ALLOWED)
def test_its_counterpart_is_not(world, server, raw):
    assert world.send(raw)[::2] == (200, b"hello")
    (head,) = server.heads
    assert head.split(b"\r\n")[0].split(b" ")[1:] == [b"/", b"HTTP/1.1"]
    assert head.split(b"\r\n")[1] == b"Host: a.example"
    assert world.denied == []


@pytest.mark.parametrize("raw", [request(URL), ATTACKS["another host"]], ids=["allowed", "denied"])
def test_a_head_byte_by_byte(world, raw):
    sock = world.connect()
    for byte in raw:
        sock.send(bytes([byte]))
    assert receive(sock)[0] == (200 if raw == request(URL) else 403)


def test_headers_of_one_connection_stay_there(world, server):
    world.get(
        URL,
        "Proxy-Authorization: Basic YTpi",
        "Proxy-Connection: keep-alive",
        "Keep-Alive: timeout=5",
        "TE: trailers",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        "Connection: X-Mine, Upgrade, HTTP2-Settings, Host",
        "X-Mine: 1",
        "X-Other: 2",
    )
    assert server.heads == [b"GET / HTTP/1.1\r\nHost: a.example\r\nX-Other: 2\r\n"]


def test_a_request_hidden_behind_another(world, server):
    hidden = request("http://evil.example/", host="evil.example")
    sock = world.connect()
    sock.sendall(request(URL) + hidden + request(URL))
    first, second, *others = b"".join(iter(lambda: sock.recv(65536), b"")).split(b"HTTP/1.1 ")[1:]
    assert (first[:3], second[:3], others) == (b"200", b"403", [])  # what follows a refusal is not read
    assert len(server.heads) == 1
    assert [entry.allowed for entry in world.log.list()] == [True, False]


def test_a_request_hidden_in_a_body(world, server):
    hidden = request("http://evil.example/", host="evil.example")
    sock = world.connect()
    sock.sendall(request(URL, f"Content-Length: {len(hidden)}", "Connection: close", method="POST") + hidden)
    assert receive(sock)[0] == 200
    assert sock.recv(1) == b""
    assert (len(server.heads), server.bodies[-1]) == (1, hidden)
    assert len(world.log.list()) == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("rest", ["\r\n", "X-Rest: "], ids=["whole", "begun"])
def test_request_hidden_in_an_unread_body_is_not_served(world, server, method, rest):
    hidden = f"GET /hidden HTTP/1.1\r\nHost: a.example\r\n{rest}".encode()
    sock = world.connect()
    sock.sendall(
        request("http://a.example/no-body", f"Content-Length: {len(hidden)}", method=method) + hidden
    )
    assert receive(sock)[2] == b"hello"
    sock.sendall(request(URL))
    assert receive(sock)[2] == b"hello"
    assert [head.split(b" ")[1] for head in server.heads] == [b"/no-body", b"/"]
    assert server.connections == 2


@pytest.mark.parametrize("chunk", [b"-1\r\n", b"1\r\nab\r\n", b"zz\r\n", b"0" * 30 + b"\r\n"])
def test_a_chunk_that_is_none(world, chunk):
    status, _headers, _body = world.send(
        request(URL, "Transfer-Encoding: chunked", method="POST") + chunk + b"\r\n"
    )
    assert status == 400


@pytest.fixture
def tunnels(secure):
    with World(["a.example"], dict.fromkeys(["a.example", "evil.example"], secure)) as world:
        yield world


def test_a_tunnel_as_it_should_be(tunnels):
    with tunnels.secure("a.example:443") as tls:
        tls.sendall(request("/", host="a.example"))
        assert receive(tls)[2] == b"hello"


HELLO = client_hello("a.example")
TWO_NAMES = HELLO.replace(b"\0\x0e\0\x0c\0\0\x09a.example", b"\0\x0e\0\x0c\0\0\x02ab\0\0\x04cdef")
FIRST_BYTES = {
    "another name": client_hello("evil.example"),
    "another name, in small records": in_records(client_hello("evil.example"), 5),
    "a longer name": client_hello("a.example.evil.example"),
    "a shorter name": client_hello("example"),
    "no name": client_hello(None),
    "two names": TWO_NAMES,
    "a name with a dot at the end": HELLO.replace(b"a.example", b".example."),
    "a name with a NUL": HELLO.replace(b"a.example", b"a.exampl\0"),
    "no hello but another message": HELLO[:5] + b"\x02" + HELLO[6:],
    "an alert": b"\x15\x03\x01\x00\x02\x02\x31",
    "SSL 2": b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(40),
    "an empty record": b"\x16\x03\x01\x00\x00" + HELLO,
    "records without end": b"\x16\x03\x01\x00\x01\x01" + b"\x16\x03\x01\x00\x01\xff" * 7000,
    "HTTP": request("/"),
    "HTTP to another host": request("/", host="evil.example"),
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
}


@pytest.mark.parametrize("first", FIRST_BYTES.values(), ids=FIRST_BYTES)
def test_a_tunnel_that_is_used_for_something_else(tunnels, secure, first):
    sock, status = tunnels.tunnel("a.example:443")
    assert status == 200
    sock.sendall(first)
    told = b"".join(iter(lambda: sock.recv(65536), b""))
    assert told.startswith((b"\x15\x03\x03\x00\x02\x02", b"HTTP/1.1 403"))
    assert secure.heads == []
    allowed, denied = tunnels.log.list()
    assert (allowed.allowed, allowed.sent_bytes) == (True, 0)
    assert (denied.allowed, denied.method, denied.host) == (False, "CONNECT", "a.example")


def test_the_two_names_are_two():
    assert len(TWO_NAMES) == len(HELLO)
    assert TWO_NAMES != HELLO


def test_tls_where_http_belongs(tunnels, secure):
    sock, status = tunnels.tunnel("a.example:80")
    assert status == 200
    sock.sendall(HELLO)
    assert receive(sock)[0] == 400
    assert secure.connections == 0


def test_http_in_a_tunnel_is_decided_like_other_http(world, server):
    sock, status = world.tunnel("a.example:80")
    assert status == 200
    sock.sendall(request("/"))
    assert receive(sock)[2] == b"hello"
    sock.sendall(request("/", host="evil.example"))
    assert receive(sock)[0] == 400
    sock, _status = world.tunnel("a.example:80")
    sock.sendall(request("http://evil.example/", host="evil.example"))
    assert receive(sock)[0] == 400
    assert len(server.heads) == 1
    assert [(entry.allowed, entry.method) for entry in world.log.list()] == [
        (True, "GET"),
        (False, "GET"),
        (False, "GET"),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_hello_in_pieces(tunnels, size):
    sock, _status = tunnels.tunnel("a.example:443")
    hello = in_records(HELLO, size)
    for start in range(0, len(hello), size):
        sock.send(hello[start : start + size])
    assert sock.recv(1) == b"\x16"  # the server's hello


def test_a_hello_that_ends_too_early(tunnels):
    sock, _status = tunnels.tunnel("a.example:443")
    sock.sendall(HELLO[:10])
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(100).startswith(b"\x15\x03\x03")
