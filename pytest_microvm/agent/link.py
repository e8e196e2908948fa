"""The host's end of a guest's port: a socket with a channel, requests and byte streams.

The I/O thread reads every guest's sockets; callers wait on conditions. A guest cannot block that thread,
nor grow the host's memory beyond ``WINDOW`` bytes per stream and one message per request, with at most
``MAX_UNANSWERED`` requests.
"""

from __future__ import annotations

import selectors
import threading
from typing import TYPE_CHECKING, Any

from pytest_microvm.agent.port_socket import receive, send_queued
from pytest_microvm.agent.reactor import reactor
from pytest_microvm.agent.streams import Stream
from pytest_microvm.errors import MachineCrashed, MachineError, ProtocolViolation
from pytest_microvm.untrusted.redaction import Redactor
from pytest_microvm.untrusted.text import sanitize, sanitize_line
from pytest_microvm.wire.channel import MAX_STREAMS, Channel, Closed, Data, Hello, Message
from pytest_microvm.wire.fields import is_whole, number_field
from pytest_microvm.wire.frames import WireError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

MAX_UNANSWERED = 4096
_MAX_ERRNO = 4095  # Linux: include/linux/err.h


class GuestError(MachineError):
    """The guest replied to a request with an error.

    Args:
        kind: The guest's exception name, such as ``FileNotFoundError`` (untrusted, safe to show).
        message: The exception's message (untrusted, safe to show).
        errno: The exception's error number, or 0.
    """

    def __init__(self, kind: str, message: str, errno: int = 0) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message
        self.errno = errno


class PendingRequest:
    """A sent request, whose reply can be waited for."""

    def __init__(self, link: Link, op: str) -> None:
        self._link = link
        self._op = op
        self.reply: dict[str, Any] | None = None

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Return the reply's ``result``.

        Raises:
            TimeoutError: No reply within ``timeout`` seconds; you may wait again.
            GuestError: The guest replied with an error.
            MachineCrashed: The machine ended first.
        """
        link = self._link
        with link.changed:
            link.changed.wait_for(lambda: self.reply is not None or link.failure, timeout)
            if self.reply is None:
                if link.failure:
                    raise link.failure
                raise TimeoutError(f"no answer to {self._op!r} within {timeout:g} s")
        error = self.reply.get("error")
        if isinstance(error, dict):
            raise _guest_error(error, link.redactor)
        result = self.reply.get("result")
        return result if isinstance(result, dict) else {}

    @property
    def done(self) -> bool:
        """True once the reply has arrived or the link has failed."""
        return self.reply is not None or self._link.failure is not None


def _guest_error(error: dict[str, Any], redactor: Redactor) -> GuestError:
    kind, message, number = error.get("type"), error.get("message"), error.get("errno")
    return GuestError(
        sanitize_line(redactor.text(kind), 200) if isinstance(kind, str) else "Error",
        sanitize(redactor.text(message), 10_000) if isinstance(message, str) else "",
        number if is_whole(number, 1, _MAX_ERRNO) else 0,
    )


class Link:
    """A connection to one port of a guest.

    Args:
        sock: A connected stream socket, which this object now owns.
        on_violation: Called once, on the thread that noticed, when the guest violates the protocol.
    """

    def __init__(self, sock: socket.socket, on_violation: Callable[[], None] = lambda: None) -> None:
        self.channel = Channel("host")
        self.changed = threading.Condition()
        self.failure: MachineError | None = None
        self.redactor = Redactor()
        self.bytes_received = 0
        self.bytes_sent = 0
        self._sock = sock
        self._on_violation = on_violation
        self._closed = False
        self._requests: dict[int, PendingRequest] = {}
        self._streams: dict[int, Stream] = {}
        self._next_request = 1
        self._next_stream = 1
        self._events = selectors.EVENT_READ
        sock.setblocking(False)
        self.reactor = reactor()
        self.reactor.set(sock, selectors.EVENT_READ, self._ready)
        self.flush()

    def wait_hello(self, timeout: float | None) -> Hello:
        """Return the guest's hello.

        Raises:
            TimeoutError: No hello arrived within ``timeout`` seconds.
            MachineCrashed: The machine ended first.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.channel.peer or self.failure, timeout)
            if self.failure:
                raise self.failure
            if self.channel.peer is None:
                raise TimeoutError(f"no hello from the guest within {timeout:g} s")
            return self.channel.peer

    def request(self, op: str, **arguments: Any) -> PendingRequest:
        """Send a request without waiting for its reply.

        Raises:
            MachineCrashed: The machine has ended.
            MachineError: The guest has left too many requests unanswered.
            ValueError: The request does not fit into one message.
        """
        with self.changed:
            if self.failure:
                raise self.failure
            if len(self._requests) >= MAX_UNANSWERED:
                raise MachineError(f"the guest has left {MAX_UNANSWERED} requests unanswered")
            number = self._next_request
            request = PendingRequest(self, op)
            self.channel.send({"id": number, "op": op, **arguments})
            self._next_request += 1
            self._requests[number] = request
        self.flush()
        return request

    def call(self, op: str, *, timeout: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its result; raises the errors of :meth:`PendingRequest.wait`."""
        return self.request(op, **arguments).wait(timeout)

    def open_stream(self) -> Stream:
        """Open a stream; pass its ``number`` in the request that uses it.

        Raises:
            MachineCrashed: The machine has ended.
            MachineError: Too many streams are open, possibly because the guest does not close its ends.
        """
        with self.changed:
            if self.failure:
                raise self.failure
            if self.channel.open_streams >= MAX_STREAMS:
                raise MachineError(f"{MAX_STREAMS} streams are open; the guest may not have closed its ends")
            stream = Stream(self, self._next_stream)
            self.channel.open(stream.number)
            self._streams[stream.number] = stream
            self._next_stream += 1
        return stream

    def forget(self, stream: Stream) -> None:
        """Drop a stream that the guest never accepted."""
        with self.changed:
            self._streams.pop(stream.number, None)
            self.channel.forget(stream.number)

    def close(self) -> None:
        """Drop the connection; waiting callers get :class:`MachineCrashed`."""
        self._fail(MachineCrashed("the machine was ended"))

    def flush(self) -> None:
        """Send queued bytes until the socket would block; the I/O thread sends the rest."""
        with self.changed:
            if self._closed:
                return
            self.bytes_sent += send_queued(self._sock, self.channel)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.channel.queued else 0)
            if events != self._events:
                self._events = events
                self.reactor.set(self._sock, events, self._ready)

    def end_for(self, violation: ProtocolViolation) -> None:
        """Drop the connection because the guest violated the protocol."""
        if self._fail(violation):
            self._on_violation()

    def _ready(self, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                self.flush()
            if mask & selectors.EVENT_READ:
                self._read()
        except MachineCrashed as failure:
            self._fail(failure)
        except WireError as error:
            self.end_for(ProtocolViolation(f"the guest broke the protocol: {error}"))
        except Exception as error:
            self._fail(MachineError(f"the connection to the machine failed: {error!r}"))
            raise

    def _read(self) -> None:
        with self.changed:
            if self._closed:
                return
            data = receive(self._sock)
            self.bytes_received += len(data)
            for event in self.channel.receive(data):
                self._handle(event)
            self.changed.notify_all()
        self.flush()

    def _handle(self, event: object) -> None:
        if isinstance(event, Data):
            self._streams[event.stream].came(event.data)
        elif isinstance(event, Closed):
            self._streams.pop(event.stream).end()
        elif isinstance(event, Message):
            number = number_field(event.body, "id")
            request = self._requests.pop(number, None)
            if request is None:
                raise WireError(f"an answer to request {number}, which is not waiting for one")
            request.reply = event.body

    def _fail(self, failure: MachineError) -> bool:
        with self.changed:
            if self._closed:
                return False
            self._closed = True
            self.failure = failure
            self._requests.clear()
            self._streams.clear()
            self.channel.take()
            self.changed.notify_all()
        self.reactor.remove(self._sock)
        self._sock.close()
        return True
