"""Process limits that the kernel enforces, with or without cgroups (setrlimit(2), prlimit(1))."""

from __future__ import annotations

import resource
from dataclasses import dataclass


@dataclass(frozen=True)
class Rlimits:
    """Resource limits of a process.

    Args:
        files: Open descriptors.
        file_bytes: The largest file it may write.
        address_bytes: Address space.
        data_bytes: Private writable memory, touched or not.
        cpu_seconds: CPU time, in whole seconds; ``None``: no limit.
        threads: Threads of its user; ``None`` if other processes run as the same user.
    """

    files: int
    file_bytes: int
    address_bytes: int
    data_bytes: int
    cpu_seconds: int | None = None
    threads: int | None = None


def prlimit_options(limits: Rlimits) -> list[str]:
    """Return prlimit's options for ``limits``, capped at our own hard limits."""
    wanted = {
        "core": (resource.RLIMIT_CORE, 0),
        "nofile": (resource.RLIMIT_NOFILE, limits.files),
        "fsize": (resource.RLIMIT_FSIZE, limits.file_bytes),
        "as": (resource.RLIMIT_AS, limits.address_bytes),
        "data": (resource.RLIMIT_DATA, limits.data_bytes),
        "cpu": (resource.RLIMIT_CPU, limits.cpu_seconds),
        "nproc": (resource.RLIMIT_NPROC, limits.threads),
    }
    options = []
    for name, (number, limit) in wanted.items():
        if limit is None:
            continue
        hard = resource.getrlimit(number)[1]  # an ordinary user cannot exceed it
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        # At the soft limit of CPU time the kernel sends SIGXCPU, which distinguishes it from other ends.
        options.append(f"--{name}={soft}:{soft + 1 if name == 'cpu' and soft != hard else soft}")
    return options
