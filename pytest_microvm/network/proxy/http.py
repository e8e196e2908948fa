"""Handle the requests of one connection in sequence; each is checked against the policy on its own."""

from __future__ import annotations

from collections.abc import Callable

import h11

from pytest_microvm.network.policy.rules import Request
from pytest_microvm.network.proxy.credentials import for_request
from pytest_microvm.network.proxy.exchange import Exchange, ServerConnection
from pytest_microvm.network.proxy.heads import Origin, RequestHead, attempted, parse_head, read_head
from pytest_microvm.network.proxy.patience import Patience
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.network.proxy.relaying import Guest
from pytest_microvm.network.proxy.upstream import Outbound, Place

_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS"})


class Conversation:
    """The sequence of requests on one connection of a guest.

    Args:
        guest: The connection.
        outbound: Checks requests and connects to servers.
        patience: Ends the connection when a head takes too long.
        fixed: The server, if it was chosen before (inside a tunnel); otherwise each request names its own.
    """

    def __init__(
        self, guest: Guest, outbound: Outbound, patience: Patience, fixed: Origin | None = None
    ) -> None:
        self._guest = guest
        self._outbound = outbound
        self._patience = patience
        self._fixed = fixed
        self._connection: ServerConnection | None = None

    async def run(self) -> RequestHead | None:
        """Handle requests until the guest sends no more; return a request for a tunnel, if one arrives.

        A refused request is the last one.

        Raises:
            Broken: A response ended too early.
            GuestGone: The guest's connection failed.
        """
        try:
            while True:
                found = await self._next()
                if found is None:
                    return None
                asked, http = found
                if asked.method == "CONNECT":
                    return asked
                if not await self._answer(asked, http):
                    await self._guest.linger()  # the guest may still be sending an unread body
                    return None
        except Refused as refused:
            await self._guest.write(refused.response())
            await self._guest.linger()
            return None
        finally:
            self._hang_up()

    async def _next(self) -> tuple[RequestHead, h11.Connection] | None:
        """Return the next request; ``None`` at the end of the connection."""
        raw = await self._guest.read()
        self._guest.unread(raw)
        if not raw:
            return None
        try:
            with self._patience.for_a_head():
                raw = await read_head(self._guest) or b""
            return parse_head(raw, self._fixed)
        except Refused as refused:
            method, host = attempted(raw)
            port = 0
            if self._fixed:
                host, port = self._fixed.host, self._fixed.port
            self._outbound.note(Request(host, port, method=method), refused)
            raise

    async def _answer(self, asked: RequestHead, http: h11.Connection) -> bool:
        """Handle one request; return True if another may follow."""
        request = asked.request
        places: list[Place] = []
        try:
            decision = self._outbound.decide(request)
            credentials = for_request(self._outbound.access.credentials, asked)
            if not await self._can_reuse(asked):
                self._hang_up()
                places = await self._outbound.places(request)
        except Refused as refused:
            self._outbound.note(request, refused)
            raise
        number = self._outbound.note(request, decision)
        exchange = Exchange(asked, http, self._guest, credentials, self._status_noted(number))
        try:
            await self._exchange(asked, exchange, places)
        except Refused as refused:
            self._outbound.log.update(number, status=refused.status)
            raise
        finally:
            self._outbound.log.update(number, sent_bytes=exchange.sent, received_bytes=exchange.received)
        return exchange.keeps

    async def _exchange(self, asked: RequestHead, exchange: Exchange, places: list[Place]) -> None:
        """Run one exchange on the open connection, or on a new one if there is none or it has ended."""
        if self._connection is None or not await exchange.over(self._connection):
            self._hang_up()
            request = asked.request
            stream = await self._outbound.connect(
                request, places or await self._outbound.places(request), tls=asked.origin.scheme == "https"
            )
            self._connection = ServerConnection(asked.origin, stream)
            if not await exchange.over(self._connection):
                raise Refused(502, f"{request.host} ended the connection without a response")
        if not self._connection.renew():
            self._hang_up()

    def _status_noted(self, number: int) -> Callable[[int], None]:
        return lambda status: self._outbound.log.update(number, status=status)

    async def _can_reuse(self, asked: RequestHead) -> bool:
        """Return True if the open connection may be reused: for repeatable requests, in case it has ended."""
        connection = self._connection
        return (
            connection is not None
            and connection.origin == asked.origin
            and asked.method in _REPEATABLE
            and asked.length == 0
            and not asked.websocket
            and await connection.stream.is_quiet()
        )

    def _hang_up(self) -> None:
        if self._connection:
            self._connection.stream.close()
            self._connection = None
