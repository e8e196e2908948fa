"""``pytest-microvm setup``: install the programs that this computer lacks."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.images.kits import host_architecture
from pytest_microvm.programs.needed import INSTALL, DebianPackage, find_program, missing_packages

_DESCRIPTION = """\
Install the programs that machines need and this computer lacks, such as QEMU, mmdebstrap and squashfs-tools.
The command lists them, prints the commands that install them, and asks before it runs these. They use apt-get
(Debian, Ubuntu), with sudo unless you are root. On another system nothing is installed: install the listed
programs with its package manager.

The exit status is 0 if nothing is missing, or if everything was installed; 1 if something is still missing;
4 if there is no terminal to ask on. `pytest-microvm doctor` checks all else: KVM, rights, disk, memory.
"""
_EPILOG = """\
examples:
  pytest-microvm setup --dry-run   list missing programs and the commands; change nothing
  pytest-microvm setup             the same, then ask and install
  pytest-microvm setup --yes       install without asking: for scripts and CI
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb ``setup``."""
    parser = subparsers.add_parser(
        "setup",
        help="install the programs that machines need and this computer lacks",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--yes", action="store_true", help="install without asking")
    choice.add_argument("--dry-run", action="store_true", help="only list programs and commands")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    host_architecture()  # no program helps if machines cannot have this one
    missing = missing_packages()
    if not missing:
        print("nothing is missing")
        return 0
    commands = _install_commands(missing)
    print(*(f"missing: {package}" for package in missing), "to install:", sep="\n")
    print(*(f"  {shlex.join(command)}" for command in commands.values()), sep="\n", flush=True)
    if arguments.dry_run:
        return 1
    if not arguments.yes and not _confirmed():
        print("nothing was installed")
        return 1
    _install(commands)
    return 0


def _install_commands(packages: Sequence[DebianPackage]) -> dict[str, list[str]]:
    """Return the commands that install ``packages``, by a short name for messages.

    Raises:
        HostError: This system does not have apt-get.
    """
    if find_program("apt-get") is None:
        raise HostError(
            "programs are missing, and without apt-get (Debian, Ubuntu) setup cannot install them",
            details="\n".join(f"missing: {package}" for package in packages),
            resolution="install them with this system's package manager; their packages may have other names",
        )
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    install = [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes"]
    names = [package.name for package in packages]
    return {
        "apt-get update": [*as_root, "apt-get", "update"],
        "apt-get install": [*install, "--no-install-recommends", *names],
    }


def _confirmed() -> bool:
    """Ask on the terminal whether to run the commands.

    Raises:
        UsageError: stdin is not a terminal.
    """
    if not sys.stdin.isatty():
        raise UsageError(
            "setup asks before it installs programs, and stdin is not a terminal",
            resolution=f"{INSTALL} --yes, or run the commands above",
        )
    print("Run these commands now? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _install(commands: Mapping[str, Sequence[str]]) -> None:
    """Run the commands, and check that nothing is missing afterwards.

    Raises:
        HostError: sudo is missing, a command failed, or something is still missing.
    """
    if os.geteuid() != 0 and find_program("sudo") is None:
        raise HostError(
            "root's rights are needed, and sudo is not installed",
            resolution="run the commands above as root, without sudo",
        )
    for name, command in commands.items():
        status = _run_to_its_end(command)
        if status != 0:
            raise HostError(
                f"{name} failed (exit code {status})",
                resolution=f"read its messages above, then run {INSTALL} again",
            )
    missing = missing_packages()
    if missing:
        raise HostError(
            "the packages were installed, but programs are still missing",
            details="\n".join(f"missing: {package}" for package in missing),
            resolution="see whether PATH has the folders in which they were installed",
        )
    print("nothing is missing any more; next: pytest-microvm doctor")


def _run_to_its_end(command: Sequence[str]) -> int:
    """Run a command and return its status; Ctrl-C, which it receives as well, does not cut it off.

    dpkg that is killed leaves packages half-installed.
    """
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
