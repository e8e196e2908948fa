"""Servers that remember what reached them, and a guest whose connections a policy proxy serves."""

import asyncio
import contextlib
import socket
import socketserver
import ssl
import threading
from hashlib import sha1

import h11
import trustme

from pytest_microvm.network.policy.rules import parse_rules
from pytest_microvm.network.proxy.access import Access
from pytest_microvm.network.proxy.log import NetworkLog
from pytest_microvm.network.proxy.meter import Meter
from pytest_microvm.network.proxy.server import Proxy
from support import guards

PUBLIC = trustme.CA()
"""The certificate authority of the servers here."""


class Server(socketserver.ThreadingTCPServer):
    """An HTTP/1.1 server on loopback that keeps what reached it.

    Each test has its own: what one test's client began may reach a server when the test is long over.

    Args:
        names: Those of its certificate; without any it speaks no TLS.
        handler: Serves a connection; by default HTTP, where the path names the kind of answer (``do_...``).

    Attributes:
        heads: The heads of all requests, in bytes.
        bodies: The bodies of all requests, in bytes.
        connections: How many clients connected.
        port: Its port on 127.0.0.1.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, *names, handler=None):
        super().__init__(("127.0.0.1", 0), handler or _Handler)
        self.heads = []
        self.bodies = []
        self.connections = 0
        self.go_on, self.gone_on = threading.Event(), threading.Event()
        self.port = self.server_address[1]
        self.tls = None
        if names:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            PUBLIC.issue_cert(*names).configure_cert(self.tls)

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, args=(0.002,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self._thread.join()
        self.server_close()

    def finish_request(self, request, client_address):
        """Serve one connection, over TLS if the server has a certificate."""
        self.connections += 1
        with contextlib.suppress(OSError):
            request.settimeout(guards.PROCESS)
            if self.tls:
                request = self.tls.wrap_socket(request, server_side=True)
            with request:
                super().finish_request(request, client_address)

    def handle_error(self, *_):
        """Ignore it: a client that goes away is no error."""


class _Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while head := self._head():
            self.server.heads.append(head)
            self.server.bodies.append(self._body(head))
            _method, target, _version = head.split(b"\r\n")[0].split(b" ")
            name = target.decode().partition("?")[0].strip("/").replace("-", "_") or "index"
            ended = getattr(self, f"do_{name}", self.do_index)(head) == "close"
            if ended or headers_of(head).get("connection") == "close":
                return

    def _head(self):
        lines = []
        while (line := self.rfile.readline(70000)) not in (b"\r\n", b""):
            lines.append(line)
        return b"".join(lines)

    def _body(self, head):
        fields = headers_of(head)
        if fields.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        if head.split(b" ")[1] in (b"/early", b"/no-body"):  # it is not read
            return b""
        return self.rfile.read(int(fields.get("content-length", 0)))

    def answer(self, body, *lines, status="200 OK"):
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *lines, "", ""]
        self.wfile.write("\r\n".join(head).encode("latin-1") + body)

    def do_index(self, _head):
        self.answer(b"hello")

    def do_head_echo(self, head):
        value = headers_of(head).get("authorization", "")
        self.answer(head, f"X-Echo: {value}", *headers_of(head).get("x-as-header", "").split())

    def do_body_echo(self, _head):
        self.answer(self.server.bodies[-1])

    def do_chunks(self, _head):
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Hop: 1\r\nConnection: X-Hop\r\n\r\n"
        )
        for piece in (b"one ", b"two ", b"three"):
            self.wfile.write(b"%x;ext=1\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\nX-Trailer: 1\r\n\r\n")

    def do_until_closed(self, _head):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
        return "close"

    def do_big(self, _head):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        for _ in range(100):
            self.wfile.write(b"x" * 10000)

    def do_cut(self, _head):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")
        return "close"

    def do_silence(self, _head):
        return "close"

    def do_nonsense(self, _head):
        self.wfile.write(b"SSH-2.0-server\r\n\r\n")
        return "close"

    def do_two_responses(self, _head):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" * 2)

    def do_late_response(self, _head):
        """Send a second response once the test has got the first one, and wait until it is under way."""
        self.answer(b"ok")
        self.server.go_on.wait(guards.PROCESS)
        self.answer(b"not asked for")
        self.server.gone_on.set()

    def do_early(self, _head):
        self.answer(b"no need for the body", "Connection: close")
        return "close"

    def do_early_hints(self, _head):
        self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        self.answer(b"after hints")

    def do_gzip(self, _head):
        self.answer(b"\x1f\x8b...", "Content-Encoding: gzip")

    def do_redirect(self, head):
        self.answer(b"", f"Location: {head.split(b' ')[1].decode().partition('?to=')[2]}", status="302 Found")

    def do_forced_switch(self, _head):
        self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: raw\r\nConnection: Upgrade\r\n\r\n")
        return "close"

    def do_socket(self, head):
        """A WebSocket that sends back what it gets, byte by byte of its frames, and first a header."""
        first = headers_of(head).get("authorization", "none").encode() + b"\n"
        return self._socket(head, b"\x81" + bytes([len(first)]) + first)

    def do_quiet_socket(self, head):
        """Speak first never, and send back what comes."""
        return self._socket(head, b"")

    def _socket(self, head, first):
        key = headers_of(head)["sec-websocket-key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.wfile.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            + (b"Sec-WebSocket-Extensions: x-any\r\n" if b"deflate" in head.lower() else b"")
            + b"Sec-WebSocket-Accept: "
            + sha1(key).hexdigest().encode()  # noqa: S324 - WebSocket's own
            + b"\r\n\r\n"
        )
        self.wfile.write(first)
        while data := self.request.recv(4096):
            self.wfile.write(data)
        return "close"


class Speaker(socketserver.StreamRequestHandler):
    """A server that speaks first, as those of mail do, and says back what it is told until the end."""

    def handle(self):
        """Greet, hear the client to its end, and say its words back."""
        self.wfile.write(b"220 welcome\r\n")
        told = self.rfile.read()
        self.wfile.write(b"you said " + told)


class Silent(socketserver.StreamRequestHandler):
    """A server that ends its own direction at once, and hears the other one to its end."""

    def handle(self):
        """Send the end at once, and read until the client's."""
        self.request.shutdown(socket.SHUT_WR)
        self.rfile.read()


def headers_of(head):
    """Return the headers of a message's head (bytes), by lower-case name."""
    pairs = (line.split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    return {name.decode().lower(): value.strip().decode("latin-1") for name, value in pairs}


class World:
    """A guest and its policy proxy, while the context is entered.

    Args:
        rules: What the guest may reach, as network rules.
        servers: A server, or a port of this computer, for each name.
        credentials: What the proxy adds to requests.
        authority: Issues the certificates for requests that are inspected; ``None``: none is.
        resolve: Looks names up in place of the resolver of this computer.
        redact: Makes text safe for the log.
        quotas: Of the :class:`pytest_microvm.network.proxy.meter.Meter`.

    Attributes:
        log: What was allowed and denied.
        exceeded: The quotas that were exceeded.
    """

    def __init__(
        self,
        rules,
        servers=None,
        *,
        credentials=(),
        authority=None,
        resolve=None,
        redact=str,
        **quotas,
    ):
        self.log = NetworkLog()
        self.exceeded = []
        hosts = {
            name: ("127.0.0.1", getattr(server, "port", server)) for name, server in (servers or {}).items()
        }
        quotas = {"network_bytes": None, "connections": None, "bandwidth": None} | quotas
        self.meter = Meter(**quotas, exceed=lambda *told: self.exceeded.append(told))
        access = Access(parse_rules(rules, "test"), tuple(credentials), authority, hosts)
        self.authority = authority
        self.proxy = Proxy(access, self.log, self.meter, resolve=resolve, redact=redact)
        self.errors = []
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _loop, context: self.errors.append(context))
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._sockets = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        for sock in self._sockets:
            sock.close()
        self.wait(self.proxy.close())
        self.wait(self._settled())
        self.wait(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        assert not self.errors, self.errors

    def wait(self, coroutine):
        """Run a coroutine on the loop of the proxy and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(guards.PROCESS)

    async def _settled(self):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=guards.PROCESS)

    def connect(self):
        """Return a new connection of the guest to its proxy."""
        ours, theirs = socket.socketpair()
        ours.settimeout(guards.PROCESS)
        self._sockets.append(ours)
        self.served = asyncio.run_coroutine_threadsafe(self._serve(theirs), self._loop)
        return ours

    async def _serve(self, sock):
        await self.proxy.serve(*await asyncio.open_connection(sock=sock))

    def send(self, raw):
        """Send bytes over a connection of their own; return the status, headers and body that come back."""
        sock = self.connect()
        sock.sendall(raw)
        return receive(sock)

    def get(self, url, *headers, method="GET", body=b""):
        """Ask as clients of proxies do, over a connection of its own."""
        host = url.split("/")[2]
        lines = [f"{method} {url} HTTP/1.1", f"Host: {host}", "Connection: close", *headers, "", ""]
        with self.connect() as sock:
            sock.sendall("\r\n".join(lines).encode("latin-1") + body)
            return receive(sock, method)

    def tunnel(self, target):
        """Return a connection after CONNECT, and the status that came."""
        sock = self.connect()
        sock.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            piece = sock.recv(1)
            if not piece:
                break
            head += piece
        return sock, int(head.split(b" ")[1])

    def secure(self, target, *, name=None, trusted=None):
        """Return TLS through a tunnel; ``name`` is whom it asks for and expects, as a rule the target."""
        sock, status = self.tunnel(target)
        assert status == 200
        context = ssl.create_default_context(cadata=trusted or PUBLIC.cert_pem.bytes().decode())
        tls = context.wrap_socket(sock, server_hostname=name or target.rpartition(":")[0])
        self._sockets.append(tls)
        return tls

    @property
    def denied(self):
        """The entries of the log whose request was denied."""
        return [entry for entry in self.log.list() if not entry.allowed]


def receive(sock, method="GET"):
    """Return the status, headers and body of one response."""
    http = h11.Connection(h11.CLIENT)
    http.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    if method != "CONNECT":
        http.send(h11.EndOfMessage())
    response, body = None, b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(sock.recv(65536))
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)) or event is h11.PAUSED:
            assert response is not None, "no response came"
            return response.status_code, {k.decode(): v.decode() for k, v in response.headers}, body


def request(target, *headers, method="GET", host="a.example"):
    """Return a request's head."""
    return "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode("latin-1")


def client_hello(name):
    """Return what a client of today begins with."""
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def in_records(hello, size):
    """Return the same hello in records of ``size`` bytes."""
    pieces = [hello[start : start + size] for start in range(5, len(hello), size)]
    return b"".join(hello[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)
