"""Find the accelerator that works here by booting a kernel within a deadline.

A /dev/kvm that opens proves nothing: on some computers every stock kernel then hangs. The verdict is cached
until the next boot of the computer, or until its kernel, the hypervisor or the device changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE = 5.0
"""Seconds a tiny guest may take to report its boot; with a working KVM it takes well under one."""

KVM_DEVICE = Path("/dev/kvm")
UDEV_RULE = 'KERNEL=="kvm", GROUP="kvm", MODE="0660"'


@dataclass(frozen=True)
class Verdict:
    """The accelerator to use, with the reason.

    Args:
        name: ``kvm``, ``hvf``, ``whpx`` or ``tcg``.
        reason: Why, for display.
        seconds: How long probing took; 0 if the verdict was cached or obvious.
    """

    name: str
    reason: str
    seconds: float = 0.0


def probe(
    boots: Callable[[str, float], bool],
    build: str,
    memory: Path,
    architecture: str,
    device: Path = KVM_DEVICE,
) -> Verdict:
    """Return the best accelerator that works.

    Args:
        boots: ``boots(accelerator, deadline)`` returns whether a tiny guest booted in time.
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
    begin = time.monotonic()
    if boots(candidate, DEADLINE):
        verdict = Verdict(candidate, f"{candidate} boots a guest here", time.monotonic() - begin)
    else:
        reason = f"{device} opens, but a guest did not boot on it within {DEADLINE:.0f} s"
        if candidate != "kvm":
            reason = f"a guest did not boot with {candidate} within {DEADLINE:.0f} s"
        verdict = Verdict("tcg", reason, time.monotonic() - begin)
    _remember(memory, key, verdict)
    return verdict


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
        name, reason = found["name"], found["reason"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return Verdict(name, reason) if name in (candidate, "tcg") and isinstance(reason, str) else None


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
