"""Names of one machine are looked up by threads of its own: names that never resolve stop nobody else's."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

_THREADS = 4  # the resolver of the C library stays in each for as long as it waits for an answer


class Lookups:
    """Asks this computer's resolver for one machine.

    The loop's own threads are not used: they are few, all machines' and also those that end a machine.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "microvm-lookup")

    async def __call__(self, host: str, port: int) -> list[str]:
        """Return the addresses that this computer's resolver gives for a name.

        Raises:
            OSError: It gives none.
        """
        look = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look)
        return [str(entry[4][0]) for entry in found]

    def close(self) -> None:
        """Begin no more look-ups; those on their way are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
