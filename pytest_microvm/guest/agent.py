"""The agent: PID 1 of a machine. Runs commands, transfers files, and answers the host on one port.

One thread serves the port and the children's pipes; each file transfer has a short-lived thread of
its own. When the host closes the port, or the agent dies, the machine ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from pytest_microvm.guest import resume
from pytest_microvm.guest.files import StreamReader, StreamWriter, pack, path_operation, unpack
from pytest_microvm.guest.limits import Refusals, enter_group, forbid_thrashing
from pytest_microvm.guest.port import Port, open_port
from pytest_microvm.guest.process import READ_SIZE, Child, reap, set_window_size
from pytest_microvm.wire.channel import Closed, Credit, Data, Message

RB_AUTOBOOT = 0x01234567


class Transfer:
    """A stream that a file transfer's thread reads or writes with blocking calls."""

    def __init__(self, agent: Agent, stream: int) -> None:
        self._agent = agent
        self._stream = stream
        self._channel = agent.port.channel
        self._received = bytearray()
        self._ended = False

    def came(self, data: bytes) -> None:
        """Buffer bytes from the host (called with the agent's condition held)."""
        self._received += data

    def end(self) -> None:
        """Record that the host has closed its side."""
        self._ended = True

    def read(self) -> bytes:
        """Wait for bytes and return those received; b"" at the end."""
        agent = self._agent
        with agent.changed:
            agent.changed.wait_for(lambda: self._received or self._ended)
            data = bytes(self._received)
            self._received.clear()
            self._channel.consumed(self._stream, len(data))
            agent.port.flush()
        return data

    def write(self, data: bytes) -> None:
        """Send all of ``data``, waiting for the host's credit."""
        agent = self._agent
        view = memoryview(data)
        while view:
            with agent.changed:
                if self._ended:
                    raise BrokenPipeError("the host stopped reading")
                sent = self._channel.write(self._stream, bytes(view[:READ_SIZE]))
                agent.port.flush()
                if not sent:
                    agent.changed.wait()
            view = view[sent:]

    def close(self) -> None:
        """End this side of the stream."""
        with self._agent.changed:
            self._channel.close(self._stream)
            self._agent.transfers.pop(self._stream, None)
            self._agent.port.flush()


class Agent:
    """The agent: its child processes by handle, and its streams by use."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self.changed = threading.Condition(threading.RLock())
        self.transfers: dict[int, Transfer] = {}
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, Child] = {}
        self._inputs: dict[int, Child] = {}
        self._stalled: dict[int, tuple[int, Child]] = {}  # stream -> pipe that waits for credit
        self._leftover: dict[int, bytes] = {}  # stream -> bytes read from the pipe, not yet sent
        self._refusals: Refusals | None = None
        self._vital: set[int] = set()  # pids of processes whose end must end the machine

    def serve(self) -> None:
        """Answer the host until it closes the port."""
        wake_read, wake_write = os.pipe()
        for descriptor in (wake_read, wake_write):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        self._selector.register(wake_read, selectors.EVENT_READ, lambda: self._reap(wake_read))
        self._selector.register(self.port.fd, selectors.EVENT_READ, self._receive)
        if os.getpid() == 1:  # skipped in tests, which run the agent as a process of the host
            self._begin_machine()
        self.port.flush()
        while True:
            for key, _mask in self._selector.select():
                # An earlier handler may have closed the file, and its descriptor may be in use again.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()

    def _begin_machine(self) -> None:
        from pytest_microvm.guest import network_start  # noqa: PLC0415 - tests run the agent without it

        forbid_thrashing()
        resume.make_ready()
        network_start.start()  # outside the control group: it does not count towards the process limit
        self._refusals = enter_group()
        if self._refusals is not None:
            self._selector.register(self._refusals, selectors.EVENT_READ, self._refusals.tell)

    # The port

    def _receive(self) -> None:
        with self.changed:
            generation = self.port.generation
            events = self.port.receive()
            if self.port.generation != generation:
                self._forget_connection()
            for event in events:
                if isinstance(event, Message):
                    self._answer(event.body)
                elif isinstance(event, Data):
                    self._data(event.stream, event.data)
                elif isinstance(event, Credit):
                    self._credit(event.stream)
                elif isinstance(event, Closed):
                    self._closed(event.stream)
            self.port.flush()
            self.changed.notify_all()

    def _answer(self, body: dict[str, Any]) -> None:
        number = body.get("id")
        try:
            handler = _OPERATIONS[body["op"]]
            result = handler(self, body)
        except Exception as error:  # noqa: BLE001 - any failure is the request's answer
            self._reply_error(number, error)
        else:
            if result is not None:
                self._reply(number, result)

    def _reply(self, number: Any, result: dict[str, Any]) -> None:
        self.port.channel.send({"id": number, "result": result})

    def _reply_error(self, number: Any, error: BaseException) -> None:
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{message}: {error.filename!r}"
        answer = {
            "type": type(error).__name__,
            "message": message[:4000],
            "errno": getattr(error, "errno", 0) or 0,
        }
        self.port.channel.send({"id": number, "error": answer})

    def _forget_connection(self) -> None:
        """Drop all state of the previous host connection, made by this machine's template."""
        for child in list(self._children.values()):
            for descriptor in list(child.outputs):
                self._discard_output(child, descriptor)
            self._drop_input(child)
            child.waiters.clear()
            child.reported = True
            self._forget_if_done(child)
        self._inputs.clear()
        self._stalled.clear()
        self._leftover.clear()
        for transfer in self.transfers.values():
            transfer.end()

    def _data(self, stream: int, data: bytes) -> None:
        if stream in self.transfers:
            self.transfers[stream].came(data)
        elif stream in self._inputs:
            child = self._inputs[stream]
            child.pending_input += data
            self._feed(child)

    def _closed(self, stream: int) -> None:
        if stream in self.transfers:
            self.transfers[stream].end()
        elif stream in self._inputs and not self._inputs[stream].terminal:
            child = self._inputs.pop(stream)
            child.input_ended = True
            self.port.channel.close(stream)
            self._feed(child)
        else:  # a terminal is hung up: the kernel signals its processes
            self._inputs.pop(stream, None)
            self._host_stopped_reading(stream)

    def _credit(self, stream: int) -> None:
        if stream in self._stalled:
            descriptor, child = self._stalled.pop(stream)
            self._send_output(child, descriptor, stream, self._leftover.pop(stream))
            if stream not in self._stalled and descriptor in child.outputs:
                self._go_on_with_output(child, descriptor, stream)

    # Children

    def _exec(self, body: dict[str, Any]) -> dict[str, Any]:
        handle = body["handle"]
        child = self._children[handle] = Child(handle, body)
        if body.get("vital"):
            self._vital.add(child.pid)
        streams = {*child.outputs.values()}
        if child.stdin_stream:
            streams.add(child.stdin_stream)
            self._inputs[child.stdin_stream] = child
        for stream in sorted(streams):
            self.port.channel.open(stream)
        for descriptor, stream in child.outputs.items():
            self._watch_output(child, descriptor, stream)
        return {"handle": handle, "pid": child.pid}

    def _wait(self, body: dict[str, Any]) -> dict[str, Any] | None:
        child = self._children[body["handle"]]
        if child.returncode is None:
            child.waiters.append(body["id"])
            return None
        return self._exit_report(child)

    def _poll(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"returncode": self._children[body["handle"]].returncode}

    def _signal(self, body: dict[str, Any]) -> dict[str, Any]:
        child = self._children.get(body["handle"])
        if child is not None:  # otherwise it has ended, and so have its pipes
            with contextlib.suppress(ProcessLookupError):  # it may end by itself at any moment
                child.signal(body["signal"])
        return {}

    def _resize(self, body: dict[str, Any]) -> dict[str, Any]:
        child = self._children.get(body["handle"])
        if child is not None and child.terminal:
            for descriptor in child.outputs:
                set_window_size(descriptor, body["size"])
        return {}

    def _reap(self, wake: int) -> None:
        while True:
            try:
                if not os.read(wake, 4096):
                    break
            except BlockingIOError:
                break
        if self._refusals is not None:
            self._refusals.tell()  # before the host hears that a command has ended
        by_pid = {child.pid: handle for handle, child in self._children.items() if child.returncode is None}
        for pid, status, usage in reap():
            if pid in self._vital:
                raise SystemExit(f"microvm: a vital process ended (wait status {status})")
            handle = by_pid.get(pid)
            if handle is None:
                continue  # an orphan that PID 1 inherited
            child = self._children[handle]
            child.reaped(status, usage)
            with self.changed:
                for descriptor, stream in list(child.outputs.items()):
                    if stream not in self._stalled:
                        self._go_on_with_output(child, descriptor, stream)
                for number in child.waiters:
                    self._reply(number, self._exit_report(child))
                self._forget_if_done(child)
                self.port.flush()

    def _exit_report(self, child: Child) -> dict[str, Any]:
        child.reported = True
        self._forget_if_done(child)
        return {"returncode": child.returncode, "usage": child.usage}

    def _forget_if_done(self, child: Child) -> None:
        """Drop a child that has ended, was reported to the host, and whose pipes are read to the end."""
        done = child.returncode is not None and child.reported and not child.outputs
        if done and self._children.get(child.handle) is child:  # a new host end reuses handles
            del self._children[child.handle]

    def _watch_output(self, child: Child, descriptor: int, stream: int) -> None:
        if descriptor not in self._selector.get_map():
            self._selector.register(
                descriptor, selectors.EVENT_READ, lambda: self._output(child, descriptor, stream)
            )

    def _output(self, child: Child, descriptor: int, stream: int) -> None:
        data = _read(descriptor, child.next_read(descriptor))
        with self.changed:
            if data:
                child.was_read(descriptor, len(data))
                self._send_output(child, descriptor, stream, data)
                if stream not in self._stalled:
                    self._go_on_with_output(child, descriptor, stream)
            else:
                self._drop_output(child, descriptor)
                self.port.channel.close(stream)
            self.port.flush()

    def _go_on_with_output(self, child: Child, descriptor: int, stream: int) -> None:
        """Wait for more output, or end the stream if all output of the command itself has been sent."""
        if child.next_read(descriptor):
            self._watch_output(child, descriptor, stream)
        else:
            self._discard_output(child, descriptor)
            self.port.channel.close(stream)

    def _discard_output(self, child: Child, descriptor: int) -> None:
        """Discard output of a command's background processes, which would fail if the pipe were closed."""
        self._unwatch(descriptor)
        child.outputs.pop(descriptor, None)
        if child.terminal:
            self._drop_input(child)
        self._selector.register(descriptor, selectors.EVENT_READ, lambda: self._discard(descriptor))
        self._forget_if_done(child)

    def _discard(self, descriptor: int) -> None:
        if not _read(descriptor, READ_SIZE):
            self._unwatch(descriptor)
            os.close(descriptor)

    def _send_output(self, child: Child, descriptor: int, stream: int, data: bytes) -> None:
        sent = self.port.channel.write(stream, data)
        if sent < len(data):  # the host is slower than the command: let the pipe fill up
            self._leftover[stream] = data[sent:]
            self._stalled[stream] = (descriptor, child)
            self._unwatch(descriptor)

    def _drop_output(self, child: Child, descriptor: int) -> None:
        self._unwatch(descriptor)
        child.outputs.pop(descriptor, None)
        os.close(descriptor)
        if child.terminal:  # both directions end together
            self._drop_input(child)
        self._forget_if_done(child)

    def _host_stopped_reading(self, stream: int) -> None:
        for child in list(self._children.values()):
            for descriptor, number in list(child.outputs.items()):
                if number == stream:
                    self._stalled.pop(stream, None)
                    self._leftover.pop(stream, None)
                    self._drop_output(child, descriptor)
                    self.port.channel.close(stream)

    def _unwatch(self, descriptor: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(descriptor)

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
            self.port.channel.consumed(child.stdin_stream, written)
        if child.pending_input:
            self._watch_input(child)
        elif child.input_ended:
            self._drop_input(child)
        else:
            self._unwatch(descriptor)

    def _drop_input(self, child: Child) -> None:
        """Close the command's stdin and drop pending input."""
        if child.stdin is not None:
            self._unwatch(child.stdin)
            os.close(child.stdin)
            child.stdin = None
        self._discard_input(child)

    def _discard_input(self, child: Child) -> None:
        if child.stdin_stream:
            self.port.channel.consumed(child.stdin_stream, len(child.pending_input))
        child.pending_input.clear()

    def _watch_input(self, child: Child) -> None:
        if child.stdin is not None and child.stdin not in self._selector.get_map():
            self._selector.register(child.stdin, selectors.EVENT_WRITE, lambda: self._feed_later(child))

    def _feed_later(self, child: Child) -> None:
        with self.changed:
            self._feed(child)
            self.port.flush()

    # Files

    def _transfer(self, body: dict[str, Any], work: Callable[[Transfer], None]) -> None:
        """Run ``work`` on a thread with the request's stream, and reply when it is done."""
        stream = body["stream"]
        self.port.channel.open(stream)
        transfer = self.transfers[stream] = Transfer(self, stream)

        def run() -> None:
            failure: BaseException | None = None
            try:
                work(transfer)
            except Exception as error:  # noqa: BLE001 - any failure is the request's answer
                failure = error
            transfer.close()
            with self.changed:
                if failure is None:
                    self._reply(body["id"], {})
                else:
                    self._reply_error(body["id"], failure)
                self.port.flush()

        threading.Thread(target=run, daemon=True).start()

    def _read_file(self, body: dict[str, Any]) -> None:
        def work(transfer: Transfer) -> None:
            with open(body["path"], "rb") as file:
                while data := file.read(READ_SIZE):
                    transfer.write(data)

        self._transfer(body, work)

    def _write_file(self, body: dict[str, Any]) -> None:
        def work(transfer: Transfer) -> None:
            with open(body["path"], "ab" if body.get("append") else "wb") as file:
                while data := transfer.read():
                    file.write(data)

        self._transfer(body, work)

    def _pack(self, body: dict[str, Any]) -> None:
        self._transfer(body, lambda transfer: pack(body["path"], StreamWriter(transfer.write)))

    def _unpack(self, body: dict[str, Any]) -> None:
        self._transfer(body, lambda transfer: unpack(StreamReader(transfer.read), body["path"]))

    # The machine

    def _resume(self, body: dict[str, Any]) -> dict[str, Any]:
        return resume.apply(body)

    def _path(self, body: dict[str, Any]) -> dict[str, Any]:
        return path_operation(body)

    def _info(self, _body: dict[str, Any]) -> dict[str, Any]:
        with open("/proc/meminfo") as file:
            memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in list(file)[:5]}
        disk = os.statvfs("/")
        return {
            "python": sys.version.split()[0],
            "memory_total_bytes": memory.get("MemTotal", 0),
            "memory_available_bytes": memory.get("MemAvailable", 0),
            "disk_free_bytes": disk.f_bavail * disk.f_frsize,
            "load": os.getloadavg()[0],
        }


def _read(descriptor: int, size: int) -> bytes:
    try:
        return os.read(descriptor, size)
    except OSError:  # a terminal whose last process has closed it (EIO)
        return b""


_OPERATIONS: dict[str, Callable[[Agent, dict[str, Any]], Any]] = {
    "exec": Agent._exec,
    "info": Agent._info,
    "pack": Agent._pack,
    "path": Agent._path,
    "poll": Agent._poll,
    "read": Agent._read_file,
    "resize": Agent._resize,
    "resume": Agent._resume,
    "signal": Agent._signal,
    "unpack": Agent._unpack,
    "wait": Agent._wait,
    "write": Agent._write_file,
}


def main() -> None:
    """Serve the port called ``agent``, then end the machine."""
    try:
        Agent(Port(open_port("agent"), "agent")).serve()
    except EOFError:
        pass
    except BaseException:  # noqa: BLE001 - PID 1 must not return: log to the console, then end the machine
        traceback.print_exc()
        sys.stderr.flush()
    end_machine()


def end_machine() -> None:
    """End the machine through reboot(2): QEMU runs with -no-reboot."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sync()
    libc.reboot(RB_AUTOBOOT)
    os._exit(1)  # reboot(2) was refused: the kernel panics without PID 1, which ends the machine as well
