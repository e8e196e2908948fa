"""1 GiB into a machine and back: throughput against cp on this computer, and what it costs in memory here.

A quarter of it in a live mount, too: read, written, and 500 small files looked at.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from measure import Samples, promise

from pytest_microvm.host.host import Host

if TYPE_CHECKING:
    from pytest_microvm import MicroVM

MIB = 1024**2
LARGE, SMALL = 16, 1024  # files: of 63 MiB, and of 16 KiB
SIZE = LARGE * 63 * MIB + SMALL * 16 * 1024  # 1 GiB
LIVE = 4 * 63 * MIB  # bytes read and written there
LOOKS = 500


def main() -> list[dict[str, object]]:
    """Measure, print, and return what was promised."""
    host = Host(say=print)
    with tempfile.TemporaryDirectory(prefix="bench-mounts-") as folder:
        source = Path(folder) / "source"
        _fill(source)
        copied, there, back, nothing = Samples(), Samples(), Samples(), Samples()
        with copied.timing():
            shutil.copytree(source, Path(folder) / "copy")
        shutil.rmtree(Path(folder) / "copy")
        with host.start(image="base", disk="3G") as machine:
            machine.run(["true"])
            _forget_peak()
            before = _memory("VmRSS")
            with there.timing():
                mounted = machine.mount(source, "/data")
            machine.run("for file in /data/*; do echo changed >> $file; done", check=True)
            with back.timing():
                changes = mounted.copy_back()
            assert len(changes.changed) == LARGE + SMALL
            with nothing.timing():
                mounted.copy_back()
            grown = _memory("VmHWM") - before
            machine.give_back()
            live = _live(machine, source)
    host.close()
    for what, seconds in (
        ("copytree here", copied),
        ("in", there),
        ("back", back),
        ("back, unchanged", nothing),
    ):
        rate, ratio = SIZE / MIB / seconds.median, seconds.median / copied.median
        print(f"{what:16} {seconds.median:6.1f} s  {rate:6.1f} MiB/s  {ratio:5.1f} x cp")
    for what, (amount, unit, seconds) in live.items():
        print(f"{what:16} {seconds.median:6.1f} s  {amount / seconds.median:6.1f} {unit}/s")
    return [
        promise("memory of the host for 1 GiB each way", grown / MIB, 32, " MiB"),
        promise("1 GiB into a machine", SIZE / MIB / there.median, 5, " MiB/s", at_least=True),
        promise("1 GiB back", SIZE / MIB / back.median, 5, " MiB/s", at_least=True),
    ]


def _live(machine: MicroVM, source: Path) -> dict[str, tuple[float, str, Samples]]:
    """Work in a live mount; return how much was done of what, and how long it took."""
    read, written, looked = Samples(), Samples(), Samples()
    with machine.mount(source, "/live", kind="live"):
        with read.timing():
            machine.run("cat /live/large-[0-3] > /dev/null", check=True)
        with written.timing():
            machine.run("dd if=/dev/zero of=/live/written bs=1M count=252", check=True)
        with looked.timing():
            machine.run(f"cd /live; for name in $(ls | tail -n {LOOKS}); do [ -s $name ]; done", check=True)
    assert (source / "written").stat().st_size == LIVE
    return {
        "live: read": (LIVE / MIB, "MiB", read),
        "live: written": (LIVE / MIB, "MiB", written),
        "live: looked at": (LOOKS, "files", looked),
    }


def _fill(source: Path) -> None:
    source.mkdir()
    for number in range(LARGE):
        with (source / f"large-{number}").open("wb") as file:
            for _ in range(63):
                file.write(os.urandom(MIB))
    for number in range(SMALL):
        (source / f"small-{number}").write_bytes(os.urandom(16 * 1024))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak begins anew


def _memory(key: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
