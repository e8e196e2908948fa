"""The requests of one connection, one after another: each is decided and answered on its own."""

from __future__ import annotations

from collections.abc import Callable

import h11

from pytest_microvm.network.policy.rules import Request
from pytest_microvm.network.proxy.credentials import for_request
from pytest_microvm.network.proxy.exchange import Exchange, Line
from pytest_microvm.network.proxy.heads import Asked, Origin, attempted, parse_head, read_head
from pytest_microvm.network.proxy.patience import Patience
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.network.proxy.relaying import Guest
from pytest_microvm.network.proxy.upstream import Outbound, Place

_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS"})


class Conversation:
    """The requests of one connection of a guest.

    Args:
        guest: The connection.
        outbound: Decides and connects.
        patience: Ends the connection when a head takes too long.
        fixed: The server, where it was chosen before (inside of a tunnel); otherwise each request names its
            own.
    """

    def __init__(
        self, guest: Guest, outbound: Outbound, patience: Patience, fixed: Origin | None = None
    ) -> None:
        self._guest = guest
        self._outbound = outbound
        self._patience = patience
        self._fixed = fixed
        self._line: Line | None = None

    async def run(self) -> Asked | None:
        """Answer requests until the guest has no more; return the one that asks for a tunnel, if one does.

        A request that is refused is the last one.

        Raises:
            Broken: A response ended too early.
            GuestGone: The guest's connection did.
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
                    await self._guest.linger()  # it may still be sending a body that nobody reads
                    return None
        except Refused as refused:
            await self._guest.write(refused.response())
            await self._guest.linger()
            return None
        finally:
            self._hang_up()

    async def _next(self) -> tuple[Asked, h11.Connection] | None:
        """Return the next request; ``None`` if there is none any more."""
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

    async def _answer(self, asked: Asked, http: h11.Connection) -> bool:
        """Answer one request; return whether another may follow."""
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

    async def _exchange(self, asked: Asked, exchange: Exchange, places: list[Place]) -> None:
        """Do one request, on the connection there is, or on a new one if that has ended."""
        if self._line is None or not await exchange.over(self._line):
            self._hang_up()
            request = asked.request
            stream = await self._outbound.connect(
                request, places or await self._outbound.places(request), tls=asked.origin.scheme == "https"
            )
            self._line = Line(asked.origin, stream)
            if not await exchange.over(self._line):
                raise Refused(502, f"{request.host} ended the connection without a response")
        if not self._line.renew():
            self._hang_up()

    def _status_noted(self, number: int) -> Callable[[int], None]:
        return lambda status: self._outbound.log.update(number, status=status)

    async def _can_reuse(self, asked: Asked) -> bool:
        """Tell whether the connection there is may be used: for what can be asked again if it has ended."""
        line = self._line
        return (
            line is not None
            and line.origin == asked.origin
            and asked.method in _REPEATABLE
            and asked.length == 0
            and not asked.websocket
            and await line.stream.is_quiet()
        )

    def _hang_up(self) -> None:
        if self._line:
            self._line.stream.close()
            self._line = None
