"""Optional bubblewrap sandbox: hides all files but programs and libraries, and other processes (bwrap(1))."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pytest_microvm.errors import HostError
from pytest_microvm.programs.needed import INSTALL, find_program

VARIABLE = "PYTEST_MICROVM_BWRAP"
"""Environment variable that enables bubblewrap when set to ``1``."""


def wanted_bubblewrap() -> str:
    """Return the path of ``bwrap`` if bubblewrap is enabled, else an empty string.

    Raises:
        HostError: It is enabled but not installed.
    """
    if os.environ.get(VARIABLE) != "1":
        return ""
    program = find_program("bwrap")
    if program is None:
        raise HostError("bwrap is missing", resolution=f"{INSTALL}, or unset {VARIABLE}")
    return program


def bubblewrap_command(
    program: str, devices: Sequence[Path], report: int | None, *, capabilities: bool
) -> list[str]:
    """Return the bwrap argv prefix that sandboxes a command.

    Args:
        program: Path of ``bwrap``.
        devices: Device files that the command needs.
        report: Descriptor to which ``bwrap`` writes the command's process id, as JSON.
        capabilities: Whether to drop all capabilities except those for changing the user.
    """
    command = [program, "--ro-bind", "/usr", "/usr"]
    for folder in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")):
        if folder.is_symlink():
            command += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.is_dir():
            command += ["--ro-bind", str(folder), str(folder)]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--proc", "/proc", "--dev", "/dev"]
    for device in devices:
        command += ["--dev-bind", str(device), str(device)]
    command += ["--unshare-pid", "--as-pid-1", "--unshare-ipc", "--unshare-uts", "--chdir", "/"]
    if capabilities:
        command += ["--cap-drop", "ALL"]
        for name in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            command += ["--cap-add", name]
    if report is not None:
        command += ["--info-fd", str(report)]
    return [*command, "--die-with-parent", "--"]
