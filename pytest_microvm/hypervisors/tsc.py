"""Measure the rate of this computer's time-stamp counter (TSC).

A guest under TCG reads the host's counter, but calibrates it against an emulated timer and often
fails ("Unable to calibrate against PIT"), which hangs the ``microvm`` machine type. Given the true
rate, it does not calibrate. /proc/cpuinfo shows the current clock rate, which scales; the counter's
own rate is constant (flag ``constant_tsc``), so it is measured against CLOCK_MONOTONIC_RAW.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from collections.abc import Callable
from pathlib import Path

# rdtsc; shl rdx, 32; or rax, rdx; ret (Intel SDM volume 2B, RDTSC)
_CODE = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_SECONDS = 0.1
_TRIES = 50


def measure_tsc_khz(cpuinfo: Path = Path("/proc/cpuinfo")) -> int | None:
    """Return the TSC rate in kHz; ``None`` without a constant TSC, or if the host forbids the measurement."""
    if platform.machine() != "x86_64" or not cpuinfo.exists() or "constant_tsc" not in cpuinfo.read_text():
        return None
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:  # a hardened kernel forbids pages that are writable and executable
        return None
    page.write(_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    read_tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    begin, begin_ns = _sample(read_tsc)
    while time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) < begin_ns + int(_SECONDS * 1e9):
        pass
    end, end_ns = _sample(read_tsc)
    return round((end - begin) * 1e6 / (end_ns - begin_ns))


def _sample(read_tsc: Callable[[], int]) -> tuple[int, int]:
    """Return counter and time of one moment, from the least interrupted of several tries."""
    tries = []
    for _ in range(_TRIES):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        count = read_tsc()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        tries.append((after - before, count, (before + after) // 2))
    _gap, count, moment = min(tries)
    return count, moment
