"""Prepared templates: shell commands run once in a machine, whose frozen state is copied from then on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from pytest_microvm.errors import MachineError
from pytest_microvm.host.host import Host
from pytest_microvm.host.starting import machine_in_the_making
from pytest_microvm.machine.grants import Grants
from pytest_microvm.machine.instance import Instance
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.templates.chain import Base, TemplateStep

_TIMEOUT = 3600.0
_OUTPUT_SHOWN = 30  # lines of a command that failed

Run = Callable[[MicroVM, str], tuple[int, str]]
"""Runs a command in a machine; returns its status and output."""


def prepared_step(
    host: Host,
    base: Base,
    commands: Sequence[str],
    *,
    folder: PurePosixPath,
    put: Callable[[MicroVM], None],
    inputs: Sequence[str],
    grants: Grants,
    run: Run | None = None,
) -> TemplateStep:
    """Return the step of a template chain in which ``commands`` run.

    Args:
        host: The host.
        base: The chain's base.
        commands: For the machine's ``/bin/sh``.
        folder: Their working folder.
        put: Copies the files that they need into the machine.
        inputs: Everything else that affects the result: those files' digest, network rules...
        grants: Their grants.
        run: Runs one of them; by default silently, for an hour at most.
    """

    def work(instance: Instance) -> dict[str, bytes]:
        machine = machine_in_the_making(base, instance, grants.for_machine("template"))
        put(machine)
        for command in commands:
            host.say(f"preparing: {command}")
            status, said = (run or _run(folder))(machine, command)
            if status:
                denied = "".join(f"\n{request}" for request in machine.network.denied)
                raise MachineError(
                    f"prepare: {command!r} ended with status {status}",
                    details="\n".join(said.splitlines()[-_OUTPUT_SHOWN:]) + denied,
                    resolution="correct it, or name what it needs in prepare_inputs or prepare_network",
                )
        instance.take_away()
        return {}

    shaping = (json.dumps(list(commands)), str(folder), *inputs)
    return TemplateStep("prepared", shaping, work, f"preparing ({len(commands)} commands)")


def _run(folder: PurePosixPath) -> Run:
    def run(machine: MicroVM, command: str) -> tuple[int, str]:
        done = machine.run(command, cwd=folder, timeout=_TIMEOUT)
        return done.returncode, done.stdout + done.stderr

    return run
