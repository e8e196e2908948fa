"""Handle CONNECT: validate a tunnel's first bytes, and inspect its requests if a rule requires it."""

from __future__ import annotations

import contextlib

from pytest_microvm.network.policy.hosts import as_address
from pytest_microvm.network.policy.matching import PORTS
from pytest_microvm.network.policy.rules import Decision
from pytest_microvm.network.proxy.client_hello import HANDSHAKE, BadHello, HelloReader
from pytest_microvm.network.proxy.heads import Origin, RequestHead
from pytest_microvm.network.proxy.http import Conversation
from pytest_microvm.network.proxy.patience import Patience
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.network.proxy.relaying import (
    Guest,
    GuestStream,
    GuestTls,
    ServerStream,
    copy,
    relay,
    together,
)
from pytest_microvm.network.proxy.upstream import Outbound

_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
_ACCESS_DENIED = b"\x15\x03\x03\x00\x02\x02\x31"  # a fatal alert (RFC 8446, 6)


class Tunnel:
    """One tunnel that a guest requests.

    Args:
        asked: The CONNECT request.
        guest: The guest's connection.
        outbound: Checks requests and connects to servers.
        patience: Ends the connection when the TLS hello or a head takes too long.
    """

    def __init__(
        self, asked: RequestHead, guest: GuestStream, outbound: Outbound, patience: Patience
    ) -> None:
        self._asked = asked
        self._origin = asked.origin
        self._guest = guest
        self._outbound = outbound
        self._patience = patience
        self._speaks_tls = False

    async def run(self) -> None:
        """Serve the tunnel until both sides have ended, or refuse it.

        Raises:
            Broken: A response ended too early.
            GuestGone: The guest's connection failed.
            OSError: The server's connection failed.
        """
        try:
            await self._run()
        except Refused as refused:
            await self._guest.write(_ACCESS_DENIED if self._speaks_tls else refused.response())
            await self._guest.linger()

    async def _run(self) -> None:
        try:
            decision = self._outbound.decide(self._asked.request)
        except Refused as refused:
            self._note(refused)
            raise
        credentials = self._outbound.access.credentials
        if decision.inspect or any(credential.covers(self._origin) for credential in credentials):
            await self._look_into()
        elif decision.tcp or self._origin.port != PORTS["http"]:
            await self._carry(decision)
        else:
            await self._guest.write(_ESTABLISHED)
            await self._converse(self._guest, "http")

    async def _carry(self, decision: Decision) -> None:
        """Relay the tunnel's bytes without inspecting requests, after a check of the first bytes."""
        try:
            places = await self._outbound.places(self._asked.request)
        except Refused as refused:
            self._note(refused)
            raise
        number = self._note(decision)
        try:
            server = await self._outbound.connect(self._asked.request, places, tls=False)
        except Refused as refused:
            self._outbound.log.update(number, status=refused.status)
            raise
        try:
            self._outbound.log.update(number, status=200)
            await self._guest.write(_ESTABLISHED)
            if not decision.tcp:
                await self._begin(any_protocol=False)
                await relay(self._guest, server)
            else:  # the server may send first
                with contextlib.suppress(EOFError):
                    await together(self._send_any(server), copy(server, self._guest))
        finally:
            server.close()
            self._outbound.log.update(
                number, sent_bytes=server.sent_bytes, received_bytes=server.received_bytes
            )

    async def _send_any(self, server: ServerStream) -> None:
        await self._begin(any_protocol=True)
        await copy(self._guest, server)

    async def _look_into(self) -> None:
        """Inspect the requests in the tunnel; TLS is terminated here with the machine's own authority."""
        await self._guest.write(_ESTABLISHED)
        await self._begin(any_protocol=True)
        if not self._speaks_tls:
            await self._converse(self._guest, "http")
            return
        authority = self._outbound.access.authority
        try:
            if authority is None:
                raise ValueError("this machine has no authority of its own")  # noqa: TRY301 - as for the host
            context = authority.context(self._origin.host)
        except ValueError as error:
            refused = Refused(403, f"{self._origin.host} cannot be looked into: {error}")
            self._note(refused)
            raise refused from None
        plain = GuestTls(self._guest, context)
        await plain.handshake()
        await self._converse(plain, "https")

    async def _converse(self, guest: Guest, scheme: str) -> None:
        fixed = Origin(scheme, self._origin.host, self._origin.port)
        await Conversation(guest, self._outbound, self._patience, fixed).run()

    async def _begin(self, *, any_protocol: bool) -> None:
        """Validate the first bytes that the guest sends, and put them back.

        Raises:
            Refused: They are not TLS where TLS is required, or the hello is invalid or names another host.
        """
        data = await self._guest.read()
        if not data:
            return
        try:
            self._speaks_tls = data[0] == HANDSHAKE
            if self._speaks_tls:
                with self._patience.for_a_head():
                    data = await self._hello(data, nameless=any_protocol)
            elif not any_protocol:
                raise Refused(403, f"only TLS may be spoken with {self._origin.authority}")  # noqa: TRY301
        except Refused as refused:
            self._note(refused)
            raise
        self._guest.unread(data)

    async def _hello(self, data: bytes, *, nameless: bool) -> bytes:
        """Read the TLS ClientHello and return its bytes if it names the tunnel's host."""
        reader = HelloReader()
        try:
            while (hello := reader.feed(data)) is None:
                data = await self._guest.read()
                if not data:
                    raise BadHello("it ends too early")  # noqa: TRY301 - as the others
        except BadHello as error:
            raise Refused(
                403, f"TLS with {self._origin.authority} begins with no good hello: {error}"
            ) from None
        name = hello.server_name
        host = self._origin.host
        if name != host and not (name is None and (nameless or as_address(host) is not None)):
            raise Refused(403, f"TLS asks for {name or 'no name'} in a tunnel to {host}")
        return bytes(reader.data)

    def _note(self, verdict: Decision | Refused) -> int:
        return self._outbound.note(self._asked.request, verdict)
