"""Judge from a tiny guest's console whether it boots, is slow, hangs or died.

A guest that hangs and one that is slow differ in their output. Where KVM is broken, the firmware still
writes, and the kernel's first line never comes. Where KVM is itself emulated, it comes after 3 s, and the
whole boot takes 10 to 60 s.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

ALIVE = b"Linux version"
BOOTED = b"microvm-probe-ok"

_PANIC = "Kernel panic"
_TELL_AFTER = 5.0  # seconds after which a boot that goes on is told about, and again
_KEPT = 4096  # bytes of the console's end


@dataclass(frozen=True)
class BootLimits:
    """How long a tiny guest may take, in seconds.

    Args:
        first: Without any output before the kernel's first line.
        silence: Without any output after it.
        total: In all.
    """

    first: float = 5.0
    silence: float = 30.0
    total: float = 120.0


@dataclass(frozen=True)
class Trial:
    """How a tiny guest fared.

    Args:
        end: ``booted``, ``slow`` (it went on until the time was up), ``hung`` or ``died``.
        seconds: How long that took.
        last: The kernel's reason to panic, or the last line on its console, safe to print; may be empty.
    """

    end: str
    seconds: float
    last: str = ""


def watch(console: socket.socket, limits: BootLimits, say: Callable[[str], None]) -> Trial:
    """Read a guest's console until the guest has booted, or will not.

    Args:
        console: Our end; it is at its end when the VM ends.
        limits: How long to wait.
        say: Called with a line of progress when the boot takes long.
    """
    begin = time.monotonic()
    told, tail, alive = begin, b"", False
    while True:
        now = time.monotonic()
        left = begin + limits.total - now
        if left <= 0:
            return Trial("slow", now - begin, _last_line(tail))
        console.settimeout(min(left, limits.silence if alive else limits.first))
        try:
            data = console.recv(65536)
        except TimeoutError:
            took = time.monotonic() - begin
            return Trial("slow" if took >= limits.total else "hung", took, _last_line(tail))
        except ConnectionResetError:
            data = b""
        took = time.monotonic() - begin
        tail = tail[-_KEPT:] + data
        if BOOTED in tail:
            return Trial("booted", took)
        if not data:
            return Trial("died", took, _last_line(tail))
        alive = alive or ALIVE in tail
        if alive and time.monotonic() - told >= _TELL_AFTER:
            told = time.monotonic()
            say(f"the guest is booting, slowly ({took:.0f} s, at most {limits.total:.0f} s)")


def _last_line(tail: bytes) -> str:
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
    panics = [line for line in lines if _PANIC in line]
    return sanitize_line((panics or lines or [""])[-1], 200)
