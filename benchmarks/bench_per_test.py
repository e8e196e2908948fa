"""A fresh machine per test against a fresh ``python -m pytest`` process per test.

Sixty small tests run in machines one after the other, without and with a pool; before and after,
native processes run one of these tests each, with the same Python packages as the machines' image.
Ratios are taken inside this one run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import tomllib
from measure import Samples, promise

ROOT = Path(__file__).parent.parent
TESTS = 60
NATIVE = 8
SUITE = """
import pytest

@pytest.mark.parametrize("number", range({tests}))
def test_small(number, tmp_path):
    (tmp_path / "file").write_text(str(number))
    assert sum(range(10)) == 45
"""


class Clock:
    """Note when each test begins and ends."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.passed = 0

    def pytest_runtest_logstart(self) -> None:
        """A test begins."""
        self.begun.append(time.perf_counter())

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count what passed."""
        self.passed += report.when == "call" and report.passed

    def pytest_runtest_logfinish(self) -> None:
        """A test has ended."""
        self.ended.append(time.perf_counter())


def in_machines(pool: int) -> Clock:
    """Run the suite in machines, and return when what happened."""
    clock = Clock()
    status = pytest.main(["-q", "--microvm", f"--microvm-pool={pool}"], plugins=[clock])
    if status != 0 or clock.passed != TESTS:
        raise SystemExit(f"{clock.passed} of {TESTS} tests passed, status {status}")
    return clock


def native(python: str, samples: Samples, **variables: str) -> None:
    """Run one test in a process of its own, several times."""
    environment = {**os.environ, **variables}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the machines' Python has its modules compiled, too
    for number in range(NATIVE):
        command = [python, "-m", "pytest", "-q", f"test_small.py::test_small[{number}]"]
        with samples.timing():
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def same_packages(folder: Path) -> str:
    """Make an environment with the packages of the machines' image, and return its Python."""
    kit = tomllib.loads((ROOT / "images/python/kit.toml").read_text())
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin/python")
    subprocess.run([python, "-m", "pip", "install", "-q", *kit["wheels"]], check=True)
    return python


def main() -> list[dict[str, object]]:
    """Measure, print, and return what was promised."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as environment:
        python = same_packages(Path(environment))
        (Path(folder) / "test_small.py").write_text(SUITE.format(tests=TESTS))
        (Path(folder) / "pytest.ini").write_text("[pytest]\n")
        os.chdir(folder)
        in_machines(0)  # makes the templates
        processes, bare = Samples(), Samples()
        native(python, Samples())  # writes what Python caches
        native(python, processes)
        serial = in_machines(0)
        native(python, processes)
        native(python, bare, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
        pooled = in_machines(max(1, (os.cpu_count() or 2)))
        os.chdir("/")
    each = Samples([end - begin for begin, end in zip(serial.begun, serial.ended, strict=True)])
    rate = TESTS / (pooled.ended[-1] - pooled.begun[0])
    print(f"one native process   {processes} s, with the image's packages")
    print(f"one native process   {bare} s, without plug-ins: {each.median / bare.median:.2f} x")
    print(f"one machine, serial  {each} s")
    print(f"with a pool          {rate:.2f} tests a second")
    return [
        promise("time per test, serial, against a native process", each.median / processes.median, 1.4, " x"),
        promise("tests a second with the pool", rate, 5.0, at_least=True),
    ]


if __name__ == "__main__":
    main()
