"""Run the set-up of a kit in a machine while its image is built."""

from __future__ import annotations

import errno
import shlex
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from pytest_microvm.agent.transfer import receive_root_changes
from pytest_microvm.errors import BuildError, MachineError
from pytest_microvm.hypervisors import Accelerator
from pytest_microvm.images.pins import requirement
from pytest_microvm.images.rootfs import TRUST_PYC
from pytest_microvm.images.set_up import SetUp
from pytest_microvm.machine.grants import Grants, resolve
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.settings.spec import Limits, MachineSpec, Resources
from pytest_microvm.templates.chain import Base
from pytest_microvm.untrusted.text import sanitize, sanitize_line

LIFETIME = 3600.0
"""Seconds that a set-up may take."""

_LEAST = {"cpus": 1, "memory": 1024**3, "disk": 4 * 1024**3}  # of the machine; a kit may ask for more
_OUTPUT_SHOWN = 30  # lines of a command that failed
_COMMAND_SHOWN = 200  # characters
# Both outputs in the order in which they were written. The name is that of every machine's image.
_BEGIN = "exec 2>&1\numask 022\n"
_PIP = "python3 -m pip install --quiet --no-deps"
# as variables: versions of pip that do not know them ignore them
_PIP_ENVIRONMENT = {
    "PIP_BREAK_SYSTEM_PACKAGES": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_CACHE_DIR": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}
_HOST_NAME = "echo microvm > /proc/sys/kernel/hostname"


def set_up_grants(set_up: SetUp, project: Path, say: Callable[[str], None]) -> Grants:
    """Return the grants of the machine that runs a set-up: the kit's network rules for it.

    Args:
        set_up: The set-up.
        project: The user's project, whose git remotes the preset ``git`` allows.
        say: Called with hints for the user.

    Raises:
        UsageError: A rule cannot be used on this computer.
        HostError: A tool's index did not answer.
    """
    return resolve(
        MachineSpec(),
        set_up.network,
        f"kit {set_up.kit}: setup_network",
        project=project,
        file_systems=set_up.image.file_systems,
        say=say,
    )


def set_up_base(set_up: SetUp, accelerator: Accelerator, grants: Grants) -> Base:
    """Return the base of the machine that runs a set-up.

    Its resources are the kit's, if these are more than the least ones, so that most kits share a template.
    """
    given = dict(set_up.resources)
    wanted = {name: max(least, given.get(name, 0)) for name, least in _LEAST.items()}
    limits = Limits(wanted["cpus"], int(wanted["memory"]), int(wanted["disk"]), lifetime=LIFETIME)
    resources = Resources(limits.vcpus, limits.memory, limits.disk, set_up.environment)
    return Base(set_up.image, resources, accelerator, limits, grants)


def run_set_up(machine: MicroVM, set_up: SetUp, archive: IO[bytes], tell: Callable[[str], None]) -> None:
    """Install a set-up's files, run its commands, and write the archive of what they changed.

    Args:
        machine: A fresh machine.
        set_up: The set-up.
        archive: Takes the archive, which is untrusted.
        tell: Called with each stage.

    Raises:
        BuildError: A command failed, or the machine ended or exceeded a limit.
    """
    try:
        _install(machine, set_up)
        _run_commands(machine, set_up, tell)
        tell("fetching what the set-up changed")
        machine.instance.take_away()
        receive_root_changes(machine.client.link(), archive, 2 * machine.facts.limits.disk)
    except (MachineError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
            raise  # the host's own disk is full: errors of the machine's files name one
        reason = error.brief if isinstance(error, MachineError) else str(error)
        details = error.details if isinstance(error, MachineError) else ""
        raise BuildError(
            f"kit {set_up.kit}: the machine of its set-up failed: {sanitize_line(reason)}",
            details=details,
            resolution="correct the kit; its `resources` also apply to this machine, if they are more than "
            "1 vCPU, 1G of memory and 4G of disk",
        ) from error


def _install(machine: MicroVM, set_up: SetUp) -> None:
    for file in set_up.files:
        path = machine.path(file.target)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a link is replaced, not followed
        path.write_bytes(file.content())
        path.chmod(file.mode)


def _run_commands(machine: MicroVM, set_up: SetUp, tell: Callable[[str], None]) -> None:
    commands = [(f"setup[{number}]", command) for number, command in enumerate(set_up.commands)]
    if set_up.sdists:
        names = ",".join(requirement(text)[0] for text in set_up.sdists)
        commands.insert(0, ("sdists", f"{_PIP} --no-binary={names} {shlex.join(set_up.sdists)}"))
    if commands:
        machine.run(["/bin/sh", "-c", _HOST_NAME])
    for number, (key, command) in enumerate(commands):
        shown = _shown(command)
        tell(f"setting up ({number + 1} of {len(commands)}): {shown}")
        environment = _environment(set_up) | (_PIP_ENVIRONMENT if key == "sdists" else {})
        done = machine.run(["/bin/sh", "-e", "-c", _BEGIN + command], env=environment)
        if done.returncode:
            raise _failed(set_up, key, shown, done, machine)
    with suppress(FileNotFoundError):  # the image has no Python
        machine.run(["python3", "-I", "-S", "-c", TRUST_PYC])


def _environment(set_up: SetUp) -> dict[str, str]:
    return {
        "HOME": "/root",
        "DEBIAN_FRONTEND": "noninteractive",
        "LC_ALL": "C.UTF-8",
        "SOURCE_DATE_EPOCH": str(set_up.epoch),
        **dict(set_up.environment),
    }


def _failed(
    set_up: SetUp, what: str, shown: str, done: subprocess.CompletedProcess[str], machine: MicroVM
) -> BuildError:
    code = done.returncode
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    denied = [sanitize_line(str(request)) for request in machine.network.denied]
    lines = [*sanitize(done.stdout).splitlines()[-_OUTPUT_SHOWN:], *denied[-_OUTPUT_SHOWN:]]
    return BuildError(
        f"kit {set_up.kit}: {what} failed ({ended}): {shown}",
        details="\n".join(lines),
        resolution="correct the command"
        + (", or allow what it needs: the kit's key `setup_network`" if denied else " and build again"),
    )


def _shown(command: str) -> str:
    lines = command.strip().splitlines()
    return sanitize_line(lines[0], _COMMAND_SHOWN) + (" ..." if len(lines) > 1 else "")
