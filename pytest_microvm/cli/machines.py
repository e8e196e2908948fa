"""``pytest-microvm ps``, ``shell`` and ``rm``: running machines, and kept machines."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from pytest_microvm.cli.run import start_errors
from pytest_microvm.errors import UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.machine.relay import on_terminal, plainly, shell_status


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verbs to the command line."""
    ps = verbs.add_parser("ps", help="list machines that run and machines that were kept")
    ps.add_argument("--json", action="store_true", help="print JSON for scripts")
    ps.set_defaults(run=_ps)

    shell = verbs.add_parser(
        "shell",
        help="enter a machine that was kept",
        description="Enter a copy of a machine that `pytest --microvm-keep=failed` kept, as it was when its "
        "test had failed. What is done in the copy is gone when you leave; enter it as often as you like.",
        epilog="example: pytest-microvm shell vm-1a2b3c4d -- cat /var/log/app.log",
    )
    shell.add_argument("id", metavar="ID", help="its id, see `pytest-microvm ps`")
    shell.add_argument("command", nargs="*", metavar="COMMAND", help="what to run (default: a shell)")
    shell.set_defaults(run=_shell)

    rm = verbs.add_parser("rm", help="remove machines that were kept")
    rm.add_argument("id", nargs="*", metavar="ID", help="their ids")
    rm.add_argument("--all", action="store_true", help="remove all of them")
    rm.set_defaults(run=_rm)


def _ps(arguments: argparse.Namespace) -> int:
    host = Host()
    rows: list[dict[str, Any]] = [
        {
            "id": record.id,
            "state": "running",
            "image": record.image,
            "since": record.since,
            "cpus": record.cpus,
            "memory": record.memory,
            "owner": record.owner,
            "about": "",
        }
        for record in host.budget.records()
    ]
    rows += [
        {"id": kept.id, "state": "kept", "image": kept.image, "since": kept.since, "about": kept.about}
        for kept in host.kept()
    ]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    if not rows:
        print("no machines (keep those of failed tests with --microvm-keep=failed)")
        return 0
    print(f"{'ID':<12} {'STATE':<8} {'IMAGE':<12} {'AGE':>6}  ABOUT")
    for row in rows:
        age = _age(time.time() - row["since"])
        about = row["about"] or f"process {row['owner']}"
        print(f"{row['id']:<12} {row['state']:<8} {row['image']:<12} {age:>6}  {about}")
    return 0


def _shell(arguments: argparse.Namespace) -> int:
    host = Host(say=lambda line: print(f"pytest-microvm: {line}", file=sys.stderr))
    try:
        with host.enter(arguments.id) as machine:
            command = arguments.command or ["/bin/sh", "-c", "exec $(command -v bash || echo sh) -l"]
            with start_errors() as status:
                if not sys.stdin.isatty():
                    status.code = shell_status(plainly(machine, command, raw=True))
                else:
                    print(f"in a copy of {arguments.id}; leave with exit or Ctrl-D", file=sys.stderr)
                    status.code = shell_status(on_terminal(machine, command))
            return status.code
    finally:
        host.close()


def _rm(arguments: argparse.Namespace) -> int:
    host = Host()
    kept = {entry.id for entry in host.kept()}
    wanted = sorted(kept) if arguments.all else arguments.id
    if not wanted and not arguments.all:
        raise UsageError("nothing to remove", resolution="name ids, or write --all; see `pytest-microvm ps`")
    for name in wanted:
        if name not in kept:
            raise UsageError(f"no machine {name!r} was kept", resolution="see `pytest-microvm ps`")
        host.templates.remove(name)
        print(f"removed {name}")
    return 0


def _age(seconds: float) -> str:
    if seconds < 100:  # noqa: PLR2004 - up to where seconds read well
        return f"{seconds:.0f} s"
    if seconds < 6000:  # noqa: PLR2004
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
