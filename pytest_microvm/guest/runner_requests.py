"""The host's requests to a runner, and the runner's replies, over one port.

Replies and data are written from one thread, between tests, with names bound at import: a test may
replace ``sys.stdout``, ``json`` or ``os.write``, close descriptors, change directory or fork.
"""

from __future__ import annotations

import collections
import json
import os
import random
import sys
from typing import TYPE_CHECKING, Any

from pytest_microvm.guest import files, replies
from pytest_microvm.wire.channel import WINDOW, Closed, Data, Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pytest_microvm.guest.port import Port
    from pytest_microvm.guest.runner_preload import HeldModules

_getpid = os.getpid
_exit = os._exit
_urandom = os.urandom
_encode = json.JSONEncoder(separators=(",", ":"), default=repr).encode


class Runner:
    """A server for one host on one port.

    Args:
        port: The connection to the host.
        resume: Called with a ``resume`` message before anything else runs in a clone.
        settle: Called when the machine is ready to be frozen for cloning, with a function that returns a
            loaded module by its name.

    Attributes:
        held: The modules preloaded before the session, if any.
        has_worked: Whether code of the project has run since :meth:`settle`.
    """

    def __init__(
        self,
        port: Port,
        resume: Callable[[dict[str, Any]], dict[str, Any]],
        settle: Callable[[Callable[[str], Any]], None] = lambda _loaded: None,
    ) -> None:
        self.port = port
        self.pid = _getpid()
        self.held: HeldModules | None = None
        self.has_worked = False
        self._resume = resume
        self._settle = settle
        self._queue: collections.deque[dict[str, Any]] = collections.deque()
        self._arrived: dict[int, collections.deque[Data | Closed]] = {}  # on the streams that are read

    def next_request(self) -> dict[str, Any]:
        """Wait for the host's next request.

        Raises:
            EOFError: The host has closed the port.
        """
        self.port.flush()  # the hello, at the first call
        while not self._queue:
            self._receive()
        return self._queue.popleft()

    def reply(self, request: dict[str, Any], result: dict[str, Any]) -> None:
        """Reply to ``request`` with ``result``."""
        self._send({"id": request.get("id"), "result": result})

    def refuse(self, request: dict[str, Any], kind: str, message: str) -> None:
        """Reply to ``request`` with an error."""
        self._send({"id": request.get("id"), "error": {"type": kind, "message": message[:10_000]}})

    def open_stream(self, request: dict[str, Any]) -> int:
        """Open the stream that ``request`` names and return its number."""
        number = int(request["stream"])
        self.port.channel.open(number)
        return number

    def send_lines(self, stream: int, records: Iterable[dict[str, Any]]) -> None:
        """Send ``records`` as JSON lines on ``stream`` and close it."""
        self.write_lines(stream, records)
        self.port.channel.close(stream)
        self.port.flush()

    def write_lines(self, stream: int, records: Iterable[dict[str, Any]]) -> None:
        """Send ``records`` as JSON lines on ``stream``, which stays open."""
        data = memoryview("".join([encode(record) + "\n" for record in records]).encode("ascii"))
        channel = self.port.channel
        while data:
            sent = channel.write(stream, bytes(data[:WINDOW]))
            data = data[sent:]
            self.port.flush()
            if data and not sent:
                self._receive()  # the host grants more credit once it has read the data

    def read_stream(self, stream: int) -> Iterator[bytes]:
        """Yield what the host sends on ``stream`` until it closes it.

        Raises:
            EOFError: The host has closed the port.
        """
        arrived = self._arrived.setdefault(stream, collections.deque())
        while True:
            while not arrived:
                self._receive()
            event = arrived.popleft()
            if isinstance(event, Closed):
                del self._arrived[stream]
                return
            yield event.data
            self.port.channel.consumed(stream, len(event.data))
            self.port.flush()

    def unpack(self, request: dict[str, Any]) -> None:
        """Unpack the tar archive that the host sends with ``request``, then reply."""
        stream = int(request["stream"])
        pieces = self.read_stream(stream)
        failure: Exception | None = None
        try:
            files.unpack(files.StreamReader(lambda: next(pieces, b"")), request["path"])
        except Exception as error:  # noqa: BLE001 - any failure is the reply
            failure = error
        for _rest in pieces:
            pass
        self.port.channel.close(stream)
        if failure is None:
            replies.reply(self.port.channel, request.get("id"), {})
        else:
            replies.reply_error(self.port.channel, request.get("id"), failure)
        self.port.flush()

    def answer_resume(self, request: dict[str, Any]) -> None:
        """Give this clone its own kernel entropy, clock, names, random seeds and grants, then reply."""
        result = self._resume(request)
        os.environ.update(request.get("environment", {}))
        reseed(self._loaded)
        openssl = self._loaded("_ssl") if self.has_worked else None
        if openssl is not None:  # its generator may have been used since it was settled
            openssl.RAND_add(_urandom(32), 32.0)
        self.reply(request, result)

    def settle(self) -> None:
        """Reset state of loaded libraries that clones must not share."""
        self._settle(self._loaded)

    def close(self) -> None:
        """Close the port in a process that does not serve it."""
        os.close(self.port.fd)

    def leave_if_forked(self) -> None:
        """Exit if this is a child process that a test forked and that returned into the runner's code."""
        if _getpid() != self.pid:
            _exit(0)

    def _loaded(self, name: str) -> Any:
        return sys.modules.get(name) if self.held is None else self.held.get(name)

    def _receive(self) -> None:
        for event in self.port.receive():
            if isinstance(event, Message):
                if event.body.get("op") == "unpack":  # the archive follows at once
                    self._arrived[self.open_stream(event.body)] = collections.deque()
                self._queue.append(event.body)
            elif isinstance(event, (Data, Closed)) and event.stream in self._arrived:
                self._arrived[event.stream].append(event)
        self.port.flush()

    def _send(self, body: dict[str, Any]) -> None:
        self.port.channel.send(body)
        self.port.flush()


def encode(value: object) -> str:
    """Encode ``value`` as ASCII JSON on one line; values that JSON lacks become their ``repr``."""
    try:
        return _encode(value)
    except (TypeError, ValueError, RecursionError):
        return _encode(_plain(value))


def _plain(value: object, depth: int = 0) -> object:
    """Return ``value`` with string keys and without cycles, as JSON requires."""
    if depth > 20:  # noqa: PLR2004 - deeper than any report is
        return repr(value)[:1000]
    if isinstance(value, dict):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else repr(value)


def reseed(loaded: Callable[[str], Any]) -> None:
    """Reseed every random generator that a clone shares with its template.

    Args:
        loaded: Returns a loaded module by its name, or ``None`` if it is not loaded.
    """
    random.seed(_urandom(32))
    numpy = loaded("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        numpy.random.seed(int.from_bytes(_urandom(4), "little"))
    hypothesis = loaded("hypothesis.core")
    own = getattr(getattr(hypothesis, "threadlocal", None), "_hypothesis_global_random", None)
    if own is not None:
        own.seed(_urandom(32))
    names = getattr(loaded("tempfile"), "_name_sequence", None)
    if names is not None:
        names.rng.seed(_urandom(32))
