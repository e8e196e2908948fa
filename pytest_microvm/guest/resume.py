"""What a copy must change first, so that it is no longer its template: entropy, time, names.

Sources: random(4) for the ioctls, machine-id(5).
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from pytest_microvm.guest import limits

RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
_MAX_ENTROPY = 512
_TRUST = "/etc/ssl/certs/ca-certificates.crt"
_ADDED = "/run/microvm/trust"  # where in it what was added begins and ends
_MEMORY = "/run"  # a tmpfs: what is written there is on no disk
_FUTURE = 20 * 365 * 24 * 3600  # seconds; longer than any template is kept


def apply(message: dict[str, Any]) -> dict[str, Any]:
    """Make this machine its own: fresh kernel entropy, the host's time, a name, a machine id.

    Args:
        message: ``entropy`` (hex), ``time`` (seconds since 1970), ``hostname``, ``machine_id``; ``pids`` if
            the number of its processes is limited; ``trust`` (certificates in PEM) and ``files`` (lists of
            path, mode and base64) if it is given such.

    Returns:
        ``skipped``: the steps this guest does not allow (not root, no /etc, no control groups).
    """
    skipped = []
    steps = [_entropy, _clock, _hostname, _machine_id]
    for name, step in (("pids", _pids), ("trust", _trust), ("files", _files)):
        if name in message:
            steps.append(step)
    for step in steps:
        try:
            step(message)
        except OSError as error:
            skipped.append(f"{step.__name__.strip('_')}: {error.strerror}")
    return {"skipped": skipped}


def make_ready() -> None:
    """Do at boot what copies need not do: bring the certificates where they can be changed.

    They are in the read-only image; whoever opens them to write waits until they are copied from there.
    """
    with contextlib.suppress(OSError):  # it has none
        os.close(os.open(_TRUST, os.O_RDWR | os.O_CLOEXEC))


def outdate_openssl(loaded: Callable[[str], Any] = sys.modules.get) -> None:
    """Let OpenSSL take fresh entropy in each copy, when it first needs any.

    Its generator lives in the process, so copies would go on with the same numbers. To add entropy in each
    would cost a tenth of a small test under emulation. It seeds itself anew when its last seed lies in the
    future (``ossl_prov_drbg_generate``), so that seed is made there, with the clock put forward for a moment.

    Args:
        loaded: Returns a loaded module by its name, ``None`` for one that is not.
    """
    openssl = loaded("_ssl")
    if openssl is None:  # whoever loads it later, in a copy, has entropy of that copy
        return
    begin, now = time.monotonic(), time.time()
    try:
        time.clock_settime(time.CLOCK_REALTIME, now + _FUTURE)
    except OSError:  # not allowed: in a container, say
        openssl.RAND_add(os.urandom(32), 32.0)
        return
    try:
        openssl.RAND_bytes(1)
    finally:
        time.clock_settime(time.CLOCK_REALTIME, now + time.monotonic() - begin)


def _entropy(message: dict[str, Any]) -> None:
    data = bytes.fromhex(message["entropy"])[:_MAX_ENTROPY]
    fd = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
        fcntl.ioctl(fd, RNDRESEEDCRNG)
    finally:
        os.close(fd)


def _clock(message: dict[str, Any]) -> None:
    time.clock_settime(time.CLOCK_REALTIME, float(message["time"]))


def _hostname(message: dict[str, Any]) -> None:
    socket.sethostname(message["hostname"])


def _pids(message: dict[str, Any]) -> None:
    limits.limit_processes(int(message["pids"]))


def _trust(message: dict[str, Any]) -> None:
    """Let the machine's programs trust certificates besides those it has, in place of those added earlier.

    They are added at the end: to read and write all of them takes a tenth of a second under emulation.
    """
    os.makedirs(os.path.dirname(_TRUST), exist_ok=True)
    fd = os.open(_TRUST, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        begin = os.fstat(fd).st_size
        with contextlib.suppress(FileNotFoundError), open(_ADDED) as file:
            before, after = map(int, file.read().split())
            if begin == after:  # else a program has written the file anew since
                begin = before
        os.ftruncate(fd, begin)
        end = begin + os.pwrite(fd, message["trust"].encode(), begin)
    finally:
        os.close(fd)
    with open(_ADDED, "w") as file:
        file.write(f"{begin} {end}")


def _files(message: dict[str, Any]) -> None:
    for path, mode, data in message["files"]:
        if not path.startswith(_MEMORY + "/"):
            raise OSError(errno.EINVAL, "outside " + _MEMORY)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, mode)
            os.write(fd, binascii.a2b_base64(data))
        finally:
            os.close(fd)


def _machine_id(message: dict[str, Any]) -> None:
    fd = os.open("/etc/machine-id", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o444)
    try:
        os.write(fd, message["machine_id"].encode() + b"\n")
    finally:
        os.close(fd)
