"""First steps of a resumed copy, which make it differ from its template: entropy, time, names.

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
_ADDED = "/run/microvm/trust"  # the offsets in _TRUST where the added certificates begin and end
_MEMORY = "/run"  # a tmpfs: its files are on no disk
_FUTURE = 20 * 365 * 24 * 3600  # seconds; longer than any template is kept


def apply(message: dict[str, Any]) -> dict[str, Any]:
    """Give this machine its own identity: fresh kernel entropy, the host's time, a host name, a machine id.

    Args:
        message: ``entropy`` (hex), ``time`` (seconds since 1970), ``hostname``, ``machine_id``; optionally
            ``pids`` (the limit on its processes), ``trust`` (certificates in PEM) and ``files`` (lists of
            path, mode and base64).

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
    """Copy the certificates to the writable layer at boot, so that copies need not do it.

    They are in the read-only image; opening them for writing waits until they are copied up.
    """
    with contextlib.suppress(OSError):  # the image has none
        os.close(os.open(_TRUST, os.O_RDWR | os.O_CLOEXEC))


def outdate_openssl(loaded: Callable[[str], Any] = sys.modules.get) -> None:
    """Make OpenSSL reseed its random generator in each copy, on first use.

    The generator lives in the process, so copies would continue with the same numbers. Adding entropy in each
    copy would cost a tenth of a small test under emulation. The generator reseeds itself if its last seed's
    time lies in the future (``ossl_prov_drbg_generate``), so it is seeded here with the clock briefly set
    forward.

    Args:
        loaded: Returns a loaded module by its name, or ``None`` if it is not loaded.
    """
    openssl = loaded("_ssl")
    if openssl is None:  # if a copy loads it later, it is seeded from that copy's entropy
        return
    begin, now = time.monotonic(), time.time()
    try:
        time.clock_settime(time.CLOCK_REALTIME, now + _FUTURE)
    except OSError:  # not permitted, as in a container
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
    """Add certificates to the machine's trust store, replacing those added earlier.

    They are appended: reading and writing the whole file takes a tenth of a second under emulation.
    """
    os.makedirs(os.path.dirname(_TRUST), exist_ok=True)
    fd = os.open(_TRUST, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        begin = os.fstat(fd).st_size
        with contextlib.suppress(FileNotFoundError), open(_ADDED) as file:
            before, after = map(int, file.read().split())
            if begin == after:  # otherwise a program has rewritten the file since
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
