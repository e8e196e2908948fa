"""Plug-ins whose tests share the memory of one process, which machines of their own do not have."""

from __future__ import annotations

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
    return found


def asks_for_worker(config: pytest.Config, items: list[Any]) -> bool:
    """Return True if a test uses the fixture of pytest-xdist for its worker's id."""
    names = (getattr(item, "fixturenames", ()) for item in items)
    return config.pluginmanager.hasplugin("xdist") and any("worker_id" in each for each in names)
