"""Serve a live mount over a stream of the machine's network port, one request after the other.

The host's file system may be slow, so each mount accesses it on a thread of its own, never on the loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from typing import TYPE_CHECKING

from pytest_microvm.mounts.live.messages import HEADER_SIZE, LENGTH, MAX_REQUEST, BadRequest

if TYPE_CHECKING:
    from pytest_microvm.mounts.live.server import Server

_log = logging.getLogger("pytest_microvm")


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: Server) -> None:
    """Answer requests until the machine or the mount has ended.

    Raises:
        BadRequest: A request is not valid FUSE.
    """
    loop = asyncio.get_running_loop()
    thread = concurrent.futures.ThreadPoolExecutor(1, "microvm-live")
    try:
        while data := await _request(reader):
            answer = await loop.run_in_executor(thread, server.answer, data)
            if answer is not None:
                writer.write(answer)
                await writer.drain()
    finally:
        thread.submit(server.close)
        thread.shutdown(wait=False)  # the event loop does not wait for a slow disk


async def _request(reader: asyncio.StreamReader) -> bytes:
    """Return the next request; b"" at the end."""
    try:
        begin = await reader.readexactly(LENGTH.size)
        (length,) = LENGTH.unpack(begin)
        if not HEADER_SIZE <= length <= MAX_REQUEST:
            raise BadRequest(f"a request of {length} bytes")
        return begin + await reader.readexactly(length - LENGTH.size)
    except (asyncio.IncompleteReadError, OSError):
        return b""
