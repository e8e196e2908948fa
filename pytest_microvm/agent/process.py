"""A command in a machine, used like :class:`subprocess.Popen`."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from pytest_microvm.agent.answers import Answer
from pytest_microvm.agent.link import GuestError
from pytest_microvm.agent.streams import Stream, read_any
from pytest_microvm.errors import MachineError, UsageError
from pytest_microvm.settings.spec import DEFAULT_OUTPUT
from pytest_microvm.untrusted.redaction import RedactedStream, Redactor
from pytest_microvm.wire.channel import WINDOW

if TYPE_CHECKING:
    from typing_extensions import Self

    from pytest_microvm.agent.client import AgentClient

_ANSWER = 60.0  # seconds for the agent to start or signal a process; only a dead machine takes longer


def command_arguments(
    args: str | Sequence[str | PurePosixPath],
    env: Mapping[str, str],
    cwd: str | PurePosixPath | None,
    user: str | int | None,
) -> dict[str, Any]:
    """Return the agent's ``exec`` request for a command, without its streams.

    Raises:
        UsageError: The command is empty or contains a NUL character.
    """
    request: dict[str, Any] = {"env": dict(env), "cwd": str(cwd) if cwd else "/"}
    if user is not None:
        request["user"] = user
    if isinstance(args, str):
        request["shell"] = args
    else:
        request["argv"] = [str(arg) for arg in args]
    words = [args] if isinstance(args, str) else request["argv"]
    if not words or not words[0]:
        raise UsageError("an empty command", resolution="give a program and its arguments")
    if any("\0" in word for word in words):
        raise UsageError(
            "a command with a NUL character", resolution="no program can be given one: remove it"
        )
    return request


class GuestProcess:
    """A running command.

    Attributes:
        args: The command, as passed by the caller.
        pid: The process ID in the machine.
        stdin: A file for writing, or ``None``.
        stdout: A file for reading.
        stderr: A file for reading; ``None`` on a terminal.
        returncode: The exit status (negative: the signal that ended it), ``None`` while it runs.
    """

    def __init__(
        self,
        client: AgentClient,
        args: str | Sequence[Any],
        request: dict[str, Any],
        *,
        stdin: bool,
        text: bool,
        pty: tuple[int, int] | None,
    ) -> None:
        self._client = client
        self._explained = client.explained
        self._said = 0
        self.args = args
        self.returncode: int | None = None
        self._link = link = client.link()
        self._text = text
        self._out = link.open_stream()
        self._err = None if pty else link.open_stream()
        self._in = link.open_stream() if stdin and not pty else None
        streams = {"stdout": self._out.number}
        if self._err:
            streams["stderr"] = self._err.number
        if self._in:
            streams["stdin"] = self._in.number
        if pty:
            streams["stdin"] = self._out.number  # a terminal is one stream, both ways
            request = {**request, "pty": list(pty)}
        self._handle = self._out.number
        starting = link.request("exec", handle=self._handle, **request, **streams)
        self._exit = link.request("wait", handle=self._handle)  # sent together: the guest wakes up once
        try:
            started = starting.wait(_ANSWER)
        except GuestError as error:
            for stream in filter(None, (self._out, self._err, self._in)):
                link.forget(stream)
            raise _as_os_error(error, request) from None
        except TimeoutError as error:
            raise MachineError(
                f"the agent does not answer: {error}", resolution="the machine hangs: start another one"
            ) from None
        self.pid = Answer(link, started).whole("pid", 1)
        self.stdin = self._open(self._out, "w", ends=False) if pty else self._open(self._in, "w")
        self.stdout = self._open(self._out, "r")
        self.stderr = self._open(self._err, "r")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        """Kill the command if it still runs (its machine is isolated), and discard its remaining output."""
        with contextlib.suppress(MachineError, TimeoutError):
            if self.poll() is None:
                self.kill()
            for stream in filter(None, (self._in, self._out, self._err)):
                stream.discard()

    def poll(self) -> int | None:
        """Return the exit status, or ``None`` while the command runs."""
        if self.returncode is None and self._exit.done:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command to end and return its exit status.

        Raises:
            subprocess.TimeoutExpired: The command still runs after ``timeout`` seconds.
            QuotaExceeded: The machine exceeded a quota and was ended.
            MachineCrashed: The machine ended.
        """
        if self.returncode is None:
            try:
                with self._explained(), self._limited(timeout):
                    result = self._exit.wait(timeout)
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self.returncode = Answer(self._link, result).whole("returncode", -255, 255)
            self._client.check_quotas()
        return self.returncode

    def communicate(
        self,
        input: str | bytes | None = None,  # noqa: A002 - subprocess's word
        timeout: float | None = None,
    ) -> tuple[Any, Any]:
        """Send ``input``, read all output, and wait for the command to end.

        Returns:
            stdout and stderr, as text or bytes.

        Raises:
            subprocess.TimeoutExpired: The command ran longer than ``timeout`` seconds and was killed.
            QuotaExceeded: The command printed more than the output limit (64 MiB by default) or exceeded
                its machine's timeout; the machine has been ended.
            MachineCrashed: The machine ended.
        """
        with self._limited(timeout):
            return self._communicate(input, timeout)

    def _communicate(self, input: str | bytes | None, timeout: float | None) -> tuple[Any, Any]:  # noqa: A002
        deadline = None if timeout is None else time.monotonic() + timeout
        streams = [self._out, *([self._err] if self._err else [])]
        parts: dict[int, bytearray] = {stream.number: bytearray() for stream in streams}
        self._send_input(input)
        try:
            while streams:
                with self._explained():
                    came = read_any(streams, _left(deadline))
                for stream, data in came:
                    if not data:
                        streams.remove(stream)
                    parts[stream.number] += data
                    self._count(data, DEFAULT_OUTPUT)
            self.wait(_left(deadline))
        except (TimeoutError, subprocess.TimeoutExpired):
            with contextlib.suppress(TimeoutError):  # the machine may hang as a whole
                self.kill()
            out, err = (self._decode(bytes(part)) for part in (*parts.values(), bytearray())[:2])
            raise subprocess.TimeoutExpired(self.args, timeout or 0, out, err) from None
        values = [self._decode(bytes(part)) for part in parts.values()]
        return values[0], values[1] if self._err else None

    def send_signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        if self.poll() is None:
            with self._explained():
                self._link.call("signal", timeout=_ANSWER, handle=self._handle, signal=int(number))

    def terminate(self) -> None:
        """Send SIGTERM to the command's process group."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the command's process group."""
        self.send_signal(signal.SIGKILL)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal."""
        with self._explained():
            self._link.call("resize", timeout=_ANSWER, handle=self._handle, size=[rows, columns])

    def _limited(self, timeout: float | None) -> AbstractContextManager[None]:
        """Return a context that applies the machine's timeout unless the caller passed one."""
        if timeout is not None:
            return contextlib.nullcontext()
        return self._client.limited(
            self.args if isinstance(self.args, str) else " ".join(map(str, self.args))
        )

    def _count(self, data: bytes, default: int | None = None) -> None:
        """Count the command's output against its limit, ``default`` if the machine has none.

        Raises:
            QuotaExceeded: The command printed more than the limit.
        """
        self._said += len(data)
        limit = self._client.output_limit or default
        if limit is not None and self._said > limit:
            raise self._client.output_exceeded(self._said, limit)

    def _send_input(self, data: str | bytes | None) -> None:
        stream = self._in or (self._out if self._err is None else None)
        if stream is None:
            return
        raw = data.encode() if isinstance(data, str) else data or b""
        ends = self._in is not None  # a terminal's one stream carries its output too
        if len(raw) <= WINDOW:
            _feed(stream, raw, ends=ends)
        else:  # writing may block until the command reads, which may itself wait for us to read its output
            feeder = threading.Thread(
                target=_feed, args=(stream, raw), kwargs={"ends": ends}, name="microvm-stdin", daemon=True
            )
            feeder.start()

    def _decode(self, data: bytes) -> str | bytes:
        data = self._client.redactor.raw(data)
        return data.decode(errors="replace").replace("\r\n", "\n") if self._text else data

    def _open(self, stream: Stream | None, mode: str, *, ends: bool = True) -> IO[Any] | None:
        if stream is None:
            return None
        redactor = self._client.redactor
        raw = StreamFile(
            stream, mode, ends=ends, explained=self._explained, count=self._count, redactor=redactor
        )
        if mode == "r":
            buffered: IO[bytes] = io.BufferedReader(raw, 65536)
        else:
            buffered = raw  # type: ignore[assignment]  # unbuffered: writes are sent at once
        return io.TextIOWrapper(buffered, "utf-8", "replace", write_through=True) if self._text else buffered


class StreamFile(io.RawIOBase):
    """A stream of a link as an unbuffered binary file.

    Args:
        stream: The stream.
        mode: ``r`` or ``w``.
        ends: Whether closing a file opened for writing ends the stream's direction.
        explained: Returns the context for each read and write.
        count: Called with the bytes of each read.
        redactor: Removes secrets from the bytes read.
    """

    def __init__(
        self,
        stream: Stream,
        mode: str,
        *,
        ends: bool = True,
        explained: Callable[[], AbstractContextManager[Any]],
        count: Callable[[bytes], None],
        redactor: Redactor,
    ) -> None:
        super().__init__()
        self._count = count
        self._redacted = RedactedStream(redactor) if redactor else None
        self._shown = b""
        self._stream = stream
        self._mode = mode
        self._ends = ends
        self._explained = explained

    def readable(self) -> bool:
        """Return True if the file was opened for reading."""
        return self._mode == "r"

    def writable(self) -> bool:
        """Return True if the file was opened for writing."""
        return self._mode == "w"

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes, store them in ``buffer`` and return their number; 0 at the end."""
        data = self._read(len(buffer)) if self._redacted is None else self._read_redacted(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        with self._explained():
            data = self._stream.read(size)
            self._count(data)
        return data

    def _read_redacted(self, size: int) -> bytes:
        assert self._redacted is not None
        while not self._shown:
            data = self._read(size)
            self._shown = self._redacted.feed(data) if data else self._redacted.end()
            if not data:
                break
        shown, self._shown = self._shown[:size], self._shown[size:]
        return shown

    def write(self, data: Any) -> int:
        """Send all of ``data``."""
        raw = bytes(data)
        with self._explained():
            self._stream.write(raw)
        return len(raw)

    def close(self) -> None:
        """Schedule the end of the sending direction; scheduled, because a finalizer may call this method."""
        if not self.closed and self._mode == "w" and self._ends:
            self._stream.close_soon()
        super().close()


def _feed(stream: Stream, data: bytes, *, ends: bool) -> None:
    # The command need not read its input. ValueError: the stream has been discarded in the meantime.
    with contextlib.suppress(BrokenPipeError, MachineError, ValueError):
        stream.write(data)
    if ends:
        stream.close()


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _as_os_error(error: GuestError, request: Mapping[str, Any]) -> Exception:
    program = request.get("argv", ["/bin/sh"])[0]
    if error.kind in ("FileNotFoundError", "NotADirectoryError"):
        return FileNotFoundError(error.errno or 2, f"in the machine: {error.message}", program)
    if error.kind == "PermissionError":
        return PermissionError(error.errno or 13, f"in the machine: {error.message}", program)
    return error
