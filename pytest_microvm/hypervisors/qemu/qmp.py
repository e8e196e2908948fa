"""QEMU Machine Protocol client on QEMU's control socket: one command at a time, events are queued.

QEMU is trusted, but a guest that broke out of it may speak in its place: input is bounded, and every response
has a timeout. Source: docs/interop/qmp-spec of QEMU.
"""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from typing import Any

from pytest_microvm.errors import MachineError
from pytest_microvm.untrusted.text import sanitize_line

_MAX_LINE = 1024 * 1024
_MAX_DRAINED = 10_000  # events; QEMU sends only a few in its lifetime


class QmpError(MachineError):
    """QEMU rejected a command, broke the protocol, or is gone."""


class Qmp:
    """A connection to one QEMU process.

    Args:
        sock: A connected Unix stream socket; owned from here on.
        timeout: Seconds to wait for any response.
    """

    def __init__(self, sock: socket.socket, timeout: float = 30.0) -> None:
        self._sock = sock
        self._timeout = timeout
        self._buffer = bytearray()
        self.events: deque[dict[str, Any]] = deque(maxlen=256)
        self.version = (0, 0)
        """QEMU's version (major, minor), known from its greeting."""

    def greet(self) -> None:
        """Read the greeting and leave negotiation mode.

        Raises:
            QmpError: There was none.
        """
        greeting = self._read(self._timeout)
        try:
            version = greeting["QMP"]["version"]["qemu"]
            self.version = (int(version["major"]), int(version["minor"]))
        except (KeyError, TypeError, ValueError):
            raise QmpError("QEMU did not greet on its control socket") from None
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: dict[str, Any] | None = None, fd: int | None = None) -> Any:
        """Run ``command`` and return its result.

        Args:
            command: Its name.
            arguments: Its arguments.
            fd: A descriptor to pass along (SCM_RIGHTS), for ``getfd`` and ``add-fd``.

        Raises:
            QmpError: QEMU refused it, did not answer in time, or is gone.
        """
        message = json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n"
        try:
            self._sock.settimeout(self._timeout)
            if fd is None:
                self._sock.sendall(message)
            else:
                socket.send_fds(self._sock, [message], [fd])
        except OSError as error:
            raise QmpError(f"QEMU is gone ({error})") from error
        deadline = time.monotonic() + self._timeout
        while True:
            answer = self._read_before(deadline)
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                refusal = answer["error"]
                reason = refusal.get("desc") if isinstance(refusal, dict) else refusal
                raise QmpError(f"QEMU refused {command}: {sanitize_line(str(reason))}")
            else:
                return answer.get("return")

    def wait_event(self, name: str, accept: Any = lambda _data: True) -> dict[str, Any]:
        """Wait for an event ``name`` whose data satisfies ``accept``; return its data.

        Raises:
            QmpError: It did not come in time, or QEMU is gone.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            while self.events:
                event = self.events.popleft()
                data: dict[str, Any] = event.get("data", {})
                if event["event"] == name and accept(data):
                    return data
            answer = self._read_before(deadline)
            if "event" in answer:
                self.events.append(answer)

    def drain_events(self) -> list[dict[str, Any]]:
        """Return every event received so far, without waiting."""
        try:
            for _ in range(_MAX_DRAINED):
                answer = self._read(0)
                if "event" in answer:
                    self.events.append(answer)
        except QmpError:
            pass  # no more
        return list(self.events)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _read_before(self, deadline: float) -> dict[str, Any]:
        """Read a response or an event before ``deadline``, which a flood of events does not extend."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise QmpError(f"QEMU did not answer within {self._timeout:.0f} s")
        return self._read(left)

    def _read(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            try:
                self._sock.settimeout(max(0.0, deadline - time.monotonic()))  # 0: only what is there
                data = self._sock.recv(65536)
            except (TimeoutError, BlockingIOError):
                raise QmpError(f"QEMU did not answer within {timeout:.0f} s") from None
            except OSError as error:
                raise QmpError(f"QEMU is gone ({error})") from error
            if not data:
                raise QmpError("QEMU has ended")
            self._buffer += data
            if len(self._buffer) > _MAX_LINE:
                raise QmpError("QEMU sent a line that is too long")
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise QmpError(f"QEMU sent what is not JSON: {line[:100]!r}") from None
        if not isinstance(answer, dict):
            raise QmpError(f"QEMU sent what is not an answer: {line[:100]!r}")
        if "event" in answer and not (
            isinstance(answer["event"], str) and isinstance(answer.setdefault("data", {}), dict)
        ):
            raise QmpError(f"QEMU sent what is no event: {line[:100]!r}")
        return answer
