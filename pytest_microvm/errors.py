"""Every error this package raises, as one small tree.

MicroVMError
├── UsageError              bad input: an option, a key, a path, a value
│   ├── KitError            a kit file that cannot be used
│   └── LockError           an image that is not the one that ``microvm.lock`` pins
├── HostError               this computer lacks something: a program, a permission, memory, disk
│   ├── HypervisorMissing
│   └── BudgetExhausted     the host budget can never hold the requested machine
├── ImageError              an image that cannot be found, built or trusted
│   ├── BuildError          a build step failed
│   └── PullError           a container image could not be fetched, or was refused
└── MachineError            a machine did not do what was asked
    ├── BootError           no hello in time (the machine never became ready): outcome ``infra``
    ├── MachineCrashed      the machine ended while it was in use: outcome ``crashed``
    ├── ProtocolViolation   the guest violated the protocol; the machine is ended
    ├── TransferError       files could not be moved
    ├── MountConflict       changes to a mounted directory that were not copied back; the others were
    └── QuotaExceeded       a limit the host enforces was reached: outcome ``quota``
"""

from __future__ import annotations

from typing import Literal


class MicroVMError(Exception):
    """Base of every error of this package.

    Args:
        brief: What happened, in one line.
        details: Why, with evidence (a program's last lines, a console's tail).
        resolution: What to do next.
    """

    def __init__(self, brief: str, *, details: str = "", resolution: str = "") -> None:
        super().__init__(brief)
        self.brief = brief
        self.details = details
        self.resolution = resolution

    def __str__(self) -> str:
        lines = [self.brief]
        if self.details:
            lines += ["  " + line for line in self.details.splitlines()]
        if self.resolution:
            lines.append("next step: " + self.resolution)
        return "\n".join(lines)


class UsageError(MicroVMError):
    """Input that cannot be used: an option, a configuration key, a path, a value."""


class KitError(UsageError):
    """A kit file that cannot be used."""


class LockError(UsageError):
    """An image that is not the one that ``microvm.lock`` pins, or that it does not pin."""


class HostError(MicroVMError):
    """This computer lacks something: a program, a permission, memory or disk."""


class HypervisorMissing(HostError):
    """No usable hypervisor is installed."""


class BudgetExhausted(HostError):
    """The host budget can never hold the requested machine."""


class ImageError(MicroVMError):
    """An image that cannot be found, built or trusted."""


class BuildError(ImageError):
    """A step of an image build failed."""


PullFailure = Literal["absent", "denied", "unreachable", "refused", "unverified"]
"""The kind of a :class:`PullError`."""


class PullError(ImageError):
    """A container image could not be fetched, or its content was refused.

    Args:
        brief: What happened, in one line.
        reason: ``absent``: there is no such image; ``denied``: this user may not have it; ``unreachable``:
            the registry does not answer; ``refused``: the content is damaged, hostile or not supported;
            ``unverified``: it lacks a signature that the user demands.
        details: Why, with evidence.
        resolution: What to do next.
    """

    def __init__(self, brief: str, *, reason: PullFailure, details: str = "", resolution: str = "") -> None:
        super().__init__(brief, details=details, resolution=resolution)
        self.reason = reason


class MachineError(MicroVMError):
    """A machine did not do what was asked."""


class BootError(MachineError):
    """A machine never became ready (outcome ``infra``)."""


class MachineCrashed(MachineError):
    """A machine ended while it was in use (outcome ``crashed``)."""


class ProtocolViolation(MachineError):
    """A guest violated the protocol; its machine has been ended."""


class TransferError(MachineError):
    """Files could not be moved in or out of a machine."""


class MountConflict(MachineError):
    """Changes of a machine to a mounted directory that were not copied back; all others were.

    Args:
        brief: How many, and where.
        paths: Which, relative to the directory (a machine chose these names).
        details: Why, a line each.
        resolution: What to do next.
    """

    def __init__(self, brief: str, paths: tuple[str, ...], *, details: str, resolution: str) -> None:
        super().__init__(brief, details=details, resolution=resolution)
        self.paths = paths


_BYTES = frozenset({"memory", "disk", "output", "network_bytes", "bandwidth"})
_SECONDS = frozenset({"timeout", "cpu_seconds", "lifetime"})


class QuotaExceeded(MachineError):
    """A limit was reached, and the machine has been ended (outcome ``quota``).

    Args:
        quota: Its name: ``memory``, ``disk``, ``pids``, ``timeout``, ``cpu_seconds``, ``output``,
            ``lifetime``, ``network_bytes`` or ``connections``.
        limit: The allowed value, in the quota's unit (bytes, seconds, processes).
        observed: The observed value, in the same unit.
        details: How it was noticed, or its cause.
    """

    def __init__(self, quota: str, limit: float, observed: float, *, details: str = "") -> None:
        super().__init__(
            f"{quota}: limit {_amount(quota, limit)}, observed {_amount(quota, observed)}",
            details=details,
            resolution=f"raise the quota ({quota} = ...) or make the work smaller",
        )
        self.quota = quota
        self.limit = limit
        self.observed = observed


def _amount(quota: str, value: float) -> str:
    """Return an amount with its unit: ``256 MiB``, ``1.5 s``, ``64``."""
    if quota in _SECONDS:
        return f"{value:.4g} s"
    if quota not in _BYTES:
        return f"{value:g}"
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:g} bytes"
