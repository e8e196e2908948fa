"""Whether a machine can run machines of its own here, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import HostError, UsageError

if TYPE_CHECKING:
    from pytest_microvm.hypervisors import Accelerator

_MODULES = Path("/sys/module")


def check_nesting(architecture: str, accelerator: Accelerator, modules: Path = _MODULES) -> str:
    """Check that a guest's CPU can have virtualisation; return a line that warns about its speed, or "".

    Args:
        architecture: The guest's.
        accelerator: What runs it.
        modules: The folder in which Linux shows its modules' parameters.

    Raises:
        UsageError: Guests of that architecture cannot have it.
        HostError: This computer's kernel does not allow it.
    """
    if architecture != "x86_64":
        raise UsageError(
            f"nested: not possible for {architecture}: only x86_64 machines can run machines of their own",
            resolution="take an x86_64 image, or drop nested",
        )
    if accelerator.name == "tcg":
        return "nested: KVM in this machine is emulated and slow"
    if accelerator.name != "kvm":
        raise HostError(
            f"nested: not possible with {accelerator.name}", resolution="drop nested, or use a host with KVM"
        )
    for module in ("kvm_intel", "kvm_amd"):
        parameter = modules / module / "parameters" / "nested"
        if parameter.exists() and parameter.read_text().strip() in ("N", "0"):
            raise HostError(
                f"nested: this computer's kernel does not allow it ({parameter} is off)",
                resolution=f"as root, while no VM runs: modprobe -r {module} && modprobe {module} nested=1",
            )
    return ""
