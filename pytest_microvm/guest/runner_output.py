"""Output of tests that the host shows while they run (``-s``, ``--capture=tee-sys``).

Every collection is made with ``--capture=fd``, so that another ``--capture`` needs no new template. The first
test whose output the host wants to show changes pytest's capturing, in its machine.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import socket
import sys
import traceback
import warnings
from os import _exit, dup2, fork, getpid, read  # bound here: a test may replace them in os
from typing import TYPE_CHECKING, Any

from pytest_microvm.guest.output_relay import RELAY, OutputRelay
from pytest_microvm.guest.port import out_of_the_way
from pytest_microvm.guest.runner_requests import encode as encode_record
from pytest_microvm.wire.frames import MAX_PAYLOAD, Kind, encode

if TYPE_CHECKING:
    from typing import TextIO

    from pytest_microvm.guest.runner_requests import Runner


class OutsideOutput(io.StringIO):
    """What the project's code prints while pytest does not capture.

    Attributes:
        leads_to: The file that gets it instead, if any.
    """

    leads_to: TextIO | None = None

    def write(self, text: str) -> int:
        """Keep ``text``, or write it to the file."""
        return super().write(text) if self.leads_to is None else self.leads_to.write(text)

    def flush(self) -> None:
        """Flush the file."""
        if self.leads_to is not None:
            self.leads_to.flush()


class RelayProcess:
    """A process with an :class:`OutputRelay`, which waits until it is used.

    Args:
        port: The descriptor of the port to the host.

    Attributes:
        pid: The process that has started it.
        socket: The descriptor of a socket to the relay.
        pipe: The descriptor of the pipe that it reads.
        answers: The descriptor of the pipe that it answers on.
    """

    def __init__(self, port: int) -> None:
        output, pipe = os.pipe()
        answered, answers = os.pipe()
        ours, relays = socket.socketpair()
        with relays:
            _fork_orphan(lambda: _relay(port, relays.fileno(), output, answers))
        os.close(output)
        os.close(answers)
        self.pid = getpid()
        self.socket = out_of_the_way(ours.detach())
        self.pipe, self.answers = out_of_the_way(pipe), out_of_the_way(answered)


class LiveOutput:
    """The output of this process, and of those that it starts, on its way to the host.

    Args:
        runner: The connection to the host.
        relay: The relay of that.
        config: pytest's configuration.
        outside: What stands for stdout and for stderr while pytest does not capture.
    """

    def __init__(
        self, runner: Runner, relay: RelayProcess, config: Any, outside: tuple[OutsideOutput, OutsideOutput]
    ) -> None:
        self._runner = runner
        self._relay = relay
        self._config = config
        self._outside = outside
        self._pid = 0
        self._unanswered = 0
        self._mode = ""
        self._captured: list[Any] = []  # pytest's files until then; modules may have kept them
        self._files: list[Any] = []

    def begin(self, stream: int, mode: str) -> None:
        """Let the host have what is written from now on.

        Args:
            stream: The host's stream for it.
            mode: pytest's ``--capture``: ``no`` or ``tee-sys``.
        """
        if self._pid != getpid():
            self._take_relay()
        if not self._mode:
            self._mode = mode
            self._change_capturing(mode)
            self.lead()
        self._send(Kind.MESSAGE, str(stream).encode())

    def tell(self, record: dict[str, Any]) -> None:
        """Send a record after all that has been written so far."""
        self.flush()
        data = (encode_record(record) + "\n").encode("ascii")
        most = MAX_PAYLOAD[Kind.DATA]
        for start in range(0, len(data), most):
            self._send(Kind.DATA, data[start : start + most])

    def end(self) -> None:
        """End the stream, after all that has been written so far."""
        self.flush()
        self._send(Kind.CLOSE, b"")

    def write(self, text: str) -> None:
        """Show what has been captured before."""
        os.write(self._relay.pipe, text.encode(errors="replace"))

    def flush(self) -> None:
        """Flush Python's buffers for stdout and stderr."""
        for file in self._files:
            with contextlib.suppress(OSError, ValueError):  # a test may have closed it
                file.flush()

    def lead(self) -> None:
        """Lead stdout and stderr to the host, and what pytest has put in their place until now."""
        for descriptor in (1, 2):
            dup2(self._relay.pipe, descriptor)
        for file in self._captured:
            dup2(self._relay.pipe, file.fileno(), inheritable=False)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        self._files = [file for file in (sys.stdout, sys.stderr) if file is not None]
        for outside, file in zip(self._outside, self._files):  # noqa: B905 - Python 3.8
            outside.leads_to = file

    def stop(self) -> None:
        """Keep what is printed from now on: the session ends."""
        for outside in self._outside:
            outside.leads_to = None

    def _send(self, kind: Kind, payload: bytes) -> None:
        self._runner.port.write_frame(encode(kind, RELAY, payload))
        self._unanswered += 1
        while self._unanswered:
            answers = read(self._relay.answers, self._unanswered)
            if not answers:
                raise EOFError("the relay has ended")
            self._unanswered -= len(answers)

    def _take_relay(self) -> None:
        """Let the relay have the port."""
        port = self._runner.port
        port.flush()
        if self._relay.pid != getpid():  # a fork of a process, not of a machine: the relay is the other one's
            self._relay = RelayProcess(port.fd)
            self._unanswered = 0
            if self._pid:
                self.lead()
        os.close(port.fd)
        port.move(self._relay.socket)
        self._pid = getpid()

    def _change_capturing(self, mode: str) -> None:
        """Make pytest capture as with ``mode`` from its start."""
        for file in (sys.__stdout__, sys.__stderr__):
            if isinstance(file, io.TextIOWrapper):
                file.reconfigure(line_buffering=True)
        self._config.option.capture = mode
        manager: Any = self._config.pluginmanager.getplugin("capturemanager")
        before = getattr(manager, "_global_capturing", None)
        if before is None:  # -p no:capture
            return
        files = [getattr(each, "tmpfile", None) for each in (before.out, before.err)]
        self._captured = [file for file in files if _has_descriptor(file)]
        if before.in_ is not None:
            before.in_.suspend()
        manager._method = mode
        manager._global_capturing = None
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        manager.start_global_capturing()
        manager.suspend_global_capture()


def _has_descriptor(file: Any) -> bool:
    try:
        return file is not None and file.fileno() >= 0
    except (OSError, ValueError):
        return False


def _fork_orphan(work: Any) -> None:
    """Run ``work`` in a process that is not this one's child: a test may wait for any child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that threads of the project do not exist there
        child = fork()
        if child == 0:
            try:
                if fork() == 0:
                    work()
            except BaseException:  # noqa: BLE001 - the last place to tell of it
                traceback.print_exc(file=sys.__stderr__)
            finally:
                _exit(0)
    with contextlib.suppress(ChildProcessError):  # the project's own handler may have reaped it
        os.waitpid(child, 0)


def _relay(port: int, runner: int, output: int, answers: int) -> None:
    """Be the relay, with nothing else of the process that this one was."""
    sys.settrace(None)
    sys.setprofile(None)
    gc.disable()
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in (2, port, runner, output, answers, nothing):
            with contextlib.suppress(OSError):  # the folder's own
                os.close(descriptor)
    for descriptor in (0, 1):
        dup2(nothing, descriptor)
    for descriptor in (port, runner, output):
        os.set_blocking(descriptor, False)
    OutputRelay(port, runner, output, answers).serve()


class Nowhere(io.TextIOBase):
    """A terminal that discards its output."""

    def write(self, text: str) -> int:
        """Discard a text."""
        return len(text)

    def isatty(self) -> bool:
        """Return False."""
        return False
