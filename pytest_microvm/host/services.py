"""Services: servers of an image that are started once, in the template that its machines are copies of."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial

from pytest_microvm.errors import MachineError
from pytest_microvm.host.starting import machine_in_the_making
from pytest_microvm.images.image import Image, Service
from pytest_microvm.machine.instance import Instance
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.templates.chain import Base, TemplateStep
from pytest_microvm.untrusted.text import sanitize

_TIMEOUT = 300.0  # seconds for a service to become ready; under emulation a daemon can take a minute
_LOGS = "/var/log/microvm"
_LINES = 30  # of the log of a service that did not start
_TAIL_BYTES = 16 * 1024

# The server may stay in the foreground, so its command runs in the background, in a session of its own.
_SCRIPT = """
mkdir -p {logs} && rm -f {status} || exit
setsid sh -c {command} >{log} 2>&1 </dev/null &
while :; do
	if ({ready}
	) >{said} 2>&1 </dev/null; then rm -f {said}; exit 0; fi
	if read -r code 2>/dev/null <{status} && [ "$code" != 0 ]; then exit "$code"; fi
	sleep 0.1
done
"""
_COMMAND = "({start}\n); echo $? >{status}"


def with_services(base: Base, steps: Sequence[TemplateStep]) -> Sequence[TemplateStep]:
    """Return ``steps``, after the step that starts the services of the image if it has some."""
    services = base.image.services
    if not services:
        return steps
    inputs = tuple(json.dumps(astuple(service)) for service in services)
    title = "starting " + ", ".join(service.name for service in services)
    return [TemplateStep("services", inputs, partial(_start_all, base), title), *steps]


def _start_all(base: Base, instance: Instance) -> dict[str, bytes]:
    machine = machine_in_the_making(base, instance)
    for service in base.image.services:
        _start(machine, base.image, service)
    return {}


def _start(machine: MicroVM, image: Image, service: Service) -> None:
    """Start a service and wait until it is ready.

    Raises:
        MachineError: Its command failed, or it does not become ready.
    """
    log, status, said = (f"{_LOGS}/{service.name}.{kind}" for kind in ("log", "status", "ready"))
    command = shlex.quote(_COMMAND.format(start=service.start, status=status))
    script = _SCRIPT.format(
        logs=_LOGS, status=status, log=log, said=said, command=command, ready=service.ready
    )
    try:
        done = machine.run(script, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        problem = f"is not ready after {_TIMEOUT:.0f} s"
    else:
        if done.returncode == 0:
            return
        problem = f"failed before it was ready (exit code {done.returncode})"
    raise MachineError(
        f"service {service.name} of image {image.name} {problem}",
        details=_said(machine, log, said),
        resolution=f"correct the commands services.{service.name}.start and .ready in its kit.toml",
    )


def _said(machine: MicroVM, log: str, ready: str) -> str:
    """Return the last lines of a service's log, and of its readiness command, made safe to print."""
    done = machine.run(["tail", "-q", "-c", str(_TAIL_BYTES), log, ready], timeout=_TIMEOUT)
    return sanitize("\n".join(done.stdout.splitlines()[-_LINES:]))
