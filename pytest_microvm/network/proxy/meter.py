"""How much a machine has moved over the network: counted, slowed down, and ended at its quota."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

CHUNK = 64 * 1024
"""Bytes that are moved at a time, at most."""

_BURST = 0.05  # seconds of bandwidth that may be caught up with after a pause
_TURN = 0.1  # seconds of bandwidth that one connection may take before the others have their turn


class QuotaReached(Exception):
    """A quota of the network is exceeded; every connection of the machine ends."""


class Meter:
    """Counts what one machine moves, both ways, and compares it with its quotas.

    It belongs to one event loop; its figures may be read by any thread.

    Args:
        network_bytes: Bytes it may move, both ways together; ``None``: any number.
        connections: Connections to servers it may make in total; ``None``: any number.
        bandwidth: Bytes a second, both ways together; ``None``: any number.
        exceed: Told once, in a thread of its own, which quota was exceeded, its limit and what was observed.
    """

    def __init__(
        self,
        network_bytes: int | None,
        connections: int | None,
        bandwidth: int | None,
        exceed: Callable[[str, float, float], None],
    ) -> None:
        self.moved_bytes = 0
        self.made_connections = 0
        self.chunk = CHUNK if bandwidth is None else max(1, min(CHUNK, int(bandwidth * _TURN)))
        self._limits = {"network_bytes": network_bytes, "connections": connections}
        self._bandwidth = bandwidth
        self._exceed = exceed
        self._ending: asyncio.Future[None] | None = None  # of the machine, once it has exceeded one
        self._free = 0.0  # when, on the loop's clock, the next byte may move

    async def connection(self) -> None:
        """Count one connection to a server, before it is made.

        Raises:
            QuotaReached: The machine may make no more, or may move nothing any more.
        """
        self.made_connections += 1
        await self._check("connections", self.made_connections)

    async def move(self, number: int) -> None:
        """Count bytes that are about to move, and wait until it is their turn.

        Args:
            number: How many, at most :attr:`chunk`: whoever waits first moves first, so that all
                connections get the same share.

        Raises:
            QuotaReached: The machine may move no more.
        """
        self.moved_bytes += number
        await self._check("network_bytes", self.moved_bytes)
        if self._bandwidth is not None:
            now = asyncio.get_running_loop().time()
            start = max(now - _BURST, self._free)
            self._free = start + number / self._bandwidth
            if self._free > now:
                await asyncio.sleep(self._free - now)

    async def _check(self, quota: str, observed: int) -> None:
        limit = self._limits[quota]
        if limit is not None and observed > limit and self._ending is None:
            # Not by this thread: ending a machine waits for its connections, which are ours.
            loop = asyncio.get_running_loop()
            self._ending = loop.run_in_executor(None, self._exceed, quota, limit, observed)
        if self._ending is not None:
            # The machine is ended before any of its connections is: a guest never sees why.
            await asyncio.shield(self._ending)
            raise QuotaReached(quota)
