"""One request and its response, between a guest and a connection to a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import h11

from pytest_microvm.network.proxy.credentials import Credential, with_credentials
from pytest_microvm.network.proxy.echoes import Echoes
from pytest_microvm.network.proxy.heads import MAX_HEAD, Origin, RequestHead, in_short, kept
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.network.proxy.relaying import ByteStream, ServerStream, relay
from pytest_microvm.network.proxy.websocket import Frames

_BROKEN = (OSError, h11.RemoteProtocolError)  # how a connection to a server fails
_FRAMING = (b"content-length", b"transfer-encoding")


class Broken(Exception):
    """A response ended early; the guest's connection is reset, so that it is not taken for complete."""


@dataclass
class ServerConnection:
    """A connection to a server, with the HTTP state of the requests on it.

    Args:
        origin: The server.
        stream: The connection.
    """

    origin: Origin
    stream: ServerStream

    def __post_init__(self) -> None:
        self.http = h11.Connection(h11.CLIENT, MAX_HEAD)

    async def send(self, event: h11.Request | h11.Data | h11.EndOfMessage) -> None:
        """Send a part of a request."""
        await self.stream.write(self.http.send(event) or b"")

    async def event(self) -> object:
        """Return the next event from the server.

        Raises:
            OSError: The connection failed.
            h11.RemoteProtocolError: The response is not HTTP/1.1, or ended too early.
        """
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.stream.read())
        return event

    def renew(self) -> bool:
        """Prepare the connection for another request; return True if that is possible."""
        if (self.http.our_state, self.http.their_state) != (h11.DONE, h11.DONE):
            return False
        if self.http.trailing_data != (b"", False):
            return False  # unsolicited bytes would be taken for the next response
        self.http = h11.Connection(h11.CLIENT, MAX_HEAD)
        return True


class Exchange:
    """One request and its response.

    Args:
        asked: The request.
        http: The HTTP state of the guest's connection, after the request's head.
        guest: The guest's connection.
        credentials: The credentials to send with the request.
        note_status: Called with the response's status before the guest gets it.

    Attributes:
        keeps: Whether the guest's connection can be used for another request.
        sent: Bytes sent to the server.
        received: Bytes received from the server.
    """

    def __init__(
        self,
        asked: RequestHead,
        http: h11.Connection,
        guest: ByteStream,
        credentials: tuple[Credential, ...],
        note_status: Callable[[int], None],
    ) -> None:
        self.keeps = False
        self.sent = 0
        self.received = 0
        self._asked = asked
        self._http = http
        self._guest = guest
        self._outgoing = with_credentials(asked, credentials).outgoing()
        self._echoes = Echoes(credentials)
        self._note_status = note_status
        self._answered = False
        if asked.length == 0:
            http.next_event()  # the request's end

    async def over(self, connection: ServerConnection) -> bool:
        """Run the exchange over a connection; return False if that ended before any byte of a response.

        Raises:
            Refused: The server does not respond in HTTP, or its response cannot be forwarded.
            Broken: The response ended too early.
            GuestGone: The guest's connection failed.
        """
        sent, received = connection.stream.sent_bytes, connection.stream.received_bytes
        try:
            await connection.send(self._outgoing)
            if self._asked.length == 0:
                await connection.send(h11.EndOfMessage())
                await self._respond(connection)
            else:
                await self._both(connection)
        except (*_BROKEN, Refused) as error:
            if self._answered:
                raise Broken from error
            if isinstance(error, Refused):
                raise
            if connection.stream.received_bytes > received:
                raise Refused(502, f"{connection.origin.host} does not answer in HTTP/1.1") from None
            return False
        else:
            return True
        finally:
            self.sent += connection.stream.sent_bytes - sent
            self.received += connection.stream.received_bytes - received

    async def _both(self, connection: ServerConnection) -> None:
        """Send the body and forward the response; a server may respond before it has read the whole body."""
        sending = asyncio.ensure_future(self._send_body(connection))
        responding = asyncio.ensure_future(self._respond(connection))
        try:
            await asyncio.wait({sending, responding}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            await responding
        finally:
            sending.cancel()
            responding.cancel()
            await asyncio.gather(sending, responding, return_exceptions=True)

    async def _send_body(self, connection: ServerConnection) -> None:
        if self._http.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            await self._guest.write(self._http.send(go_on) or b"")
        while not isinstance(event := await self._body_event(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                try:
                    await connection.send(h11.Data(bytes(event.data)))
                except OSError:  # the server may have responded before closing
                    return
        self._guest.unread(self._http.trailing_data[0])
        await connection.send(h11.EndOfMessage())

    async def _body_event(self) -> object:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._guest.read())
        except h11.RemoteProtocolError as error:
            raise Refused(400, f"malformed request: {in_short(error)}") from None
        return event

    async def _respond(self, connection: ServerConnection) -> None:
        event = await connection.event()
        while isinstance(event, h11.InformationalResponse) and event.status_code != 101:  # noqa: PLR2004
            event = await connection.event()
        if isinstance(event, h11.InformationalResponse):
            await self._switch(connection, event)
            return
        if not isinstance(event, h11.Response):
            raise ConnectionResetError
        self._echoes.check(event.headers)
        framing = [pair for pair in event.headers.raw_items() if pair[0].lower() in _FRAMING]
        await self._answer(
            h11.Response(
                status_code=event.status_code,
                headers=self._headers(event) + framing,
                reason=self._echoes.blanked(event.reason),
            )
        )
        while isinstance(event := await connection.event(), h11.Data):
            if data := self._echoes.feed(bytes(event.data)):
                await self._guest.write(self._http.send(h11.Data(data)) or b"")
        if not isinstance(event, h11.EndOfMessage):
            raise ConnectionResetError
        held = self._echoes.feed(b"")
        last = (self._http.send(h11.Data(held)) or b"") if held else b""
        await self._guest.write(last + (self._http.send(h11.EndOfMessage()) or b""))
        self.keeps = self._asked.persistent and self._http.states == {
            h11.CLIENT: h11.DONE,
            h11.SERVER: h11.DONE,
        }

    async def _switch(self, connection: ServerConnection, event: h11.InformationalResponse) -> None:
        """Switch to a WebSocket: relay bytes both ways and redact credentials in the server's messages."""
        if dict(event.headers).get(b"upgrade", b"").lower() != b"websocket":
            raise Refused(502, f"{connection.origin.host} switches to a protocol that was not asked for")
        self._echoes.check(event.headers)
        headers = [*self._headers(event), (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
        reason = self._echoes.blanked(event.reason)
        await self._answer(h11.InformationalResponse(status_code=101, headers=headers, reason=reason))
        connection.stream.unread(connection.http.trailing_data[0])
        frames = Frames(self._echoes.feed, self._echoes.blanked)
        await relay(self._guest, connection.stream, frames.feed if self._echoes else None)

    async def _answer(self, head: h11.Response | h11.InformationalResponse) -> None:
        self._note_status(head.status_code)
        self._answered = True
        await self._guest.write(self._http.send(head) or b"")

    def _headers(self, event: h11.Response | h11.InformationalResponse) -> list[tuple[bytes, bytes]]:
        blanked = self._echoes.blanked
        return [(blanked(name), blanked(value)) for name, value in kept(event.headers.raw_items())]
