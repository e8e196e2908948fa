"""The host's end of a guest's port: a socket with a channel, requests and byte streams.

One daemon thread per process (:class:`_Reactor`) reads every guest's sockets; callers wait on
conditions. A guest cannot block that thread, nor grow the host's memory beyond ``WINDOW`` bytes per
stream and one message per request, with at most ``MAX_UNANSWERED`` requests.

The kernel may reuse the number of a closed descriptor for another link at once. So a socket is read
and written only under its owner's lock, after a check that it is still open.
"""

from __future__ import annotations

import contextlib
import io
import os
import selectors
import socket
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from pytest_microvm.errors import MachineCrashed, MachineError, ProtocolViolation
from pytest_microvm.untrusted.redaction import Redactor
from pytest_microvm.untrusted.text import sanitize, sanitize_line
from pytest_microvm.wire.channel import MAX_STREAMS, Channel, Closed, Data, Hello, Message
from pytest_microvm.wire.frames import WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TAIL_SIZE = 256 * 1024  # bytes per console read: more than a socket buffers, so one read reaches the end
_READ_SIZE = 64 * 1024  # bytes per read or write: no link occupies the I/O thread for long
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


class _Reactor:
    """The process's single I/O thread, which runs callbacks when sockets are ready.

    Sockets may be registered and removed while the thread waits: epoll and kqueue need no wake-up for
    that. A callback may run once more just after :meth:`remove`.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._calls: deque[Callable[[], None]] = deque()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._run_calls)
        threading.Thread(target=self._run, name="microvm-io", daemon=True).start()

    def set(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(mask)`` on the I/O thread whenever ``sock`` is ready for one of ``events``."""
        with self._lock:
            if sock in self._selector.get_map():
                self._selector.modify(sock, events, callback)
            else:
                self._selector.register(sock, events, callback)

    def remove(self, sock: socket.socket) -> None:
        """Unregister ``sock``; call this before closing it."""
        with self._lock, contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def soon(self, call: Callable[[], None]) -> None:
        """Run ``call`` on the I/O thread, without taking a lock, so that finalizers may use this method.

        Garbage collection may run in any thread at any allocation, even while the thread holds the lock of
        this object or of a link.
        """
        self._calls.append(call)
        with contextlib.suppress(BlockingIOError):  # wake-ups are already pending
            self._waker.send(b"x")

    def _run(self) -> None:
        while True:
            for key, mask in self._selector.select():
                try:
                    key.data(mask)
                except Exception:  # noqa: BLE001 - one link's failure must not stop the others' I/O
                    self.remove(key.fileobj)  # type: ignore[arg-type]  # else it is ready again at once
                    _report_exception()

    def _run_calls(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(_READ_SIZE)
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception:  # noqa: BLE001 - the remaining calls must still run
                _report_exception()


def _report_exception() -> None:
    threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


_reactor: _Reactor | None = None
_reactor_pid = 0
_reactor_lock = threading.Lock()


def reactor() -> _Reactor:
    """Return this process's I/O thread; start it at first use and after a fork."""
    global _reactor, _reactor_pid
    with _reactor_lock:
        if _reactor is None or _reactor_pid != os.getpid():
            _reactor, _reactor_pid = _Reactor(), os.getpid()
        return _reactor


class Drain:
    """Continuous reader of a socket that keeps its last ``size`` bytes (a machine's console).

    Args:
        sock: A connected stream socket, which this object now owns.
        heard: Called with the received bytes, in order, by the thread that read them.
        size: Number of bytes to keep.
    """

    def __init__(
        self, sock: socket.socket, heard: Callable[[bytes], None] = lambda _data: None, size: int = 64 * 1024
    ) -> None:
        self.received = 0
        self._sock = sock
        self._heard = heard
        self._size = size
        self._tail = bytearray()
        self._closed = False
        self._lock = threading.Lock()
        sock.setblocking(False)
        reactor().set(sock, selectors.EVENT_READ, self._ready)

    def tail(self) -> bytes:
        """Return the last ``size`` bytes received, after reading those still in the socket."""
        self._read()
        with self._lock:
            return bytes(self._tail[-self._size :])

    def close(self) -> None:
        """Stop reading and close the socket; the tail remains available."""
        with self._lock:
            self._closed = True
        reactor().remove(self._sock)
        self._sock.close()

    def _ready(self, _mask: int) -> None:
        if not self._read():
            reactor().remove(self._sock)

    def _read(self) -> bool:
        with self._lock:
            if self._closed:
                return False
            try:
                data = self._sock.recv(_TAIL_SIZE)
            except BlockingIOError:
                return True
            except OSError:
                return False
            self.received += len(data)
            self._tail += data
            del self._tail[: -self._size]
            self._heard(data)
            return bool(data)


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


def send_queued(sock: socket.socket, queue: bytearray) -> int:
    """Send and remove queued bytes until a non-blocking socket would block; return the number of bytes sent.

    A closed connection empties the queue: the socket's reader reports it.
    """
    total = 0
    try:
        while queue:
            sent = sock.send(memoryview(queue)[:_READ_SIZE])
            total += sent
            del queue[:sent]
    except BlockingIOError:
        pass
    except OSError:
        queue.clear()
    return total


def _guest_error(error: dict[str, Any], redactor: Redactor) -> GuestError:
    kind, message, number = error.get("type"), error.get("message"), error.get("errno")
    return GuestError(
        sanitize_line(redactor.text(kind), 200) if isinstance(kind, str) else "Error",
        sanitize(redactor.text(message), 10_000) if isinstance(message, str) else "",
        number if type(number) is int and 0 < number <= _MAX_ERRNO else 0,
    )


class Stream:
    """A byte stream between host and guest; requests refer to it by its ``number``."""

    def __init__(self, link: Link, number: int) -> None:
        self._link = link
        self.number = number
        self._received = bytearray()
        self._ended = False
        self._discarding = False

    @property
    def link(self) -> Link:
        """The link that carries the stream."""
        return self._link

    @property
    def ready(self) -> bool:
        """True if :meth:`read` would return immediately."""
        return bool(self._received) or self._ended

    def read(self, size: int = 65536, timeout: float | None = None) -> bytes:
        """Return between 1 and ``size`` bytes as soon as any are available, b"" at the end.

        Raises:
            TimeoutError: No bytes arrived within ``timeout`` seconds.
            MachineCrashed: The machine ended before the stream did.
        """
        link = self._link
        with link.changed:
            ready = link.changed.wait_for(lambda: self._received or self._ended or link.failure, timeout)
            if not ready:
                raise TimeoutError(f"nothing came within {timeout:g} s")
            data = bytes(self._received[:size])
            del self._received[:size]
            if not data and not self._ended and link.failure:
                raise link.failure
            link.channel.consumed(self.number, len(data))
        link.flush()
        return data

    def read_all(self, limit: int, timeout: float | None = None) -> bytes:
        """Return all bytes up to the stream's end.

        Raises:
            TimeoutError: The stream did not end within ``timeout`` seconds.
            ProtocolViolation: More than ``limit`` bytes arrived; the machine has been ended.
            MachineCrashed: The machine ended before the stream did.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        received = io.BytesIO()  # its getvalue() does not copy
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            data = self.read(timeout=left)
            if not data:
                return received.getvalue()
            received.write(data)
            if received.tell() > limit:
                violation = ProtocolViolation(f"the guest sent more than the {limit} bytes allowed here")
                self._link.end_for(violation)
                raise violation

    def write(self, data: bytes, timeout: float | None = None) -> None:
        """Send all of ``data``, waiting for the guest to consume earlier bytes where needed.

        Raises:
            TimeoutError: The guest did not accept all bytes within ``timeout`` seconds.
            BrokenPipeError: The guest has closed its end.
            ValueError: This end of the stream is closed.
            MachineCrashed: The machine ended.
        """
        link, channel = self._link, self._link.channel
        deadline = None if timeout is None else time.monotonic() + timeout
        view = memoryview(data)
        while view:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            with link.changed:
                if not link.changed.wait_for(lambda: channel.room(self.number) != 0 or link.failure, left):
                    raise TimeoutError(f"the guest did not take everything within {timeout:g} s")
                if link.failure:
                    raise link.failure
                if not channel.is_open(self.number):
                    raise BrokenPipeError(f"stream {self.number} is closed")
                sent = channel.write(self.number, bytes(view[:65536]))
            view = view[sent:]
            link.flush()

    def close(self) -> None:
        """Close the sending direction: the guest sees the stream's end."""
        with self._link.changed:
            self._link.channel.close(self.number)
            self._link.changed.notify_all()  # another thread may be waiting in write()
        self._link.flush()

    def close_soon(self) -> None:
        """Schedule :meth:`close` on the I/O thread; unlike ``close``, a finalizer may call this."""
        self._link.reactor.soon(self.close)

    def discard(self) -> None:
        """Close this end and drop all bytes that still arrive."""
        with self._link.changed:
            self._discarding = True
            self._link.channel.consumed(self.number, len(self._received))
            self._received.clear()
            self._link.channel.close(self.number)
            self._link.changed.notify_all()
        self._link.flush()

    def _came(self, data: bytes) -> None:
        if self._discarding:
            self._link.channel.consumed(self.number, len(data))
        else:
            self._received += data

    def _end(self) -> None:
        self._ended = True
        self._link.channel.close(self.number)  # the guest's CLOSE ends the sending direction too


def read_any(streams: Sequence[Stream], timeout: float | None) -> list[tuple[Stream, bytes]]:
    """Wait until any of a link's ``streams`` is ready; return the bytes of each ready one, b"" at its end.

    Raises:
        TimeoutError: No stream was ready within ``timeout`` seconds.
        MachineCrashed: The machine ended.
    """
    link = streams[0].link
    with link.changed:
        if not link.changed.wait_for(lambda: link.failure or any(s.ready for s in streams), timeout):
            raise TimeoutError(f"nothing came within {timeout:g} s")
        ready = [stream for stream in streams if stream.ready]
        if not ready and link.failure:
            raise link.failure
    return [(stream, stream.read()) for stream in ready]


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
        self._out = bytearray()
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
            self._out += self.channel.take()
            self.bytes_sent += send_queued(self._sock, self._out)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
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
        except WireError as error:
            self.end_for(ProtocolViolation(f"the guest broke the protocol: {error}"))
        except Exception as error:
            self._fail(MachineError(f"the connection to the machine failed: {error!r}"))
            raise

    def _read(self) -> None:
        with self.changed:
            if self._closed:
                return
            try:
                data = self._sock.recv(_READ_SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data:
                self.bytes_received += len(data)
                for event in self.channel.receive(data):
                    self._handle(event)
                self.changed.notify_all()
        if data:
            self.flush()
        else:
            self._fail(MachineCrashed("the machine ended"))

    def _handle(self, event: object) -> None:
        if isinstance(event, Data):
            self._streams[event.stream]._came(event.data)  # noqa: SLF001 - Link and Stream share state
        elif isinstance(event, Closed):
            self._streams.pop(event.stream)._end()  # noqa: SLF001
        elif isinstance(event, Message):
            number = event.body.get("id")
            if type(number) is not int:
                raise WireError("a message without a number")
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
            self._out.clear()
            self.changed.notify_all()
        self.reactor.remove(self._sock)
        self._sock.close()
        return True
