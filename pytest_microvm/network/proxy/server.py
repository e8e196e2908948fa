"""The policy proxy of one machine: what its guest may send goes out, all else is answered with why not."""

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
"""Connections that one guest may have open at a time; more are closed at once."""

_AGAIN = 0.5  # seconds; before Python 3.12 wait_for() can lose a cancellation (CPython's issue 86296)


class Proxy:
    """Serves one machine's connections; it belongs to one event loop.

    Args:
        access: What the machine may reach, and with whose credentials.
        log: Where each request is written down.
        meter: Counts what moves, and slows it down.
        resolve: Gives the addresses of names; ``None``: this computer's resolver.
        redact: Takes out of a text for the log what nobody may see.
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
            reader: What the guest sends.
            writer: What it gets.
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
        """End all connections; those that come later are closed at once."""
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
            pass  # it is cut: the guest sees that it is not whole
        finally:
            patience.end()
            guest.cut()
