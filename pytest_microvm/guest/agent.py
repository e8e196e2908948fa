"""The agent: PID 1 of a machine. Runs commands, transfers files, and answers the host on one port.

One thread serves the port and the children's pipes; each file transfer has a short-lived thread of
its own. When the host closes the port, or the agent dies, the machine ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

from pytest_microvm.guest import resume
from pytest_microvm.guest.children import Children
from pytest_microvm.guest.event_loop import READ, EventLoop
from pytest_microvm.guest.files import path_operation
from pytest_microvm.guest.limits import Refusals, enter_group, forbid_thrashing
from pytest_microvm.guest.port import Port, open_port
from pytest_microvm.guest.replies import reply, reply_error
from pytest_microvm.guest.transfers import Transfers
from pytest_microvm.guest.users import user_operation
from pytest_microvm.wire.channel import Closed, Credit, Data, Message

if TYPE_CHECKING:
    from collections.abc import Callable

RB_AUTOBOOT = 0x01234567


class Agent:
    """The agent: its port, event loop and operations."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._changed = threading.Condition(threading.RLock())
        self._loop = EventLoop()
        self._children = Children(port, self._loop, self._changed)
        self._transfers = Transfers(port, self._changed)
        self._refusals: Refusals | None = None
        self.operations: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
            "exec": self._children.start,
            "info": _machine_info,
            "pack": self._transfers.pack,
            "path": path_operation,
            "poll": self._children.poll,
            "read": self._transfers.read,
            "resize": self._children.resize,
            "resume": resume.apply,
            "root_changes": self._transfers.root_changes,
            "signal": self._children.signal,
            "unpack": self._transfers.unpack,
            "user": user_operation,
            "wait": self._children.wait,
            "write": self._transfers.write,
        }

    def serve(self) -> None:
        """Answer the host until it closes the port."""
        wake_read, wake_write = os.pipe()
        for descriptor in (wake_read, wake_write):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        self._loop.watch(wake_read, READ, lambda _mask: self._reap(wake_read))
        self._loop.watch(self._port.fd, READ, self._receive)
        if os.getpid() == 1:  # skipped in tests, which run the agent as a process of the host
            self._begin_machine()
        self._port.flush()
        while True:
            for ready, mask in self._loop.ready():
                ready(mask)

    def _begin_machine(self) -> None:
        from pytest_microvm.guest import network_start  # noqa: PLC0415 - tests run the agent without it

        forbid_thrashing()
        resume.make_ready()
        network_start.start()  # outside the control group: it does not count towards the process limit
        refusals = self._refusals = enter_group()
        if refusals is not None:
            self._loop.watch(refusals.fileno(), READ, lambda _mask: refusals.tell())

    def _receive(self, _mask: int) -> None:
        with self._changed:
            generation = self._port.generation
            events = self._port.receive()
            if self._port.generation != generation:  # the host of this machine's template is gone
                self._children.abandon()
                self._transfers.abort()
            for event in events:
                if isinstance(event, Message):
                    self._answer(event.body)
                elif isinstance(event, Data):
                    self._transfers.data(event.stream, event.data)
                    self._children.pump.data(event.stream, event.data)
                elif isinstance(event, Credit):
                    self._children.pump.credit(event.stream)
                elif isinstance(event, Closed):
                    self._transfers.closed(event.stream)
                    self._children.pump.closed(event.stream)
            self._port.flush()
            self._changed.notify_all()

    def _answer(self, body: dict[str, Any]) -> None:
        number = body.get("id")
        try:
            result = self.operations[body["op"]](body)
        except Exception as error:  # noqa: BLE001 - any failure is the request's answer
            reply_error(self._port.channel, number, error)
        else:
            if result is not None:
                reply(self._port.channel, number, result)

    def _reap(self, wake: int) -> None:
        while True:
            try:
                if not os.read(wake, 4096):
                    break
            except BlockingIOError:
                break
        if self._refusals is not None:
            self._refusals.tell()  # before the host hears that a command has ended
        self._children.reap()


def _machine_info(_body: dict[str, Any]) -> dict[str, Any]:
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
