"""``pytest-microvm top``: show running machines and their resource usage."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pytest_microvm.host.host import Host
from pytest_microvm.hypervisors.usage import process_usage
from pytest_microvm.settings.spec import format_cpus, parse_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from pytest_microvm.templates.budget import HostBudget

_MIB = 1024**2


@dataclass(frozen=True)
class MachineRow:
    """One machine, as ``--json`` prints it.

    Args:
        id: The machine's id.
        image: Its image's name.
        cpus: Its number of vCPUs.
        memory: Its RAM in bytes.
        cpu_percent: CPU time since the previous sample, in percent of one CPU; ``None`` at the first.
        cpu_seconds: Total CPU time in seconds.
        memory_bytes: Host memory in use, in bytes.
        peak_memory_bytes: Its peak.
        age: Seconds since it was added to the host budget.
        owner: The process that owns it.
    """

    id: str
    image: str
    cpus: float
    memory: int
    cpu_percent: float | None
    cpu_seconds: float
    memory_bytes: int
    peak_memory_bytes: int
    age: float
    owner: int


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb ``top``."""
    parser = verbs.add_parser(
        "top",
        help="show running machines and what they use",
        description="Show the machines of all runs of this user, the busiest first, until Ctrl-C. "
        "What is shown is the host's view: the VMM's process, not what the guest says.",
        epilog="example: pytest-microvm top --once",
    )
    parser.add_argument(
        "--once", action="store_true", help="print the table once and exit (so without a terminal)"
    )
    parser.add_argument("--interval", default="1", metavar="SECONDS", help="between two updates (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON for scripts once, and exit")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    interval = parse_seconds(arguments.interval, "--interval")
    budget = Host().budget
    if arguments.json:
        print(json.dumps([asdict(line) for line in look(budget)], indent=1))
        return 0
    from rich.console import Console  # noqa: PLC0415 - slow to load

    console = Console()
    if arguments.once or not sys.stdout.isatty():
        console.print(_table(look(budget), budget))
        return 0
    from rich.live import Live  # noqa: PLC0415

    before: dict[str, tuple[float, float]] = {}
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_table(look(budget, before), budget), refresh=True)
            threading.Event().wait(interval)


def look(budget: HostBudget, before: dict[str, tuple[float, float]] | None = None) -> list[MachineRow]:
    """Sample the running machines; return the busiest first.

    Args:
        budget: The host budget, which records running machines.
        before: Time and CPU seconds of each machine at the previous sample; updated in place.
    """
    before = {} if before is None else before
    now, lines = time.monotonic(), []
    for record in budget.records():
        usage = process_usage(record.pid) if record.pid else None
        if usage is None:  # it is still starting, or has just ended
            continue
        last = before.get(record.id)
        percent = None if last is None else 100 * (usage.cpu_seconds - last[1]) / max(now - last[0], 0.001)
        before[record.id] = (now, usage.cpu_seconds)
        lines.append(
            MachineRow(
                id=record.id,
                image=record.image,
                cpus=record.cpus,
                memory=record.memory,
                cpu_percent=None if percent is None else round(percent, 1),
                cpu_seconds=usage.cpu_seconds,
                memory_bytes=usage.memory_bytes,
                peak_memory_bytes=usage.peak_memory_bytes,
                age=round(time.time() - record.since, 1),
                owner=record.owner,
            )
        )
    return sorted(lines, key=lambda line: -(line.cpu_percent or line.cpu_seconds))


def _table(lines: list[MachineRow], budget: HostBudget) -> Table:
    from rich.table import Table  # noqa: PLC0415 - slow to load

    cpus, memory = sum(line.cpus for line in lines), sum(line.memory for line in lines)
    taken = f"{format_cpus(cpus)} vCPUs, {memory // _MIB} MiB of {budget}"
    table = Table(title=f"{len(lines)} machines, {taken}", title_justify="left", box=None, pad_edge=False)
    table.add_column("ID")
    table.add_column("IMAGE")
    for name in ("CPUS", "CPU %", "CPU S", "MEMORY", "PEAK", "AGE S", "OWNER"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            line.id,
            line.image,
            format_cpus(line.cpus),
            "" if line.cpu_percent is None else f"{line.cpu_percent:.0f}",
            f"{line.cpu_seconds:.1f}",
            f"{line.memory_bytes // _MIB} MiB",
            f"{line.peak_memory_bytes // _MIB} MiB",
            f"{line.age:.0f}",
            str(line.owner),
        )
    return table
