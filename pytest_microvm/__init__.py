"""Throwaway microVMs for pytest, CI and agents.

Names are imported at first use: pytest imports this package in every run, even if it is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_microvm.errors import MachineCrashed, MachineError, MicroVMError, QuotaExceeded, UsageError
    from pytest_microvm.machine.microvm import Checkpoint, MicroVM
    from pytest_microvm.settings.spec import MachineSpec

_HOMES = {
    "Checkpoint": "machine.microvm",
    "MachineCrashed": "errors",
    "MachineError": "errors",
    "MachineSpec": "settings.spec",
    "MicroVM": "host.host",
    "MicroVMError": "errors",
    "QuotaExceeded": "errors",
    "UsageError": "errors",
}

__all__ = [
    "Checkpoint",
    "MachineCrashed",
    "MachineError",
    "MachineSpec",
    "MicroVM",
    "MicroVMError",
    "QuotaExceeded",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - only when a name is used

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
