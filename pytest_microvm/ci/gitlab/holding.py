"""The holder: a process that keeps one machine alive across a GitLab job's stages, each a process itself.

A machine ends with the process that started it, so a stage's machine would end with the stage. The first
stage starts the holder in a session of its own. The holder reads from stdin which machine to start, reports
the result on stdout, and then serves scripts over a Unix socket. It ends, and its machine with it, on
request, at the end of the machine's lifetime, after a time without clients, and when its folder is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pytest_microvm.ci.gitlab.holder_socket import SCRIPT, STDERR, STDOUT, FrameSocket, message_of, short_path
from pytest_microvm.errors import MicroVMError, QuotaExceeded, UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.settings.mounts import parse_mounts
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.terminal.termination import interrupt_on_sigterm
from pytest_microvm.wire.frames import Kind, WireError

if TYPE_CHECKING:
    from pytest_microvm.agent.process import GuestProcess
    from pytest_microvm.machine.microvm import MicroVM

SOCKET, LOCK, FACTS, ENDED, LOG = "socket", "lock", "holder.json", "ended", "log"
"""Files in a holder's folder. A process that can lock ``lock`` knows that no holder runs."""

MAX_SCRIPT = 64 * 1024**2
_LOOK = 2.0  # seconds between two checks of the folder: its removal wakes up no process
_SILENCE = 2.0  # seconds after a script's end during which output of its background processes is read
_STEP = 0.2  # seconds between two checks of a process group, in the machine
_STOP_TIMEOUT = 60.0  # seconds beyond the grace period for a slow machine to stop a script
_PIECE = 65536
_log = logging.getLogger("pytest_microvm")  # without handlers it writes to stderr, a holder's log


@dataclass(frozen=True)
class HoldLimits:
    """The time limits of a holder.

    Args:
        lifetime: Maximum lifetime of the machine in seconds.
        idle: Seconds without a client after which the machine is ended.
        grace: Seconds between SIGTERM and SIGKILL for a script that is stopped.
    """

    lifetime: float
    idle: float
    grace: float


@dataclass
class Holder:
    """Serves one machine to clients on a Unix socket.

    Args:
        machine: The machine; its owner closes it.
        folder: The folder of the socket.
        terms: The time limits.
    """

    machine: MicroVM
    folder: Path
    terms: HoldLimits
    _visitors: int = 0
    _last: float = field(default_factory=time.monotonic)
    _over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _asked_to_end: list[FrameSocket] = field(default_factory=list)

    @contextlib.contextmanager
    def listening(self) -> Iterator[socket.socket]:
        """Bind the socket and listen on it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            with short_path(self.folder / SOCKET) as path:
                server.bind(path)
            server.listen(8)
            yield server

    def serve(self, server: socket.socket) -> str:
        """Serve clients until the machine is to be ended; return the reason."""
        end = time.monotonic() + self.terms.lifetime
        while not self._over:
            left = end - time.monotonic()
            unused = _LOOK if self._visitors else self._last + self.terms.idle - time.monotonic()
            if left <= 0:
                return f"it had existed for {self.terms.lifetime:g} seconds, as long as it may"
            if unused <= 0:
                return f"nobody used it for {self.terms.idle:g} seconds"
            if not (self.folder / SOCKET).exists():
                return "its folder has gone"
            server.settimeout(min(_LOOK, left, unused))
            try:
                connection, _address = server.accept()
            except TimeoutError:
                continue
            except OSError:  # the socket was shut down to wake up this thread
                break
            connection.settimeout(None)
            with self._lock:
                self._visitors += 1
            threading.Thread(target=self._visit, args=(FrameSocket(connection), server), daemon=True).start()
        return "it was told to"

    def say_goodbye(self) -> None:
        """Notify the clients that requested the end that the machine is gone."""
        for visitor in self._asked_to_end:
            with contextlib.suppress(OSError):
                visitor.message(ended=True)
            visitor.close()

    def _visit(self, visitor: FrameSocket, server: socket.socket) -> None:
        stays = False
        try:
            frames = visitor.frames()
            wanted = message_of(next(frames))
            if wanted.get("do") == "end":
                stays = True
                self._asked_to_end.append(visitor)
                self._over = True
                server.shutdown(socket.SHUT_RDWR)  # wakes up accept()
            elif wanted.get("do") == "run":
                _Run(self.machine, visitor, self.terms.grace).serve([str(wanted.get("shell"))], frames)
        except (OSError, ValueError, StopIteration, WireError) as error:
            _log.warning("a visitor was dismissed: %r", error)
        finally:
            if not stays:
                visitor.close()
            with self._lock:
                self._visitors -= 1
                self._last = time.monotonic()


class _Run:
    """Runs one script for one client, and stops it at the client's request or when the client disconnects."""

    def __init__(self, machine: MicroVM, visitor: FrameSocket, grace: float) -> None:
        self._machine = machine
        self._visitor = visitor
        self._grace = grace
        self._done = threading.Event()
        self._stopping = threading.Event()

    def serve(self, command: list[str], frames: Iterator[Any]) -> None:
        script = bytearray()
        for frame in frames:
            if frame.kind is Kind.CLOSE and frame.stream == SCRIPT:
                break
            script += frame.payload
            if len(script) > MAX_SCRIPT:
                raise ValueError("a script that is too large")
        else:
            return  # the client disconnected before it had sent the whole script
        before = self._machine.instance.requests.added
        try:
            code = self._run(command, bytes(script), frames)
            self._tell_denied(before)
            self._visitor.message(exit=code)
        except (MicroVMError, FileNotFoundError, PermissionError) as error:
            kind = "quota" if isinstance(error, QuotaExceeded) else "machine"
            self._visitor.message(error=str(error), kind=kind)

    def _tell_denied(self, before: int) -> None:
        """Write denied requests to stderr, without the first ``before`` requests."""
        self._machine.network.settle()
        for request in self._machine.instance.requests.since(before):
            if not request.allowed:
                self._visitor.data(STDERR, f"{request}\n".encode())

    def _run(self, command: list[str], script: bytes, frames: Iterator[Any]) -> int:
        with self._machine.popen(command, stdin=True, text=False) as process:
            threads = [
                threading.Thread(target=work, args=arguments, daemon=True)
                for work, arguments in (
                    (self._feed, (process, script)),
                    (self._pass_on, (process, process.stdout, STDOUT)),
                    (self._pass_on, (process, process.stderr, STDERR)),
                    (self._obey, (process, frames)),
                )
            ]
            for thread in threads:
                thread.start()
            try:
                code = process.wait()
            finally:
                self._done.set()
            if self._stopping.is_set():
                threads[3].join()  # the next script must not meet processes of this one
            for thread in threads[1:3]:
                thread.join(_SILENCE)
            return code

    def _feed(self, process: GuestProcess, script: bytes) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError, ValueError, MicroVMError):  # the script need not be read to its end
            process.stdin.write(script)
            process.stdin.close()

    def _pass_on(self, process: GuestProcess, source: Any, stream: int) -> None:
        try:
            while data := source.read1(_PIECE):
                self._visitor.data(stream, data)
        except MicroVMError:
            return  # waiting for the script raises the same error
        except (OSError, ValueError):
            self._stop(process)  # the client is gone

    def _obey(self, process: GuestProcess, frames: Iterator[Any]) -> None:
        """Stop the script when the client requests it or disconnects."""
        with contextlib.suppress(OSError, ValueError, WireError):
            next((frame for frame in frames if message_of(frame).get("do") == "stop"), None)
        self._stop(process)

    def _stop(self, process: GuestProcess) -> None:
        """Terminate, then kill, the script's process group: it may outlive the shell."""
        if self._done.is_set() or self._stopping.is_set():
            return
        self._stopping.set()
        with contextlib.suppress(MicroVMError, TimeoutError, subprocess.TimeoutExpired):
            process.terminate()
            tries = max(1, round(self._grace / _STEP))
            runs = f"kill -s 0 -- -{process.pid} && [ $n -lt {tries} ]"
            self._machine.run(
                f"n=0; while {runs}; do sleep {_STEP}; n=$((n+1)); done; kill -s KILL -- -{process.pid}",
                timeout=self._grace + _STOP_TIMEOUT,
            )


def spec_of(values: Mapping[str, Any], folder: Path, where: str) -> MachineSpec:
    """Return a spec from its fields as written; paths of mounts are relative to ``folder``.

    Raises:
        UsageError: A value is invalid.
    """
    values = dict(values)
    if "mounts" in values:
        values["mounts"] = parse_mounts(values["mounts"], f"{where}: mounts", folder)
    return MachineSpec().with_changes(values, where)


def hold(spec: MachineSpec, folder: Path, terms: HoldLimits, orders: IO[bytes], report: IO[bytes]) -> None:
    """Start a machine, report the result, and serve the machine until it is to be ended.

    Args:
        spec: The machine's spec.
        folder: The holder's own folder.
        terms: The time limits.
        orders: The stream on which the starter acknowledges ``ready`` with ``go``; its end before that ends
            this process.
        report: The stream for reports, one JSON object a line: ``say``, then ``ready`` or ``error``.
    """

    def tell(**values: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # after "ready" the starter no longer reads
            report.write(json.dumps(values).encode() + b"\n")
            report.flush()

    threading.Thread(target=_end_without_orders, args=(orders,), daemon=True).start()
    host = Host(project=folder, say=lambda line: tell(say=line))
    try:
        with host.start(spec) as machine:
            holder = Holder(machine, folder, terms)
            with holder.listening() as server:
                facts = {"pid": os.getpid(), "machine": machine.id, "vmm": machine.instance.vmm.pid}
                (folder / FACTS).write_text(json.dumps(facts))
                tell(ready=True, machine=machine.id, accelerator=machine.facts.accelerator)
                why = holder.serve(server)
        with contextlib.suppress(OSError):  # the folder may have gone
            (folder / SOCKET).unlink()
            (folder / ENDED).write_text(why)
        holder.say_goodbye()
    except MicroVMError as error:
        tell(error=str(error), kind="usage" if isinstance(error, UsageError) else "host")
    finally:
        host.close()


def _end_without_orders(orders: IO[bytes]) -> None:
    """End this process if the starter exits before it has sent ``go``."""
    if orders.readline() != b"go\n":
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Read the machine's description from stdin, and hold that machine."""
    interrupt_on_sigterm()
    # Unbuffered: a thread that is blocked in a buffered file keeps Python from exiting.
    orders = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115
    report = sys.stdout.buffer
    wanted = json.loads(orders.readline())
    folder = Path(wanted["folder"])
    spec = spec_of(wanted["machine"], Path(wanted["relative_to"]), wanted["where"])
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            hold(spec, folder, HoldLimits(**wanted["terms"]), orders, report)
        except KeyboardInterrupt:
            return 128 + signal.SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main())
