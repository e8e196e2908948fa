"""Run a package client of this computer to query its configuration, with limits on time and output."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Event, Timer

from pytest_microvm.errors import HostError
from pytest_microvm.untrusted.text import sanitize

TIMEOUT = 90.0  # seconds; an index may be slow, and is queried for several projects
MAX_ANSWER = 4 * 1024 * 1024
_TAIL = 1500  # characters of a failed client's error output
_LOGIN = re.compile(r"(://)[^/\s]*@")  # up to the last @, as a password may contain @


def answer(
    command: list[str], *, what: str, folder: Path = Path("/"), stdin: str = "",
    environment: Mapping[str, str] | None = None, statuses: Collection[int] = (0,),
) -> tuple[str, str]:  # fmt: skip
    """Run a program; return its output, and its error output without user names and passwords in URLs.

    Args:
        command: The program and its arguments.
        what: The subject of the query, for errors.
        folder: The working directory. The root folder belongs to no project and has no configuration files.
        stdin: Text for the standard input.
        environment: Its variables; ``None``: the user's, as in normal use.
        statuses: The exit statuses that mean success.

    Raises:
        HostError: The program could not be run, failed, took too long or printed too much.
    """
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as source:
        source.write(stdin.encode())
        source.seek(0)
        try:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=source, stdout=subprocess.PIPE, stderr=said,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise HostError(f"{what}: {command[0]} could not be run: {error.strerror}") from error
        late = Event()

        def end() -> None:
            late.set()
            _kill(process)

        timer = Timer(TIMEOUT, end)
        timer.start()
        with process:
            assert process.stdout is not None
            printed = process.stdout.read(MAX_ANSWER + 1)
            if len(printed) > MAX_ANSWER:
                _kill(process)
        timer.cancel()
        said.seek(0)
        beside = without_login(said.read(MAX_ANSWER).decode(errors="replace").strip())
    why = ""
    if late.is_set():
        why = f"no answer in {TIMEOUT:g} s"
    elif len(printed) > MAX_ANSWER:
        why = f"its answer is longer than {MAX_ANSWER} bytes"
    elif process.returncode not in statuses:
        why = f"status {process.returncode}"
    if why:
        raise HostError(
            f"{what}: {Path(command[0]).name} failed ({why})",
            details=sanitize(beside[-_TAIL:]),
            resolution="run it by hand, or write the hosts themselves as rules",
        )
    return printed.decode(errors="replace"), beside


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a client's process group: a child that lives on would keep the output pipe open."""
    if process.returncode is None:  # else the process ID may have been reused
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def without_login(text: str) -> str:
    """Return text without the user names and passwords in its URLs."""
    return _LOGIN.sub(r"\1", text)
