"""bubblewrap, on demand: no files but programs and libraries, no processes but one's own (bwrap(1))."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pytest_microvm.errors import HostError

VARIABLE = "PYTEST_MICROVM_BWRAP"
"""Asks for bubblewrap, when it is ``1``."""


def wanted_bubblewrap() -> str:
    """Return the program if it is asked for, else nothing.

    Raises:
        HostError: It is missing.
    """
    if os.environ.get(VARIABLE) != "1":
        return ""
    program = shutil.which("bwrap")
    if program is None:
        raise HostError("bwrap is missing", resolution=f"apt-get install bubblewrap, or unset {VARIABLE}")
    return program


def bubblewrap_command(
    program: str, devices: Sequence[Path], report: int | None, *, capabilities: bool
) -> list[str]:
    """Return what comes before a command's argv.

    Args:
        program: bubblewrap's program.
        devices: What the command must find in /dev.
        report: The descriptor on which its process id is told, as JSON.
        capabilities: Whether it keeps what it takes to become another user, but no more.
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
