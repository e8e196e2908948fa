"""The options that say what a machine is made of and given, for every verb that starts one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.mounts import parse_mounts
from pytest_microvm.spec import PARSERS, MachineSpec

if TYPE_CHECKING:
    import argparse

QUOTAS = {
    "cpus": ("N", "CPUs; 0.5 is one vCPU, throttled"),
    "memory": ("SIZE", "memory, such as 512M"),
    "disk": ("SIZE", "what it may write to its disk"),
    "pids": ("N", "processes and threads at the same time"),
    "timeout": ("SECONDS", "how long the command may take"),
    "cpu_seconds": ("SECONDS", "CPU time in total"),
    "output": ("SIZE", "what the command may print"),
    "lifetime": ("SECONDS", "how long the machine may exist"),
    "network_bytes": ("SIZE", "what it may send and receive"),
    "connections": ("N", "how many connections it may make"),
    "bandwidth": ("SIZE", "bytes a second over the network"),
}
GRANTS = {
    "network": ("RULE", "what it may reach: a host, host:port, https://host/path/*, pip, npm, apt, git, all"),
    "host": ("NAME=ADDRESS[:PORT]", "where a name leads"),
    "credential": ("SPEC", "added to its requests on the way out, such as host=api.example.com,env=TOKEN"),
    "secret": (
        "NAME=SOURCE",
        "a value for it, such as TOKEN=env:TOKEN[,as=file]; file:, command:, keyring: too",
    ),
    "mount": (
        "SOURCE:/TARGET[:ro][:git|:live]",
        "a directory, copied in, and back unless :ro; :git hands a clone over; :live is worked in",
    ),
}
_KEYS = {"network": "network", "host": "hosts", "credential": "credentials", "secret": "secrets"}


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the image, the quotas and the grants to a verb."""
    parser.add_argument("--image", metavar="KIT", help="a kit's name or path (default: python)")
    for key, (metavar, text) in QUOTAS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", metavar=metavar, help=text)
    for key, (metavar, text) in GRANTS.items():
        parser.add_argument(
            f"--{key}", action="append", default=[], metavar=metavar, help=f"{text}; repeatable"
        )


def machine_spec(arguments: argparse.Namespace, where: str) -> MachineSpec:
    """Return what the machine is made of and given.

    Args:
        arguments: What was parsed.
        where: The command, for errors.

    Raises:
        UsageError: An option cannot be used.
    """
    written = {key: getattr(arguments, key) for key in ("image", *QUOTAS)}
    given: dict[str, Any] = {key: value for key, value in written.items() if value is not None}
    for option, key in _KEYS.items():
        if getattr(arguments, option):
            given[key] = getattr(arguments, option)
    if arguments.mount:
        given["mounts"] = parse_mounts(arguments.mount, "--mount", Path.cwd())
    assert set(given) <= set(PARSERS)
    return MachineSpec().with_changes(given, where)
