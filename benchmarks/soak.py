"""Machine after machine through one pytest process: nothing of it grows, or the exit status is 1.

``python benchmarks/soak.py`` runs a generated suite, a fresh machine for every test, 1,000 by default (some
ten minutes under emulation). ``--workers 2`` spreads it with pytest-xdist, ``--fixture`` uses the fixture
instead, ``--native`` uses no machines at all: what grows there is pytest's own. ``soak_watch.py`` takes the
samples.

Machines that wait ahead of their tests come and go, and what they need with them. So what is judged is the
least of every ten tests, after the first ones, in which everything is loaded and made that stays. It grows
if the slope of a line through them is more than allowed, and more than three times its standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pytest_microvm.images.store import cache_root

BOUNDS = {
    "descriptors": 0.5,
    "threads": 0.5,
    "children": 0.5,
    "resident KiB": 1024.0,
    "cache KiB": 64.0,
    "cache files": 0.5,
    "runtime files": 0.5,
    "control groups": 0.5,
    "temporary files": 0.5,
}
"""By how much each may grow with 100 tests.

Memory: pytest keeps every report, with what it says about its machine. Without machines (``--native``) that
is 0.3 MiB in 100 tests, and 0.6 in the controller of pytest-xdist."""

CONTROLLER = {**BOUNDS, "resident KiB": 1536.0}
"""The same for pytest-xdist's controller, which has all reports and rebuilds them from JSON."""

GROUP = 10  # tests whose least counts
WARM = 100  # tests that are not judged, or the first third of a short run

SUITE = """
import pytest

@pytest.mark.parametrize("number", range({count}))
def test_small({fixture}number):
    {body}
"""
IN_MACHINE = 'assert microvm.run(["true"]).returncode == 0'


def main() -> int:
    """Run, print, judge."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--count", type=int, default=1000, help="how many tests (default: 1000)")
    parser.add_argument("--workers", type=int, default=0, help="how many workers of pytest-xdist")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--fixture", action="store_true", help="use the microvm fixture, not --microvm")
    kind.add_argument("--native", action="store_true", help="use no machines: what pytest itself needs")
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="microvm-soak-") as name:
        folder = Path(name)
        run(folder, arguments)
        took = time.monotonic() - begin
        print(f"{arguments.count} tests in {took:.0f} s, load {os.getloadavg()[0]:.1f}")
        series = {path.stem: read(path) for path in sorted((folder / "samples").iterdir())}
        left = [str(path) for path in (folder / "runtime").rglob("machines/*")]
    machines = sum(samples[-1]["started"] for samples in series.values())
    stopped = sum(samples[-1]["stopped"] for samples in series.values())
    print(f"{machines} machines were started, {stopped} had ended when the last test had")
    wanted = 0 if arguments.native else arguments.count
    missed = [] if stopped == wanted else [f"{stopped} machines, not {wanted}"]
    missed += [f"left: {path}" for path in left]
    for process, samples in series.items():
        controller = arguments.workers and process.startswith("main")
        missed += told(process, samples, CONTROLLER if controller else BOUNDS)
    for line in missed:
        print(f"MISS {line}")
    return bool(missed)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """Run the suite, in folders that no other run uses.

    Raises:
        SystemExit: A test failed.
    """
    for name in ("project", "samples", "cache", "runtime", "temporary"):
        (folder / name).mkdir(mode=0o700)
    borrow(cache_root(), folder / "cache")
    fixture, body = ("microvm, ", IN_MACHINE) if arguments.fixture else ("", "assert number >= 0")
    suite = SUITE.format(count=arguments.count, fixture=fixture, body=body)
    (folder / "project/test_soak.py").write_text(suite)
    (folder / "project/pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "soak_watch", "-p", "no:cacheprovider"]
    command += ["--microvm"] if not (arguments.fixture or arguments.native) else []
    command += ["-n", str(arguments.workers)] if arguments.workers else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.fspath(Path(__file__).parent),
        "PYTEST_MICROVM_CACHE": os.fspath(folder / "cache"),
        "XDG_RUNTIME_DIR": os.fspath(folder / "runtime"),
        "TMPDIR": os.fspath(folder / "temporary"),  # overlays and what else has no name for long
        "SOAK_FOLDER": os.fspath(folder / "samples"),
    }
    done = subprocess.run(
        command, cwd=folder / "project", env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout.strip().rpartition("\n")[2])
    if done.returncode:
        raise SystemExit(done.stdout)


def borrow(cache: Path, own: Path) -> None:
    """Use another cache's images and what it knows of this computer, but none of its templates."""
    (own / "images").symlink_to(cache / "images")
    if (cache / "accelerator.json").exists():
        shutil.copy(cache / "accelerator.json", own)


def read(path: Path) -> list[dict[str, int]]:
    """Return a process's samples."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(process: str, samples: list[dict[str, int]], bounds: dict[str, float]) -> list[str]:
    """Print what a process had, and return what grew."""
    warm = min(WARM, len(samples) // 3)
    print(f"\n{process}: {len(samples)} tests, the first {warm} not judged")
    print(f"  {'':18}{'first':>10}{'median':>10}{'last':>10}{'most':>10}   growth in 100 tests (allowed)")
    missed = []
    for name, bound in bounds.items():
        values = [sample[name] for sample in samples]
        growth, error = slope(values[warm:])
        row = (values[0], statistics.median(values), values[-1], max(values))
        columns = "".join(f"{value:>10.0f}" for value in row)
        print(f"  {name:18}{columns}{growth:>+12.2f} +- {error:.2f} ({bound:g})")
        if growth > max(bound, 3 * error):
            missed.append(f"{process}: {name} grows by {growth:.2f} with 100 tests, allowed are {bound:g}")
    return missed


def slope(values: list[int]) -> tuple[float, float]:
    """Return by how much the least of every few values grows with 100 of them, and its standard error."""
    least = [min(values[start : start + GROUP]) for start in range(0, len(values) - GROUP + 1, GROUP)]
    if len(least) <= 2:
        raise SystemExit("too few tests to tell: take more")
    places = range(len(least))
    line = statistics.linear_regression(places, least)
    squares = sum((y - line.intercept - line.slope * x) ** 2 for x, y in zip(places, least, strict=True))
    spread = sum((x - statistics.mean(places)) ** 2 for x in places)
    return line.slope * 100 / GROUP, (squares / (len(least) - 2) / spread) ** 0.5 * 100 / GROUP


if __name__ == "__main__":
    raise SystemExit(main())
