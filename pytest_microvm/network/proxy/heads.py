"""The head of a guest's request: read, judged, and what it asks for.

What two programs could understand differently is refused, not repaired, and what goes out is written anew
from what was understood here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import h11

from pytest_microvm.network.policy.hosts import canonical_host
from pytest_microvm.network.policy.rules import Request
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.network.proxy.relaying import Stream

MAX_HEAD = 64 * 1024
"""The longest head of a message, in bytes."""

NEVER = frozenset({"TRACE", "TRACK"})
"""Methods that no rule allows: they give back what a request had in it."""

PORTS = {"http": 80, "https": 443}
_SCHEMES = {"http": "http", "ws": "http", "https": "https", "wss": "https"}

_END = b"\r\n\r\n"
_FIRST = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]")
_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
# Controls, line ends that are not CRLF, and headers folded over several lines.
_UNCLEAR = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|(?<!\r)\n|\n[ \t]")
_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(\?[^#]*)?")
_RELATIVE = re.compile(r"(/[^?#]*)(\?[^#]*)?")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:@\[\]/?#]+)(?::([0-9]{1,5}))?")
_REQUEST_LINE = re.compile(rb"([!-~]{1,40}) (?:[A-Za-z]+://)?([!-~]{0,4096})")

# Of one connection and not of the request (RFC 9110, 7.6.1), or about the framing, which is written anew.
_HOP_BY_HOP = frozenset(
    b"connection proxy-connection keep-alive te trailer transfer-encoding content-length upgrade expect "
    b"http2-settings proxy-authorization proxy-authenticate proxy-authentication-info host".split()
)


@dataclass(frozen=True)
class Origin:
    """A server as it is named in requests.

    Args:
        scheme: ``http`` or ``https``; ``None``: it is not known what will be spoken.
        host: In its one spelling, an address without brackets.
        port: Its port.
    """

    scheme: str | None
    host: str
    port: int

    @property
    def authority(self) -> str:
        """Host and port as the ``Host`` header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if PORTS.get(self.scheme or "") == self.port else f"{host}:{self.port}"


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Args:
        origin: The server.
        method: As it was written.
        path: Without the query; empty for ``CONNECT``.
        query: With its question mark; empty if there is none.
        headers: Those that are the request's own and go out.
        length: Bytes of the body; ``None``: it comes in chunks.
        websocket: It asks to go on as a WebSocket.
        persistent: The connection may be used for another request.
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
        """What the policy is asked."""
        origin = self.origin
        if self.method == "CONNECT":
            return Request(origin.host, origin.port)
        return Request(origin.host, origin.port, origin.scheme, self.method, self.path)

    def outgoing(self) -> h11.Request:
        """Return the request as the server gets it."""
        headers = [(b"Host", self.origin.authority.encode("ascii")), *self.headers]
        if self.websocket:
            headers += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
        if self.length is None:
            headers.append((b"Transfer-Encoding", b"chunked"))
        elif self.length or self.method in ("POST", "PUT", "PATCH"):
            headers.append((b"Content-Length", b"%d" % self.length))
        if self.length != 0:
            # A server that does not read a body would take it for the next request, one that nobody decided
            # upon, or the next request for the rest of one that a guest began there.
            headers.append((b"Connection", b"close"))
        return h11.Request(method=self.method, target=self.path + self.query, headers=headers)


async def read_head(stream: Stream) -> bytes | None:
    """Return the next head, with the empty line at its end; ``None`` if there is none any more.

    Raises:
        Refused: What comes is no head, or is too long.
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


def parse_head(raw: bytes, fixed: Origin | None = None) -> tuple[Asked, h11.Connection]:
    """Return what a head asks for, and the connection that will read its body and write its response.

    Args:
        raw: The head.
        fixed: The server, where it was chosen before (inside of a tunnel).

    Raises:
        Refused: It is malformed, or could be understood in more than one way.
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
    """Return the method and host that a head seems to ask for, for the log of what was refused unread."""
    found = _REQUEST_LINE.match(raw)
    if not found:
        return "?", ""
    authority = re.split(rb"[/?# ]", found[2], maxsplit=1)[0].rpartition(b"@")[2]
    return found[1].decode("ascii"), authority.decode("ascii")


def in_short(error: h11.RemoteProtocolError) -> str:
    """Return what is wrong, without the bytes that are: they may be anybody's secret."""
    return str(error).partition(": b")[0]


def kept(headers: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers that are passed on: neither of one connection alone, nor about framing."""
    headers = tuple(headers)
    named = set(_HOP_BY_HOP)
    for name, value in headers:
        if name.lower() == b"connection":
            named |= {token.strip() for token in value.lower().split(b",")}
    return tuple((name, value) for name, value in headers if name.lower() not in named)


def _asked(head: h11.Request, fixed: Origin | None) -> Asked:
    method = head.method.decode("ascii")
    if method in NEVER or (method == "CONNECT" and fixed):
        raise Refused(405, f"{method} is not passed on")
    if method == "CONNECT":
        asked = Asked(_tunnel(head.target.decode("ascii")), method)
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
    """Return the headers by name, those that are repeated as one list."""
    fields: dict[bytes, bytes] = {}
    for name, value in head.headers:
        fields[name] = fields[name] + b", " + value if name in fields else value
    return fields


def _length(fields: dict[bytes, bytes], version: bytes) -> int | None:
    chunked = b"transfer-encoding" in fields
    if chunked and (b"content-length" in fields or version == b"1.0"):
        raise _malformed("its length is given in two ways")
    return None if chunked else int(fields.get(b"content-length", b"0"))


def _target(target: str, fixed: Origin | None) -> Asked:
    if fixed is not None:
        found = _RELATIVE.fullmatch(target)
        if not found:
            raise _malformed("inside of a tunnel the target must be a path")
        return Asked(fixed, "", found[1], found[2] or "")
    found = _ABSOLUTE.fullmatch(target)
    if not found:
        raise _malformed("the target must be a whole URL: this is a proxy")
    scheme = _SCHEMES.get(found[1].lower())
    if scheme != "http":
        raise _malformed(f"{found[1][:10]} is not spoken here; https needs CONNECT")
    host, port = split_host(found[2])
    return Asked(
        Origin(scheme, host, PORTS[scheme] if port is None else port), "", found[3] or "/", found[4] or ""
    )


def _tunnel(target: str) -> Origin:
    host, port = split_host(target)
    if port is None:
        raise _malformed("the target of CONNECT must be host:port")
    return Origin(None, host, port)


def _check_host(value: bytes | None, asked: Asked) -> None:
    """Refuse a ``Host`` header that names another server than the target does."""
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
    """Return the host, in its one spelling, and the port of ``host`` or ``host:port``.

    Raises:
        Refused: It is neither.
    """
    if "@" in text:
        raise _malformed("there is a user or password in the target")
    found = _AUTHORITY.fullmatch(text)
    if not found:
        raise _malformed("there is no host, or no port, that could be asked for")
    port = None if found[2] is None else int(found[2])
    if port is not None and not 1 <= port <= 65535:  # noqa: PLR2004 - the ports there are
        raise _malformed("there is no such port")
    try:
        return canonical_host(found[1]), port
    except ValueError as error:
        raise _malformed(f"its host cannot be asked for: {error}") from None


def _malformed(why: str) -> Refused:
    return Refused(400, f"malformed request: {why}")
