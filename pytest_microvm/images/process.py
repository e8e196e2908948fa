"""Run the programs that build images, and end them when this process ends."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from pytest_microvm.errors import BuildError
from pytest_microvm.untrusted.program_path import absolute_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Progress = Callable[[str], None]
"""Called with each stage of a build as a line of text."""

_TAIL_LINES = 30
_GRACE_SECONDS = 30.0

# The only variables of the user's environment that builds see: an image must not depend on the rest, nor may
# a package's script read a token from it.
_PASSED_ON = (
    "HOME", "PATH", "TMPDIR", "USER", "LOGNAME",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def build_environment(**more: str) -> dict[str, str]:
    """Return the environment for a build program, with ``more`` added."""
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment["PATH"] = f"{absolute_path()}:{_SYSTEM_PATH}"
    return environment | {"LC_ALL": "C.UTF-8"} | more


@contextmanager
def started(
    command: list[str], *, environment: Mapping[str, str], stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.DEVNULL, stderr: int | IO[bytes] = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[bytes]]:  # fmt: skip
    """Start a program; it and its children are killed when the block ends.

    It runs in its own session: Ctrl-C reaches only us, and we send the whole group one signal, as a terminal
    would, so that mmdebstrap's dpkg stops too and mmdebstrap unmounts at once.
    """
    process = subprocess.Popen(
        command, env=dict(environment), stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its remaining children; the group is its own
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def own_mounts() -> list[str]:
    """Return the argv prefix that gives a program its own mount namespace.

    Empty if this user may not create one; such a user cannot make globally visible mounts either, and
    mmdebstrap uses a user namespace.
    """
    prefix = ["unshare", "--mount", "--propagation", "private", "--"]
    if shutil.which("unshare") is None:
        return []
    probe = subprocess.run([*prefix, "true"], capture_output=True, check=False, env=build_environment())
    return prefix if probe.returncode == 0 else []


def follow(stream: IO[bytes], heard: Callable[[str], None]) -> deque[str]:
    """Read a program's messages until it closes the pipe.

    Args:
        stream: The pipe of its messages.
        heard: Called with each line.

    Returns:
        The last lines.
    """
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    for raw in stream:
        line = raw.decode(errors="replace").rstrip()
        if line:
            tail.append(line)
            heard(line)
    return tail


def run(command: list[str], *, what: str, environment: Mapping[str, str]) -> None:
    """Run a program to its end.

    Raises:
        BuildError: It failed, and the error holds its last lines; or it is for another architecture.
    """
    try:
        with started(
            command, environment=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            tail = follow(process.stdout, lambda _line: None)
            if process.wait() != 0:
                raise build_error(what, process.returncode, tail)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        raise BuildError(
            f"{what} failed: this computer does not run programs of that architecture",
            resolution="use a computer that does, or install qemu-user-static, which runs them here",
        ) from error


def build_error(what: str, returncode: int, tail: deque[str]) -> BuildError:
    """Return the error for a program that failed, with the next step its last lines suggest."""
    text = "\n".join(tail)
    resolution = "read the lines above; correct the kit and build again"
    for sign, step in _NEXT_STEPS:
        if sign in text:
            resolution = step
            break
    ended = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
    return BuildError(f"{what} failed ({ended})", details=text, resolution=resolution)


_NO_NETWORK = (
    "packages could not be downloaded: check this computer's network and proxy (http_proxy), or name a "
    "mirror that it reaches with the kit's key `mirror`; images that are built already need no network"
)
_NEXT_STEPS = (
    ("Temporary failure resolving", _NO_NETWORK),
    ("Could not resolve", _NO_NETWORK),
    ("Could not connect", _NO_NETWORK),
    ("Unable to connect", _NO_NETWORK),
    ("Connection refused", _NO_NETWORK),
    ("Network is unreachable", _NO_NETWORK),
    ("connection timed out", _NO_NETWORK),
    ("NewConnectionError", _NO_NETWORK),
    ("Failed to establish a new connection", _NO_NETWORK),
    ("No space left on device", "free some disk space (pytest-microvm image prune helps), or set TMPDIR"),
    ("NO_PUBKEY", "install the archive's keys: apt-get install debian-archive-keyring"),
    ("Unable to locate package", "correct the kit's key `packages`: the suite has no such package"),
    (
        "No matching distribution found",
        "correct the kit's key `wheels`: no such wheel for the guest's Python",
    ),
    (
        "newuidmap",
        "install uidmap and give your user a range in /etc/subuid and /etc/subgid, or build as root",
    ),
    ("subuid", "give your user a range in /etc/subuid and /etc/subgid, or build as root"),
)
