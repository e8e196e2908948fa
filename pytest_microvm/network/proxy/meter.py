"""Count a machine's network traffic, limit its bandwidth, and end the machine at its quota."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

CHUNK = 64 * 1024
"""Maximum bytes transferred at a time."""

_BURST = 0.05  # seconds of unused bandwidth that may be used after a pause
_TURN = 0.1  # seconds of bandwidth that a connection may use before the others get their turn


class QuotaReached(Exception):
    """A quota of the network is exceeded; every connection of the machine ends."""


class Meter:
    """Counter of one machine's traffic in both directions, with quotas and a bandwidth limit.

    A meter belongs to one event loop; any thread may read its figures.

    Args:
        network_bytes: Maximum bytes in both directions together; ``None``: unlimited.
        connections: Maximum connections to servers in total; ``None``: unlimited.
        bandwidth: Maximum bytes per second in both directions together; ``None``: unlimited.
        exceed: Called once, in another thread, with the exceeded quota, its limit and the observed value.
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
        self._ending: asyncio.Future[None] | None = None  # the machine's end, once it has exceeded a quota
        self._free = 0.0  # time on the loop's clock at which the next byte may be transferred

    async def connection(self) -> None:
        """Count one connection to a server, before it is opened.

        Raises:
            QuotaReached: The machine has exceeded a quota.
        """
        self.made_connections += 1
        await self._check("connections", self.made_connections)

    async def move(self, number: int) -> None:
        """Count bytes before their transfer, and wait for their turn within the bandwidth.

        Args:
            number: The number of bytes, at most :attr:`chunk`; turns are first come, first served, so that
                all connections get the same share.

        Raises:
            QuotaReached: The machine has exceeded a quota.
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
            # In another thread: ending a machine waits for its connections, which this thread serves.
            loop = asyncio.get_running_loop()
            self._ending = loop.run_in_executor(None, self._exceed, quota, limit, observed)
        if self._ending is not None:
            # The machine ends before any of its connections: a guest never sees the reason.
            await asyncio.shield(self._ending)
            raise QuotaReached(quota)
