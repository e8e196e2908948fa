"""A hundred machines made and destroyed: what is left, and what one more idle machine costs."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

from measure import Samples, promise

from pytest_microvm.host.host import Host
from pytest_microvm.templates.runtime_folder import runtime_folder

MACHINES = 100
IDLE = 4


def main() -> list[dict[str, object]]:
    """Measure, print, and return what was promised."""
    host = Host(say=print)
    for _ in range(3):
        host.start().close()  # makes the template, and loads what is loaded once
    gc.collect()
    before = left_over(host)
    available = meminfo("MemAvailable")
    each = Samples()
    for _ in range(MACHINES):
        with each.timing(), host.start() as machine:
            machine.run(["true"], check=True)
    gc.collect()
    time.sleep(1)  # the kernel frees the last machine's pages after it is gone
    after = left_over(host)
    grown = (available - meminfo("MemAvailable")) / 1024**2
    idle = [host.start() for _ in range(IDLE)]
    sizes = [pss(machine.instance.vmm.pid) / 1024**2 for machine in idle]
    for machine in idle:
        machine.close()
    host.close()
    print(f"one machine, made, used and destroyed  {each} s")
    print(f"before {before}")
    print(f"after  {after}")
    print(f"host memory: {grown:+.0f} MiB; one idle machine (PSS): {Samples(sizes)} MiB")
    differences = sum(before[key] < after[key] for key in before)
    return [
        promise(f"kinds of things left after {MACHINES} machines", differences, 0),
        promise("host memory that did not come back", grown, 64, " MiB"),
    ]


def left_over(host: Host) -> dict[str, int]:
    """Count what a machine could leave behind."""
    children = [path for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == os.getpid()]
    return {
        "processes": len(children),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "mounts": len(Path("/proc/self/mounts").read_text().splitlines()),
        "sockets": len(Path("/proc/net/unix").read_text().splitlines()),
        "records": len(list((runtime_folder() / "machines").iterdir())),
        "drafts": len(list(host.templates.folder.glob(".building-*"))),
    }


def pss(pid: int) -> int:
    """Return a process's share of memory in bytes (proc(5), smaps_rollup)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def meminfo(name: str) -> int:
    """Return a line of /proc/meminfo in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


if __name__ == "__main__":
    main()
