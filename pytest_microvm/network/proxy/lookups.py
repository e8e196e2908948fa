"""Per-machine resolver threads: a hung lookup cannot block other machines."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

_THREADS = 4  # the C library's resolver blocks a thread until it gets a response


class Lookups:
    """Resolver of names for one machine, backed by this computer's resolver.

    It does not use the loop's default threads: they are few, and shared by all machines and by the code that
    ends machines.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "microvm-lookup")

    async def __call__(self, host: str, port: int) -> list[str]:
        """Return the addresses that this computer's resolver gives for a name.

        Raises:
            OSError: The name does not resolve.
        """
        look = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look)
        return [str(entry[4][0]) for entry in found]

    def close(self) -> None:
        """Start no more lookups; do not wait for running ones."""
        self._threads.shutdown(wait=False, cancel_futures=True)
