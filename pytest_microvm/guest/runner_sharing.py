"""Plug-ins whose tests share the memory of one process, which machines of their own do not have."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest


def sharing_plugins(config: pytest.Config, items: list[Any]) -> list[tuple[str, str]]:
    """Return plug-ins whose tests need one process, each with the isolation that gives them one."""
    found = []
    if config.pluginmanager.hasplugin("benchmark") and any(
        "benchmark" in getattr(item, "fixturenames", ()) for item in items
    ):
        found.append(("pytest-benchmark", "session"))
    if config.pluginmanager.hasplugin("dependency") and any(
        mark.kwargs.get("depends") for item in items for mark in item.iter_markers("dependency")
    ):
        found.append(("pytest-dependency", "module"))
    if _reports_snapshots(config) and any(map(_has_snapshots, items)):
        found.append(("inline-snapshot", "session"))
    return found


def _reports_snapshots(config: pytest.Config) -> bool:
    """Return True if inline-snapshot reports, or changes, wrong snapshots at the end of the session."""
    return (
        config.pluginmanager.hasplugin("inline_snapshot")
        and config.getoption("inline_snapshot", None) != "disable"
        and not os.environ.get("CI")  # in which it does neither
    )


def _has_snapshots(item: Any) -> bool:
    """Return True if the module of a test has imported something of inline-snapshot."""
    values = vars(getattr(item, "module", None) or object).values()
    names = (getattr(value, "__module__", None) or getattr(value, "__name__", None) for value in values)
    return any(isinstance(name, str) and name.partition(".")[0] == "inline_snapshot" for name in names)


def asks_for_worker(config: pytest.Config, items: list[Any]) -> bool:
    """Return True if a test uses the fixture of pytest-xdist for its worker's id."""
    names = (getattr(item, "fixturenames", ()) for item in items)
    return config.pluginmanager.hasplugin("xdist") and any("worker_id" in each for each in names)
