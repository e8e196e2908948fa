"""File transfer by digest, in pieces, from the submitting host to the workers that request files.

A worker publishes a request as an event on the run's topic and waits; the submitting host delivers the
response by a call on that worker. So the submitting host need not be reachable itself, no piece is held in
the scheduler's memory, and receiving a piece takes no thread of a worker, all of which may be waiting.
"""

from __future__ import annotations

import hashlib
import queue
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from distributed import Client

from pytest_microvm.ci.running.commands import Stop
from pytest_microvm.errors import HostError
from pytest_microvm.images.blobs import sha256_file

PIECE = 8 * 1024**2
_PATIENCE = 120.0  # seconds to wait for a piece
_LOOK = 0.5  # seconds between two checks whether to stop
_UNKNOWN = "unknown"

Answer = Callable[[str, str, "bytes | None"], None]


class Offers:
    """The submitting host's side: responds to the workers' requests for files.

    Args:
        client: The cluster.
        deliver: ``deliver(request, data)``, called on a worker by ``client.run`` as
            ``deliver(run, request, data)``; ``data`` is ``None`` if there is no such file.
        run: The run's id.
    """

    def __init__(self, client: Client, deliver: Callable[..., None], run: str) -> None:
        self._client = client
        self._deliver = deliver
        self._run = run
        self._files: dict[str, Path] = {}
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="microvm-offers")

    def add(self, path: Path) -> str:
        """Offer a file and return its digest."""
        digest = sha256_file(path)
        self._files[digest] = path
        return digest

    def add_known(self, files: Mapping[str, Path]) -> None:
        """Offer files whose digests are known; the worker verifies them anyway."""
        self._files.update(files)

    def answer(self, asked: Mapping[str, Any]) -> None:
        """Send a piece of a file to the worker that requested it."""
        self._threads.submit(self._send, asked["request"], asked["blob"], asked["offset"], asked["worker"])

    def close(self) -> None:
        """Stop responding to requests."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _send(self, request: str, blob: str, offset: int, worker: str) -> None:
        data: bytes | None = None
        if (path := self._files.get(blob)) is not None:
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    data = file.read(PIECE)
            except OSError:
                data = None  # it was removed meanwhile; the worker reports that
        self._client.run(self._deliver, self._run, request, data, workers=[worker], on_error="ignore")


class Inbox:
    """A worker's side: requests files and receives their pieces.

    Args:
        ask: Sends a request to the submitting host.
    """

    def __init__(self, ask: Callable[[Mapping[str, Any]], None]) -> None:
        self._ask = ask
        self._waiting: dict[str, queue.SimpleQueue[bytes | None]] = {}
        self._lock = Lock()

    def deliver(self, request: str, data: bytes | None) -> None:
        """Accept the response to a request; drop it if the request is no longer pending."""
        with self._lock:
            waiting = self._waiting.get(request)
        if waiting is not None:
            waiting.put(data)

    def fetch(self, blob: str, path: Path, stop: Stop) -> None:
        """Fetch a file and verify its digest.

        Args:
            blob: The file's SHA-256.
            path: The destination.
            stop: The conditions for giving up.

        Raises:
            HostError: The file does not arrive, or its digest differs.
            Stopped: A stop was requested.
        """
        digest = hashlib.sha256()
        offset = 0
        with path.open("wb") as file:
            while True:
                piece = self._piece(blob, offset, stop)
                digest.update(piece)
                file.write(piece)
                offset += len(piece)
                if len(piece) < PIECE:
                    break
        if digest.hexdigest() != blob:
            path.unlink()
            raise HostError(
                f"file {blob[:12]} arrived damaged",
                resolution="see whether it was changed or removed on the host that submitted the run",
            )

    def _piece(self, blob: str, offset: int, stop: Stop) -> bytes:
        request = secrets.token_hex(8)
        answer: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        with self._lock:
            self._waiting[request] = answer
        try:
            self._ask({"request": request, "blob": blob, "offset": offset})
            deadline = time.monotonic() + _PATIENCE
            while time.monotonic() < deadline:
                stop.check()
                try:
                    data = answer.get(timeout=_LOOK)
                except queue.Empty:
                    continue
                if data is None:
                    raise HostError(
                        f"the host that submitted the run does not have file {blob[:12]} any more",
                        resolution="run again",
                    )
                return data
        finally:
            with self._lock:
                del self._waiting[request]
        raise HostError(
            f"file {blob[:12]} did not come within {_PATIENCE:.0f} s",
            resolution="see whether the host that submitted the run is still connected to the scheduler",
        )
