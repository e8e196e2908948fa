"""A plug-in of this computer: after every test, write down what its pytest process has and uses.

Given by ``-p soak_watch``; ``benchmarks/soak.py`` reads what it writes into ``$SOAK_FOLDER``, a file for each
process: of a run without workers that is one, with pytest-xdist the controller's and one for each worker.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pytest_microvm.hypervisors.cgroups import find_cgroups

microvm_host_only = True


def pytest_configure(config: Any) -> None:
    """Begin."""
    folder = Path(os.environ["SOAK_FOLDER"])
    config.pluginmanager.register(Watch(config, folder), "soak-watch")


class Watch:
    """Write a line for every test that has ended, and so has its machine.

    Args:
        config: pytest's configuration.
        folder: Where the file goes.
    """

    def __init__(self, config: Any, folder: Path) -> None:
        self._role = "worker" if hasattr(config, "workerinput") else "main"
        self._folder = folder
        self._file: IO[str] | None = None
        self._started: set[str] = set()
        self._stopped: set[str] = set()
        self._tests = 0

    def pytest_microvm_started(self, facts: Any) -> None:
        """Count a machine."""
        self._started.add(facts.id)

    def pytest_microvm_stopped(self, facts: Any) -> None:
        """Count one that has ended."""
        self._stopped.add(facts.id)

    def pytest_runtest_logfinish(self) -> None:
        """Write a line."""
        self._tests += 1
        if self._file is None:  # only now: a controller's workers are other processes with other numbers
            path = self._folder / f"{self._role}-{os.getpid()}.jsonl"
            self._file = path.open("w", buffering=1)
        machines = {"started": len(self._started), "stopped": len(self._stopped)}
        line = {"tests": self._tests, **machines, **sample()}
        self._file.write(json.dumps(line) + "\n")

    def pytest_unconfigure(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def sample() -> dict[str, int]:
    """Return what this process has open, and what lies in the folders that are this run's alone."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,  # noqa: PTH208 - the one that lists
        "threads": int(status["Threads"]),
        "children": sum(len(file.read_text().split()) for file in Path("/proc/self/task").glob("*/children")),
        "resident KiB": int(status["VmRSS"].split()[0]),
        "cache KiB": allocated(Path(os.environ["PYTEST_MICROVM_CACHE"])) // 1024,
        "cache files": sum(1 for _ in walk(Path(os.environ["PYTEST_MICROVM_CACHE"]))),
        "runtime files": sum(1 for _ in walk(Path(os.environ["XDG_RUNTIME_DIR"]))),
        "control groups": len(own_groups()),
        "temporary files": sum(1 for _ in walk(Path(os.environ["TMPDIR"]))),
    }


def walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what lies below ``folder``; others add and remove meanwhile, links are not followed."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path))


def allocated(folder: Path) -> int:
    """Return the bytes on the disk of all that lies below ``folder``."""
    total = 0
    for entry in walk(folder):
        try:
            total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:  # gone meanwhile
            continue
    return total


def own_groups() -> list[Path]:
    """Return the control groups of this process's machines: they are named after it."""
    parents = {found.parent for found in find_cgroups().controllers.values() if found is not None}
    return [path for parent in parents for path in parent.glob(f"pytest-microvm-{os.getpid()}-*")]
