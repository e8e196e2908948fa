"""The options for a machine's spec and grants, common to every verb that starts a machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.settings.mounts import parse_mounts
from pytest_microvm.settings.options import MACHINE
from pytest_microvm.settings.spec import MachineSpec

if TYPE_CHECKING:
    import argparse


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for image, quotas and grants to a verb."""
    for option in MACHINE:
        known = option.arguments()
        if option.part == "image":
            known["help"] += f" (default: {option.default})"
        parser.add_argument(f"--{option.word}", dest=option.name, **known)


def machine_spec(arguments: argparse.Namespace, where: str) -> MachineSpec:
    """Return the machine's spec from the options.

    Args:
        arguments: The parsed options.
        where: The command, for errors.

    Raises:
        UsageError: An option is invalid.
    """
    written = {option.name: getattr(arguments, option.name) for option in MACHINE}
    given: dict[str, Any] = {key: value for key, value in written.items() if value is not None}
    if arguments.mounts:
        given["mounts"] = parse_mounts(arguments.mounts, "--mount", Path.cwd())
    return MachineSpec().with_changes(given, where)
