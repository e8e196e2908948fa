"""Resource usage of a VMM process, from Linux's /proc (proc_pid_stat(5), proc_pid_status(5))."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_microvm.machine.instance import Usage


def process_usage(pid: int) -> Usage | None:
    """Return the CPU seconds and memory of a process; ``None`` once it is gone.

    For a zombie, only the CPU time is available.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    status = dict(line.split(":", 1) for line in lines)
    if "VmHWM" not in status:
        return Usage(seconds)
    memory, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return Usage(seconds, memory, peak)
