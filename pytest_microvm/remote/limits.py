"""What a test's own ``microvm`` marker says about its limits: it may tighten those of the run, no more.

The marker comes from the guest, which may be hostile.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from pytest_microvm.reach import parse_network
from pytest_microvm.remote.backend import TestLimits
from pytest_microvm.spec import PARSERS

if TYPE_CHECKING:
    import pytest

    from pytest_microvm.remote.backend import RunOptions

MARKER = "microvm"


def limits_of(item: pytest.Item, options: RunOptions) -> TestLimits:
    """Return the limits of ``item``.

    A machine that tests share has limits of its own: of their markers only ``timeout`` and ``output`` count.
    Of the run's network rules a marker leaves those that it names, and those that forbid.

    Impossible values were refused when the tests were collected.
    """
    limits = TestLimits(options.timeout, options.output)
    names = {field.name for field in fields(limits)} - {"counted", "network"}
    if options.isolation != "test":
        names = {"timeout", "output"}
    for marker in item.iter_markers(MARKER):
        for name in sorted(names & set(marker.kwargs)):
            value = PARSERS[name](marker.kwargs[name], f"@pytest.mark.{MARKER}: {name}")
            limit = getattr(limits, name)
            limits = replace(limits, **{name: value if limit is None else min(limit, value)})
        if options.isolation == "test" and "network" in marker.kwargs:
            wanted = parse_network(marker.kwargs["network"], f"@pytest.mark.{MARKER}: network")
            granted = options.network if limits.network is None else limits.network
            network = tuple(rule for rule in granted if rule in wanted or rule.startswith("deny:"))
            limits = replace(limits, network=network)
    return replace(limits, counted=options.counted or limits.pids is not None)
