"""Pumping of bytes between the pipes and terminals of commands and the streams of the host."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pytest_microvm.guest.event_loop import READ, WRITE
from pytest_microvm.guest.process import READ_SIZE

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable

    from pytest_microvm.guest.event_loop import EventLoop
    from pytest_microvm.guest.port import Port
    from pytest_microvm.guest.process import Child


class Pump:
    """The input and output of all commands, each with backpressure; call its methods with ``changed`` held.

    Args:
        port: The connection to the host.
        loop: The event loop that watches the pipes.
        changed: Guards the port and the commands.
        output_ended: Called with a command after one of its outputs has ended.
    """

    def __init__(
        self, port: Port, loop: EventLoop, changed: threading.Condition, output_ended: Callable[[Child], None]
    ) -> None:
        self._port = port
        self._loop = loop
        self._changed = changed
        self._output_ended = output_ended
        self._outputs: dict[int, Child] = {}  # stream -> command
        self._inputs: dict[int, Child] = {}
        self._stalled: dict[int, tuple[int, Child]] = {}  # stream -> pipe that waits for credit
        self._leftover: dict[int, bytes] = {}  # stream -> bytes read from the pipe, not yet sent

    def start(self, child: Child) -> None:
        """Open a new command's streams and watch its outputs."""
        streams = {*child.outputs.values()}
        if child.stdin_stream:
            streams.add(child.stdin_stream)
            self._inputs[child.stdin_stream] = child
        for stream in sorted(streams):
            self._port.channel.open(stream)
        for descriptor, stream in child.outputs.items():
            self._outputs[stream] = child
            self._watch_output(child, descriptor, stream)

    def finish(self, child: Child) -> None:
        """End the streams of a command that has ended once its own output has been sent."""
        for descriptor, stream in list(child.outputs.items()):
            if stream not in self._stalled:
                self._go_on_with_output(child, descriptor, stream)

    def abandon(self, children: Iterable[Child]) -> None:
        """Drop the streams of all commands and discard their further output: their host is gone."""
        for child in children:
            for descriptor in list(child.outputs):
                self._discard_output(child, descriptor)
            self._drop_input(child)
        for streams in (self._outputs, self._inputs, self._stalled, self._leftover):
            streams.clear()

    # The host

    def data(self, stream: int, data: bytes) -> None:
        """Pass bytes of the host to a command."""
        if stream in self._inputs:
            child = self._inputs[stream]
            child.pending_input += data
            self._feed(child)

    def closed(self, stream: int) -> None:
        """End a command's input, or drop an output that the host no longer reads."""
        if stream in self._inputs and not self._inputs[stream].terminal:
            child = self._inputs.pop(stream)
            child.input_ended = True
            self._port.channel.close(stream)
            self._feed(child)
        else:  # a terminal is hung up: the kernel signals its processes
            self._inputs.pop(stream, None)
            self._host_stopped_reading(stream)

    def credit(self, stream: int) -> None:
        """Go on with an output that waited for credit."""
        if stream in self._stalled:
            descriptor, child = self._stalled.pop(stream)
            self._send_output(child, descriptor, stream, self._leftover.pop(stream))
            if stream not in self._stalled and descriptor in child.outputs:
                self._go_on_with_output(child, descriptor, stream)

    # Output

    def _watch_output(self, child: Child, descriptor: int, stream: int) -> None:
        self._loop.watch(descriptor, READ, lambda _mask: self._output(child, descriptor, stream))

    def _output(self, child: Child, descriptor: int, stream: int) -> None:
        data = _read(descriptor, child.next_read(descriptor))
        with self._changed:
            if data:
                child.was_read(descriptor, len(data))
                self._send_output(child, descriptor, stream, data)
                if stream not in self._stalled:
                    self._go_on_with_output(child, descriptor, stream)
            else:
                self._drop_output(child, descriptor)
                self._port.channel.close(stream)
            self._port.flush()

    def _go_on_with_output(self, child: Child, descriptor: int, stream: int) -> None:
        """Wait for more output, or end the stream if all output of the command itself has been sent."""
        if child.next_read(descriptor):
            self._watch_output(child, descriptor, stream)
        else:
            self._discard_output(child, descriptor)
            self._port.channel.close(stream)

    def _discard_output(self, child: Child, descriptor: int) -> None:
        """Discard output of a command's background processes, which would fail if the pipe were closed."""
        self._release_output(child, descriptor)
        self._loop.watch(descriptor, READ, lambda _mask: self._discard(descriptor))

    def _discard(self, descriptor: int) -> None:
        if not _read(descriptor, READ_SIZE):
            self._loop.unwatch(descriptor)
            os.close(descriptor)

    def _send_output(self, child: Child, descriptor: int, stream: int, data: bytes) -> None:
        sent = self._port.channel.write(stream, data)
        if sent < len(data):  # the host is slower than the command: let the pipe fill up
            self._leftover[stream] = data[sent:]
            self._stalled[stream] = (descriptor, child)
            self._loop.unwatch(descriptor)

    def _drop_output(self, child: Child, descriptor: int) -> None:
        self._release_output(child, descriptor)
        os.close(descriptor)

    def _release_output(self, child: Child, descriptor: int) -> None:
        """Detach an output from its command."""
        self._loop.unwatch(descriptor)
        self._outputs.pop(child.outputs.pop(descriptor, 0), None)
        if child.terminal:  # both directions end together
            self._drop_input(child)
        self._output_ended(child)

    def _host_stopped_reading(self, stream: int) -> None:
        child = self._outputs.get(stream)
        if child is not None:
            self._stalled.pop(stream, None)
            self._leftover.pop(stream, None)
            for descriptor in [each for each, number in child.outputs.items() if number == stream]:
                self._drop_output(child, descriptor)
            self._port.channel.close(stream)

    # Input

    def _feed(self, child: Child) -> None:
        """Write pending input to the command's stdin, as much as its pipe accepts without blocking."""
        descriptor = child.stdin
        if descriptor is None:
            self._discard_input(child)
            return
        try:
            written = os.write(descriptor, child.pending_input[:READ_SIZE]) if child.pending_input else 0
        except BlockingIOError:
            written = 0
        except OSError:
            self._drop_input(child)
            return
        del child.pending_input[:written]
        if child.stdin_stream and written:
            self._port.channel.consumed(child.stdin_stream, written)
        if child.pending_input:
            self._loop.watch(descriptor, WRITE, lambda _mask: self._feed_later(child))
        elif child.input_ended:
            self._drop_input(child)
        else:
            self._loop.unwatch(descriptor)

    def _feed_later(self, child: Child) -> None:
        with self._changed:
            self._feed(child)
            self._port.flush()

    def _drop_input(self, child: Child) -> None:
        """Close the command's stdin and drop pending input."""
        if child.stdin is not None:
            self._loop.unwatch(child.stdin)
            os.close(child.stdin)
            child.stdin = None
        self._discard_input(child)

    def _discard_input(self, child: Child) -> None:
        if child.stdin_stream:
            self._port.channel.consumed(child.stdin_stream, len(child.pending_input))
        child.pending_input.clear()


def _read(descriptor: int, size: int) -> bytes:
    try:
        return os.read(descriptor, size)
    except OSError:  # a terminal whose last process has closed it (EIO)
        return b""
