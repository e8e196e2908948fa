"""The host budget: the vCPUs and memory that all runs on this host may use together.

Each machine has a record in a folder that all runs of this user share; a lock makes counting and
reserving atomic. A record belongs to a process, and counts only while that process lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from pytest_microvm.errors import BudgetExhausted, UsageError
from pytest_microvm.settings.spec import format_cpus, format_size, parse_cpus, parse_size
from pytest_microvm.templates.runtime_folder import own_folder

if TYPE_CHECKING:
    from collections.abc import Callable

VARIABLE = "PYTEST_MICROVM_BUDGET"
_PAUSE = 0.05  # seconds between checks: another process does not notify us when its machine ends
_PATIENCE = 2.0  # seconds of waiting before it is reported
_HOPE = 10.0  # seconds in which another thread of this process may still end a machine


@dataclass(frozen=True)
class Record:
    """A running or starting machine: ``memory`` in bytes, ``since`` in seconds since 1970.

    ``pid`` is the id of its VMM process, 0 until that has started.
    """

    id: str
    image: str
    cpus: float
    memory: int
    owner: int
    owner_started: str
    since: float
    pid: int = 0


def default_limits() -> tuple[float, int]:
    """Return the default vCPUs (4 per core) and bytes (4/5 of memory); PYTEST_MICROVM_BUDGET overrides them.

    Raises:
        UsageError: The variable is not like ``cpus=8,memory=16G``.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 4 // 5
    cpus = 4.0 * (os.cpu_count() or 1)
    for part in filter(None, os.environ.get(VARIABLE, "").split(",")):
        name, _, value = part.partition("=")
        if name.strip() == "cpus":
            cpus = parse_cpus(value, f"{VARIABLE}: cpus")
        elif name.strip() == "memory":
            memory = parse_size(value, f"{VARIABLE}: memory")
        else:
            raise UsageError(f"{VARIABLE}: unknown key {name!r}", resolution="write cpus=8,memory=16G")
    return cpus, memory


class HostBudget:
    """Limits the machines that run on this host at the same time.

    Args:
        folder: The folder of the records.
        cpus: vCPUs of all machines together.
        memory: Bytes of memory of all machines together.

    Raises:
        HostError: Other users can change the folder.
    """

    def __init__(self, folder: Path, cpus: float, memory: int) -> None:
        self._folder = own_folder(own_folder(folder) / "machines")
        self._lock_file = folder / "budget.lock"
        self._released = threading.Condition()
        self.cpus = cpus
        self.memory = memory

    def take(
        self,
        machine: str,
        image: str,
        cpus: float,
        memory: int,
        *,
        say: Callable[[str], None] = lambda _line: None,
        reclaim: Callable[[], bool] = lambda: False,
    ) -> None:
        """Wait until a machine fits into the budget, and record it.

        Args:
            machine: Its id.
            image: Its image's name.
            cpus: Its vCPUs.
            memory: Its bytes of memory.
            say: Called with a line if waiting takes long.
            reclaim: Ends an unused machine of this process; returns whether it did.

        Raises:
            BudgetExhausted: It can never fit: it is too large, or only this process holds machines.
        """
        begin = time.monotonic()
        told = False
        while not self.try_take(machine, image, cpus, memory):
            if reclaim():
                continue
            waited = time.monotonic() - begin
            self.check_hope(cpus, memory, waited)
            if not told and waited > _PATIENCE:
                told = True
                say(f"waiting: the host budget ({self}) is in use by other machines")
            with self._released:
                self._released.wait(_PAUSE)

    def try_take(self, machine: str, image: str, cpus: float, memory: int) -> bool:
        """Record a machine if it fits now; return whether it did."""
        with FileLock(self._lock_file):  # a new one each time: a fork may not use its parent's
            records = self.records()
            if sum(record.cpus for record in records) + cpus > self.cpus:
                return False
            if sum(record.memory for record in records) + memory > self.memory:
                return False
            record = Record(machine, image, cpus, memory, os.getpid(), _started(os.getpid()), time.time())
            self._write(record)
        return True

    def started(self, machine: str, pid: int) -> None:
        """Record the process that runs a machine."""
        for record in self.records():
            if record.id == machine:
                self._write(replace(record, pid=pid))

    def _write(self, record: Record) -> None:
        """Write a record atomically: others read it without the lock."""
        draft = self._folder / f"{record.id}.new"
        draft.write_text(json.dumps(asdict(record)))
        draft.replace(self._folder / f"{record.id}.json")

    def release(self, machine: str) -> None:
        """Remove the record of a machine that has ended."""
        for ending in ("json", "new"):  # writing the record may have been interrupted
            (self._folder / f"{machine}.{ending}").unlink(missing_ok=True)
        with self._released:
            self._released.notify_all()

    def records(self) -> list[Record]:
        """Return the machines of living processes; records of dead ones are removed."""
        living = []
        for path in sorted(self._folder.glob("*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError):
                record = Record(**json.loads(path.read_text()))
                if _started(record.owner) == record.owner_started:
                    living.append(record)
                else:
                    path.unlink(missing_ok=True)
        return living

    def __str__(self) -> str:
        return f"{format_cpus(self.cpus)} vCPUs, {format_size(self.memory // 1024**2 * 1024**2)}"

    def check_hope(self, cpus: float, memory: int, waited: float = 0.0) -> None:
        """Raise an error if waiting for a machine is pointless.

        Args:
            cpus: Its vCPUs.
            memory: Its bytes of memory.
            waited: Seconds waited so far by a caller that ends no machine meanwhile.

        Raises:
            BudgetExhausted: It is too large, or for long only this process has held machines.
        """
        records = self.records()
        mine = [record for record in records if record.owner == os.getpid()]
        too_large = cpus > self.cpus or memory > self.memory
        if too_large or (waited > _HOPE and len(mine) == len(records)):
            holding = f"; this process already holds {len(mine)} machines" if mine and not too_large else ""
            wanted = f"{format_cpus(cpus)} vCPUs and {format_size(memory)}"
            raise BudgetExhausted(
                f"{wanted} do not fit into the host budget ({self}){holding}",
                resolution=f"end a machine first, ask for less, or set {VARIABLE} (cpus=8,memory=16G)",
            )


def _started(pid: int) -> str:
    """Return a process's start time (proc(5), field 22), to detect that its id was reused."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
