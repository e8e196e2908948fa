"""Machine properties of a test case, for JUnit and other reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_microvm.errors import QuotaExceeded
    from pytest_microvm.machine.instance import MachineFacts, Usage
    from pytest_microvm.network.proxy.log import NetworkRequest

_DENIED_SHOWN = 20


def properties(
    facts: MachineFacts | None,
    usage: Usage | None,
    outcome: str,
    *,
    quota: QuotaExceeded | None = None,
    retries: int = 0,
    artifacts: str | None = None,
    requests: Sequence[NetworkRequest] = (),
) -> list[tuple[str, str]]:
    """Return a test's user properties, which JUnit and other reporters show.

    Args:
        facts: The machine it ran in, if it reached one.
        usage: That machine's usage so far, as measured by the host.
        outcome: ``passed``, ``failed``, ``skipped``, ``infra``, ``crashed`` or ``quota``.
        quota: The quota that was exceeded, if any.
        retries: Number of machines that failed before this one, without reaching the test.
        artifacts: The folder with the records of a machine that crashed or exceeded a quota.
        requests: The test's network requests.
    """
    found: dict[str, object] = {}
    if facts is not None:
        found = {
            "microvm.image": facts.image,
            "microvm.image_digest": facts.image_digest,
            "microvm.accelerator": facts.accelerator,
            "microvm.id": facts.id,
            "microvm.ready_ms": round(facts.ready_seconds * 1000),
            "microvm.cpus": f"{facts.limits.cpus:g}",
            "microvm.memory": facts.limits.memory,
        }
        if facts.fork_of:
            found["microvm.fork_of"] = facts.fork_of
        if facts.restored:
            found["microvm.restored"] = facts.restored
    if usage is not None:
        found["microvm.peak_memory_bytes"] = usage.peak_memory_bytes
        found["microvm.cpu_seconds"] = round(usage.cpu_seconds, 3)
        found["microvm.disk_bytes"] = usage.disk_bytes
        found["microvm.channel_bytes"] = usage.received_bytes + usage.sent_bytes
    if quota is not None:
        found["microvm.quota"] = quota.quota
        found["microvm.quota_limit"] = f"{quota.limit:.12g}"
        found["microvm.quota_observed"] = f"{quota.observed:.12g}"
    if retries:
        found["microvm.retries"] = retries
    if artifacts is not None:
        found["microvm.artifacts"] = artifacts
    denied = [request for request in requests if not request.allowed]
    if requests:
        found["microvm.requests"] = len(requests)
    if denied:
        found["microvm.denied"] = "; ".join(map(str, denied[:_DENIED_SHOWN]))
    found["microvm.outcome"] = outcome
    return [(name, str(value)) for name, value in found.items()]
