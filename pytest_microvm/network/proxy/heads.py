"""Read, validate and parse the head of a guest's request.

A head that two programs could interpret differently is rejected, not repaired; the outgoing head is written
anew from the parsed values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import h11

from pytest_microvm.network.policy.hosts import canonical_host
from pytest_microvm.network.policy.matching import PORTS, SCHEMES
from pytest_microvm.network.policy.rules import Request
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.network.proxy.relaying import ByteStream

MAX_HEAD = 64 * 1024
"""Maximum size of a message's head, in bytes."""

NEVER = frozenset({"TRACE", "TRACK"})
"""Methods that are always refused: their responses echo the request, with its credentials."""

_END = b"\r\n\r\n"
_FIRST = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]")
_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
# Control characters, line ends other than CRLF, and headers folded over several lines.
_UNCLEAR = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|(?<!\r)\n|\n[ \t]")
_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(\?[^#]*)?")
_RELATIVE = re.compile(r"(/[^?#]*)(\?[^#]*)?")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:@\[\]/?#]+)(?::([0-9]{1,5}))?")
_REQUEST_LINE = re.compile(rb"([!-~]{1,40}) (?:[A-Za-z]+://)?([!-~]{0,4096})")

# Headers of one connection (RFC 9110, 7.6.1), and of the framing, which is written anew.
_HOP_BY_HOP = frozenset(
    b"connection proxy-connection keep-alive te trailer transfer-encoding content-length upgrade expect "
    b"http2-settings proxy-authorization proxy-authenticate proxy-authentication-info host".split()
)


@dataclass(frozen=True)
class Origin:
    """A server that requests name.

    Args:
        scheme: ``http`` or ``https``; ``None`` if the protocol is not known.
        host: The canonical host, an address without brackets.
        port: The server's port.
    """

    scheme: str | None
    host: str
    port: int

    @property
    def authority(self) -> str:
        """Host and port in the format of the ``Host`` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if PORTS.get(self.scheme or "") == self.port else f"{host}:{self.port}"


@dataclass(frozen=True)
class RequestHead:
    """A parsed request.

    Args:
        origin: The server.
        method: The method, as the guest wrote it.
        path: The path without the query; empty for ``CONNECT``.
        query: The query with its question mark; empty if there is none.
        headers: The end-to-end headers, which are forwarded.
        length: Bytes of the body; ``None`` for a chunked body.
        websocket: Whether the request asks to switch to a WebSocket.
        persistent: Whether the connection may be used for another request.
    """

    origin: Origin
    method: str
    path: str = ""
    query: str = ""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    length: int | None = 0
    websocket: bool = False
    persistent: bool = False

    @property
    def request(self) -> Request:
        """The request for the policy to decide on."""
        origin = self.origin
        if self.method == "CONNECT":
            return Request(origin.host, origin.port)
        return Request(origin.host, origin.port, origin.scheme, self.method, self.path)

    def outgoing(self) -> h11.Request:
        """Return the request to send to the server."""
        headers = [(b"Host", self.origin.authority.encode("ascii")), *self.headers]
        if self.websocket:
            headers += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
        if self.length is None:
            headers.append((b"Transfer-Encoding", b"chunked"))
        elif self.length or self.method in ("POST", "PUT", "PATCH"):
            headers.append((b"Content-Length", b"%d" % self.length))
        if self.length != 0:
            # A server that does not read the body would take it for the next request, which the policy has
            # not checked, or take the next request for the rest of one that a guest began in the body.
            headers.append((b"Connection", b"close"))
        return h11.Request(method=self.method, target=self.path + self.query, headers=headers)


async def read_head(stream: ByteStream) -> bytes | None:
    """Read the next head, with the empty line at its end; return ``None`` at the end of the stream.

    Raises:
        Refused: The bytes are no head, or it is too long.
    """
    data = bytearray()
    while piece := await stream.read():
        searched = max(0, len(data) - len(_END))
        data += piece
        end = data.find(_END, searched)
        if end >= 0:
            stream.unread(bytes(data[end + len(_END) :]))
            del data[end + len(_END) :]
        if len(data) > MAX_HEAD:
            raise Refused(431, f"malformed request: its head is longer than {MAX_HEAD} bytes")
        if end >= 0:
            return bytes(data)
        if not _FIRST.match(data) or _BARE_LINE_FEED.search(data, searched):
            raise _malformed("this is not HTTP/1.1")
    if data:
        raise _malformed("it ends in its head")
    return None


def parse_head(raw: bytes, fixed: Origin | None = None) -> tuple[RequestHead, h11.Connection]:
    """Parse a head; return the request, and the HTTP state to read its body and write its response.

    Args:
        raw: The head.
        fixed: The server, if it was chosen before (inside a tunnel).

    Raises:
        Refused: The head is malformed or ambiguous.
    """
    if _UNCLEAR.search(raw):
        raise _malformed("it has control characters, bare line ends or folded headers")
    connection = h11.Connection(h11.SERVER, MAX_HEAD)
    connection.receive_data(raw)
    try:
        head = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise Refused(error.error_status_hint, f"malformed request: {in_short(error)}") from None
    if not isinstance(head, h11.Request) or head.http_version not in (b"1.0", b"1.1"):
        raise Refused(505, "malformed request: this is not HTTP/1.0 or HTTP/1.1")
    return _asked(head, fixed), connection


def attempted(raw: bytes) -> tuple[str, str]:
    """Return the apparent method and host of a malformed head, for the log."""
    found = _REQUEST_LINE.match(raw)
    if not found:
        return "?", ""
    authority = re.split(rb"[/?# ]", found[2], maxsplit=1)[0].rpartition(b"@")[2]
    return found[1].decode("ascii"), authority.decode("ascii")


def in_short(error: h11.RemoteProtocolError) -> str:
    """Return an error's message without the offending bytes, which may contain secrets."""
    return str(error).partition(": b")[0]


def kept(headers: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers to forward: without those of a single connection and of the framing."""
    headers = tuple(headers)
    named = set(_HOP_BY_HOP)
    for name, value in headers:
        if name.lower() == b"connection":
            named |= {token.strip() for token in value.lower().split(b",")}
    return tuple((name, value) for name, value in headers if name.lower() not in named)


def _asked(head: h11.Request, fixed: Origin | None) -> RequestHead:
    method = head.method.decode("ascii")
    if method in NEVER or (method == "CONNECT" and fixed):
        raise Refused(405, f"{method} is not passed on")
    if method == "CONNECT":
        asked = RequestHead(_tunnel(head.target.decode("ascii")), method)
    else:
        asked = replace(_target(head.target.decode("ascii"), fixed), method=method)
    fields = _fields(head)
    _check_host(fields.get(b"host"), asked)
    length = _length(fields, head.http_version)
    if method == "CONNECT" and length != 0:
        raise _malformed("a tunnel has no body")
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise Refused(417, "malformed request: only 100-continue can be expected")
    connection = {token.strip() for token in fields.get(b"connection", b"").lower().split(b",")}
    return replace(
        asked,
        headers=kept(head.headers.raw_items()),
        length=length,
        websocket=(
            (method, length) == ("GET", 0)
            and b"upgrade" in connection
            and fields.get(b"upgrade", b"").lower() == b"websocket"
        ),
        persistent=head.http_version == b"1.1" and b"close" not in connection,
    )


def _fields(head: h11.Request) -> dict[bytes, bytes]:
    """Return the headers by name, with repeated ones joined by commas."""
    fields: dict[bytes, bytes] = {}
    for name, value in head.headers:
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


def _length(fields: dict[bytes, bytes], version: bytes) -> int | None:
    chunked = b"transfer-encoding" in fields
    if chunked and (b"content-length" in fields or version == b"1.0"):
        raise _malformed("its length is given in two ways")
    return None if chunked else int(fields.get(b"content-length", b"0"))


def _target(target: str, fixed: Origin | None) -> RequestHead:
    if fixed is not None:
        found = _RELATIVE.fullmatch(target)
        if not found:
            raise _malformed("inside of a tunnel the target must be a path")
        return RequestHead(fixed, "", found[1], found[2] or "")
    found = _ABSOLUTE.fullmatch(target)
    if not found:
        raise _malformed("the target must be a whole URL: this is a proxy")
    scheme = SCHEMES.get(found[1].lower())
    if scheme != "http":
        raise _malformed(f"{found[1][:10]} is not spoken here; https needs CONNECT")
    host, port = split_host(found[2])
    return RequestHead(
        Origin(scheme, host, PORTS[scheme] if port is None else port), "", found[3] or "/", found[4] or ""
    )


def _tunnel(target: str) -> Origin:
    host, port = split_host(target)
    if port is None:
        raise _malformed("the target of CONNECT must be host:port")
    return Origin(None, host, port)


def _check_host(value: bytes | None, asked: RequestHead) -> None:
    """Reject a ``Host`` header that names another server than the target does."""
    if value is None:
        return  # HTTP/1.0
    try:
        host, port = split_host(value.decode("ascii"))
    except UnicodeDecodeError:
        raise _malformed("its Host header is no host") from None
    origin = asked.origin
    default = origin.port if origin.scheme is None else PORTS[origin.scheme]
    if (host, default if port is None else port) != (origin.host, origin.port):
        raise _malformed(f"its Host header ({host}) is not the host it asks for ({origin.host})")


def split_host(text: str) -> tuple[str, int | None]:
    """Split ``host`` or ``host:port`` into the canonical host and the port.

    Raises:
        Refused: ``text`` is neither.
    """
    if "@" in text:
        raise _malformed("there is a user or password in the target")
    found = _AUTHORITY.fullmatch(text)
    if not found:
        raise _malformed("there is no host, or no port, that could be asked for")
    port = None if found[2] is None else int(found[2])
    if port is not None and not 1 <= port <= 65535:  # noqa: PLR2004 - the range of ports
        raise _malformed("there is no such port")
    try:
        return canonical_host(found[1]), port
    except ValueError as error:
        raise _malformed(f"its host cannot be asked for: {error}") from None


def _malformed(why: str) -> Refused:
    return Refused(400, f"malformed request: {why}")
