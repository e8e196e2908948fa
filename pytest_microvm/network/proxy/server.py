"""The policy proxy of one machine: it forwards allowed requests and answers others with the reason."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pytest_microvm.network.proxy.access import Access
from pytest_microvm.network.proxy.exchange import Broken
from pytest_microvm.network.proxy.http import Conversation
from pytest_microvm.network.proxy.log import NetworkLog
from pytest_microvm.network.proxy.lookups import Lookups
from pytest_microvm.network.proxy.meter import Meter, QuotaReached
from pytest_microvm.network.proxy.patience import HEAD, IDLE, Patience
from pytest_microvm.network.proxy.relaying import GuestGone, GuestStream
from pytest_microvm.network.proxy.tunnels import Tunnel
from pytest_microvm.network.proxy.upstream import Outbound, Resolver

MAX_CONNECTIONS = 512
"""Maximum open connections of one guest; further ones are closed immediately."""

_AGAIN = 0.5  # seconds; before Python 3.12 wait_for() can lose a cancellation (CPython's issue 86296)


class Proxy:
    """Server of one machine's connections, on one event loop.

    Args:
        access: The machine's policy and credentials.
        log: Records each request.
        meter: Counts the traffic and limits the bandwidth.
        resolve: Resolves names to addresses; ``None``: this computer's resolver.
        redact: Removes secrets from a text for the log.
    """

    def __init__(
        self,
        access: Access,
        log: NetworkLog,
        meter: Meter,
        *,
        resolve: Resolver | None = None,
        redact: Callable[[str], str] = str,
    ) -> None:
        self._lookups = Lookups()
        self._outbound = Outbound(access, log, meter, resolve or self._lookups, redact)
        self._works: set[asyncio.Task[None]] = set()
        self._closed = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of the guest until it ends.

        Args:
            reader: Reads the guest's data.
            writer: Writes data to the guest.
        """
        guest = GuestStream(reader, writer)
        if self._closed or len(self._works) >= MAX_CONNECTIONS:
            guest.cut()
            return
        work = asyncio.ensure_future(self._work(guest))
        self._works.add(work)
        try:
            await asyncio.wait({work})
        finally:
            self._works.discard(work)
            work.cancel()
        if not work.cancelled() and (error := work.exception()):
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a connection of a machine ended by an error of the proxy", "exception": error}
            )

    async def close(self) -> None:
        """End all connections; later ones are closed immediately."""
        self._closed = True
        while left := [work for work in self._works if not work.done()]:
            self._end_all()
            await asyncio.wait(left, timeout=_AGAIN)
        self._lookups.close()

    def _end_all(self) -> None:
        for work in self._works:
            if work is not asyncio.current_task():
                work.cancel()

    async def _work(self, guest: GuestStream) -> None:
        work = asyncio.current_task()
        assert work is not None
        patience = Patience(guest, work, idle=IDLE, head=HEAD)
        try:
            asked = await Conversation(guest, self._outbound, patience).run()
            if asked:
                await Tunnel(asked, guest, self._outbound, patience).run()
            await guest.close()
        except QuotaReached:
            self._closed = True
            self._end_all()
        except (Broken, GuestGone, OSError):
            pass  # the connection is reset, so that the guest sees that the response is incomplete
        finally:
            patience.end()
            guest.cut()
