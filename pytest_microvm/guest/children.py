"""The commands that the host has started, by handle: started, signalled, waited for, reaped."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from pytest_microvm.guest.process import Child, reap, set_window_size
from pytest_microvm.guest.pump import Pump
from pytest_microvm.guest.replies import reply

if TYPE_CHECKING:
    import threading

    from pytest_microvm.guest.event_loop import EventLoop
    from pytest_microvm.guest.port import Port


class Children:
    """The agent's child processes.

    Args:
        port: The connection to the host.
        loop: The event loop that watches their pipes.
        changed: Guards the port and the commands.
    """

    def __init__(self, port: Port, loop: EventLoop, changed: threading.Condition) -> None:
        self.pump = Pump(port, loop, changed, self._forget_if_done)
        self._port = port
        self._changed = changed
        self._by_handle: dict[int, Child] = {}
        self._vital: set[int] = set()  # pids of processes whose end must end the machine

    def start(self, body: dict[str, Any]) -> dict[str, Any]:
        """Start a command."""
        handle = body["handle"]
        child = self._by_handle[handle] = Child(handle, body)
        if body.get("vital"):
            self._vital.add(child.pid)
        self.pump.start(child)
        return {"handle": handle, "pid": child.pid}

    def wait(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """Report a command's end, now or as soon as it ends."""
        child = self._by_handle[body["handle"]]
        if child.returncode is None:
            child.waiters.append(body["id"])
            return None
        return self._exit_report(child)

    def poll(self, body: dict[str, Any]) -> dict[str, Any]:
        """Report a command's exit status, if it has ended."""
        return {"returncode": self._by_handle[body["handle"]].returncode}

    def signal(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send a signal to a command."""
        child = self._by_handle.get(body["handle"])
        if child is not None:  # otherwise it has ended, and so have its pipes
            with contextlib.suppress(ProcessLookupError):  # it may end by itself at any moment
                child.signal(body["signal"])
        return {}

    def resize(self, body: dict[str, Any]) -> dict[str, Any]:
        """Set the window size of a command's terminal."""
        child = self._by_handle.get(body["handle"])
        if child is not None and child.terminal:
            for descriptor in child.outputs:
                set_window_size(descriptor, body["size"])
        return {}

    def reap(self) -> None:
        """Reap the processes that have ended, and report them to the host.

        Raises:
            SystemExit: A vital process has ended.
        """
        running = {child.pid: child for child in self._by_handle.values() if child.returncode is None}
        for pid, status, usage in reap():
            if pid in self._vital:
                raise SystemExit(f"microvm: a vital process ended (wait status {status})")
            child = running.get(pid)
            if child is None:
                continue  # an orphan that PID 1 inherited
            child.reaped(status, usage)
            with self._changed:
                self.pump.finish(child)
                for number in child.waiters:
                    reply(self._port.channel, number, self._exit_report(child))
                self._forget_if_done(child)
                self._port.flush()

    def abandon(self) -> None:
        """Let all commands run on unobserved: their host is gone."""
        children = list(self._by_handle.values())
        self.pump.abandon(children)
        for child in children:
            child.waiters.clear()
            child.reported = True
            self._forget_if_done(child)

    def _exit_report(self, child: Child) -> dict[str, Any]:
        child.reported = True
        self._forget_if_done(child)
        return {"returncode": child.returncode, "usage": child.usage}

    def _forget_if_done(self, child: Child) -> None:
        """Drop a child that has ended, was reported to the host, and whose pipes are read to the end."""
        done = child.returncode is not None and child.reported and not child.outputs
        if done and self._by_handle.get(child.handle) is child:  # a new host end reuses handles
            del self._by_handle[child.handle]
