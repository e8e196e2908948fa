"""Find the accelerator that works here by booting a kernel and watching its console.

A /dev/kvm that opens proves nothing: on some computers every stock kernel then hangs. The verdict is cached
until the next boot of the computer, or until its kernel, the hypervisor or the device changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_microvm.hypervisors.trial import Trial

_SLOW = 5.0  # seconds; with a usual KVM a tiny guest boots in well under one

KVM_DEVICE = Path("/dev/kvm")
UDEV_RULE = 'KERNEL=="kvm", GROUP="kvm", MODE="0660"'


@dataclass(frozen=True)
class Verdict:
    """The accelerator to use, with the reason.

    Args:
        name: ``kvm``, ``hvf``, ``whpx`` or ``tcg``.
        reason: Why, for display.
        boot_seconds: How long a tiny guest took to boot with it; 0 if none was tried.
    """

    name: str
    reason: str
    boot_seconds: float = 0.0


def probe(
    boot: Callable[[str], Trial],
    build: str,
    memory: Path,
    architecture: str,
    device: Path = KVM_DEVICE,
) -> Verdict:
    """Return the best accelerator that works.

    Args:
        boot: Boots a tiny guest with the named accelerator.
        build: Identifier of the hypervisor's build.
        memory: The file that caches the verdict.
        architecture: Guest architecture; a foreign one can only be emulated.
        device: KVM's device.
    """
    if architecture != platform.machine().replace("arm64", "aarch64"):
        return Verdict("tcg", f"{architecture} is not this computer's architecture")
    candidate, obstacle = _candidate(device)
    if candidate is None:
        return Verdict("tcg", obstacle)
    key = _key(candidate, build, device)
    known = _remembered(memory, key, candidate)
    if known is not None:
        return known
    verdict = _judge(candidate, boot(candidate), device)
    _remember(memory, key, verdict)
    return verdict


def _judge(candidate: str, trial: Trial, device: Path) -> Verdict:
    if trial.end == "booted":
        speed = "slowly, " if trial.seconds >= _SLOW else ""
        reason = f"{candidate} boots a guest here, {speed}in {trial.seconds:.1f} s"
        return Verdict(candidate, reason, trial.seconds)
    opens = f"{device} opens, but" if candidate == "kvm" else f"{candidate} is there, but"
    after = f"after {trial.last!r}" if trial.last else "without any output"
    what = {
        "hung": f"a guest on it hung for {trial.seconds:.0f} s {after}",
        "slow": f"a guest on it was still booting after {trial.seconds:.0f} s",
        "died": f"a guest on it ended {after}",
    }
    return Verdict("tcg", f"{opens} {what[trial.end]}")


def check_required(required: str | None, found: Verdict) -> None:
    """Raise an error if a required accelerator is not the one that works.

    Raises:
        HostError: Another accelerator works.
    """
    if required is not None and found.name != required:
        raise HostError(
            f"accelerator {required} is required, but only {found.name} works here: {found.reason}",
            resolution="run `pytest-microvm doctor`, or drop --microvm-require-accel",
        )


def _candidate(device: Path) -> tuple[str | None, str]:
    if sys.platform == "darwin":
        return "hvf", ""
    if sys.platform == "win32":
        return "whpx", ""
    if not device.exists():
        return None, f"there is no {device}: no hardware virtualisation, or its kernel module is not loaded"
    if not os.access(device, os.R_OK | os.W_OK):
        return None, f"no permission to use {device}"
    return "kvm", ""


def _key(candidate: str, build: str, device: Path) -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    facts = [candidate, build, platform.release(), boot_id.read_text() if boot_id.exists() else ""]
    if device.exists():
        found = device.stat()
        facts.append(f"{found.st_rdev} {found.st_mode} {found.st_ino}")
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _remembered(memory: Path, key: str, candidate: str) -> Verdict | None:
    """Return the cached verdict for ``key``; ``None`` if there is none, or the file is malformed."""
    try:
        found = json.loads(memory.read_text())[key]
        verdict = Verdict(found["name"], found["reason"], float(found["boot_seconds"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    usable = verdict.name in (candidate, "tcg") and isinstance(verdict.reason, str)
    return verdict if usable and 0 <= verdict.boot_seconds < math.inf else None


def _remember(memory: Path, key: str, verdict: Verdict) -> None:
    """Cache a verdict, and drop older ones, which belong to another boot or build."""
    draft = memory.with_name(f".{memory.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # the cache is full or read-only: probe again next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(json.dumps({key: asdict(verdict)}))
            draft.replace(memory)
        finally:
            draft.unlink(missing_ok=True)
