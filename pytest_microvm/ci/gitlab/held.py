"""A held machine from its clients' side: start its holder, run scripts in it, end it reliably."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pytest_microvm.ci.gitlab.holder_socket import SCRIPT, FrameSocket, message_of, short_path
from pytest_microvm.ci.gitlab.holding import ENDED, FACTS, LOCK, LOG, SOCKET, HoldLimits
from pytest_microvm.errors import HostError, MachineError, UsageError
from pytest_microvm.templates.runtime_folder import own_folder, runtime_folder
from pytest_microvm.wire.frames import Kind, WireError

_END_TIMEOUT = 60.0  # seconds for a holder to end its machine and exit before it is killed
_FORGOTTEN = 24 * 3600.0  # seconds after which the folder of an ended holder is abandoned


@dataclass(frozen=True)
class ScriptResult:
    """The outcome of a script.

    Args:
        code: The exit status, ``None`` if the machine ended first.
        error: The reason why the machine ended.
        quota: Whether the machine was ended because it exceeded a quota.
    """

    code: int | None
    error: str = ""
    quota: bool = False


class HeldMachine:
    """The held machine of one job, identified by a key.

    Args:
        key: The machine's key: letters and digits.

    Raises:
        HostError: The folder of held machines is open to other users.
    """

    def __init__(self, key: str) -> None:
        assert key.isalnum()
        self._folder = own_folder(runtime_folder() / "held") / key

    def start(
        self,
        machine: Mapping[str, Any],
        terms: HoldLimits,
        *,
        relative_to: Path,
        where: str,
        say: Callable[[str], None],
    ) -> str:
        """Start a holder process with a machine, and return the machine's id.

        Args:
            machine: The fields of its spec, as written.
            terms: The limits for holding it.
            relative_to: The base folder of relative paths in ``machine``.
            where: The source of the values, for errors.
            say: Called with messages about steps that take long.

        Raises:
            UsageError: A value is invalid.
            HostError: The machine, or its holder, did not start.
        """
        self.end()
        _sweep(self._folder.parent)
        self._folder.mkdir(mode=0o700)
        wanted = {
            "folder": str(self._folder),
            "machine": machine,
            "terms": asdict(terms),
            "relative_to": str(relative_to),
            "where": where,
        }
        holder = _spawn(self._folder)
        assert holder.stdin is not None
        assert holder.stdout is not None
        with holder.stdin, holder.stdout:  # if closed before "go", the holder ends
            _write(holder.stdin, json.dumps(wanted).encode() + b"\n")
            for line in io.BufferedReader(holder.stdout):  # type: ignore[type-var]
                told = json.loads(line)
                if "say" in told:
                    say(told["say"])
                elif "error" in told:
                    raise (UsageError if told["kind"] == "usage" else HostError)(told["error"])
                else:
                    _write(holder.stdin, b"go\n")
                    return str(told["machine"])
        raise HostError("the process that holds the machine ended", details=self._log())

    def run(self, shell: str, script: bytes, output: Callable[[int, bytes], None]) -> ScriptResult:
        """Run a script in the machine; SIGTERM or SIGINT to this process stops the script.

        Args:
            shell: The shell, which reads the script from stdin.
            script: The script.
            output: Called with the script's output: the stream (see :mod:`holder_socket`) and bytes.

        Raises:
            MachineError: The machine has no holder, or the holder has exited.
        """
        with self._connect() as holder, _signals_stop(holder):
            try:
                holder.message(do="run", shell=shell)
                holder.data(SCRIPT, script)
                holder.close_stream(SCRIPT)
                for frame in holder.frames():
                    if frame.kind is Kind.DATA:
                        output(frame.stream, frame.payload)
                        continue
                    told = message_of(frame)
                    if "exit" in told:
                        return ScriptResult(int(told["exit"]))
                    return ScriptResult(None, str(told.get("error", "")), quota=told.get("kind") == "quota")
            except (OSError, ValueError, WireError) as error:
                raise self._gone() from error
            raise self._gone()

    def end(self) -> None:
        """End machine and holder, and wait until both are gone; do nothing if there are none.

        Raises:
            HostError: They could not be ended.
        """
        if not self._folder.exists():
            return
        with contextlib.suppress(OSError, MachineError, WireError), self._connect() as holder:
            holder.message(do="end")
            holder.wait_end(_END_TIMEOUT)
        lock = FileLock(self._folder / LOCK)
        try:
            lock.acquire(timeout=_END_TIMEOUT)
        except Timeout:
            self._kill()
            try:
                lock.acquire(timeout=_END_TIMEOUT)
            except Timeout:
                raise HostError(f"the holder in {self._folder} does not end") from None
        lock.release()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        """Kill a holder that still holds its lock: as long as it does, its recorded pid is its own."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            pid = json.loads((self._folder / FACTS).read_text())["pid"]
            holder = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(holder, signal.SIGKILL)
                select.select([holder], [], [], _END_TIMEOUT)
            finally:
                os.close(holder)

    def _connect(self) -> FrameSocket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with short_path(self._folder / SOCKET) as path:
                connection.connect(path)
        except OSError as error:
            connection.close()
            raise self._gone() from error
        return FrameSocket(connection)

    def _gone(self) -> MachineError:
        with contextlib.suppress(OSError):
            why = (self._folder / ENDED).read_text()
            return MachineError(f"the machine was ended: {why}")
        return MachineError("nobody holds this job's machine any more", details=self._log())

    def _log(self) -> str:
        with contextlib.suppress(OSError):
            return (self._folder / LOG).read_text(errors="replace")[-4000:]
        return ""


@contextlib.contextmanager
def _signals_stop(holder: FrameSocket) -> Iterator[None]:
    """Stop the script at the first SIGTERM or SIGINT; a second one interrupts this process."""

    def stop(_number: int, _frame: object) -> None:
        for number in before:
            signal.signal(number, signal.default_int_handler)
        # In a thread of its own: the handler may have interrupted a thread that holds the sending lock.
        threading.Thread(target=send, daemon=True).start()

    def send() -> None:
        with contextlib.suppress(OSError):
            holder.message(do="stop")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _spawn(folder: Path) -> subprocess.Popen[bytes]:
    """Start a holder in a session of its own, so that ending the starter's process group spares it.

    It inherits none of the starter's files, or a reader of the starter's output would wait for the holder's
    end; and none of a job's variables.
    """
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest_microvm.ci.gitlab.holding"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
            start_new_session=True,
            cwd="/",
            env={name: value for name, value in os.environ.items() if not name.startswith("CUSTOM_ENV_")},
        )


def _write(pipe: Any, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # it ended; its report gives the reason
        pipe.write(data)


def _sweep(held: Path) -> None:
    """Remove the abandoned folders of holders that have ended."""
    for folder in held.iterdir():
        with contextlib.suppress(OSError, Timeout):
            if folder.stat().st_mtime < time.time() - _FORGOTTEN:
                with FileLock(folder / LOCK, timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
