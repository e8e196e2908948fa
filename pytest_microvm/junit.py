"""What JUnit reports say about machines: the properties of a test case."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_microvm.machine import MachineFacts, Usage


def properties(facts: MachineFacts | None, usage: Usage | None, outcome: str) -> list[tuple[str, str]]:
    """Return a test's user properties, which JUnit and other reporters show.

    Args:
        facts: The machine it ran in, if it reached one.
        usage: What the host saw that machine use so far.
        outcome: ``passed``, ``failed``, ``skipped``, ``infra``, ``crashed`` or ``quota``.
    """
    found: dict[str, object] = {}
    if facts is not None:
        found = {
            "microvm.image": facts.image,
            "microvm.image_digest": facts.image_digest,
            "microvm.accelerator": facts.accelerator,
            "microvm.id": facts.id,
            "microvm.ready_ms": round(facts.ready_seconds * 1000),
            "microvm.cpus": facts.cpus,
            "microvm.memory": facts.memory,
        }
    if usage is not None:
        found["microvm.peak_memory_bytes"] = usage.peak_memory_bytes
        found["microvm.cpu_seconds"] = round(usage.cpu_seconds, 3)
    found["microvm.outcome"] = outcome
    return [(name, str(value)) for name, value in found.items()]
