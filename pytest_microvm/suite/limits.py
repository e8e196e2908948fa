"""Limits from a test's ``microvm`` marker, which may only tighten the limits of the run.

The marker comes from the guest, which may be hostile.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.options import BY_NAME
from pytest_microvm.settings.reach import parse_network
from pytest_microvm.settings.spec import PARSERS
from pytest_microvm.suite.backend import TestLimits
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    import pytest

    from pytest_microvm.suite.backend import RunOptions

MARKER = "microvm"
_KEYS = frozenset(field.name for field in fields(TestLimits)) - {"counted"}


def check_markers(item: pytest.Item) -> None:
    """Check that the markers of ``item`` have only keys that can apply to a single test.

    Raises:
        UsageError: One has another key, which cannot change a machine that already exists.
    """
    for marker in item.iter_markers(MARKER):
        for name in marker.kwargs:
            if name not in _KEYS:
                known = name in BY_NAME
                key = name if known else repr(sanitize_line(name, 80))
                raise UsageError(
                    f"{item.nodeid}: @pytest.mark.{MARKER}: {key} cannot be set for one test with --microvm",
                    resolution=f"set it for all tests with --microvm-{BY_NAME[name].word}"
                    if known
                    else "remove it",
                )


def limits_of(item: pytest.Item, options: RunOptions) -> TestLimits:
    """Return the limits of ``item``.

    A machine shared by tests has its own limits: of their markers only ``timeout`` and ``output`` apply.
    A marker's ``network`` keeps those of the run's rules that it names, and all that deny.

    Invalid values were already refused at collection.
    """
    limits = TestLimits(options.timeout, options.output)
    names = _KEYS - {"network"}
    if options.isolation != "test":
        names = frozenset({"timeout", "output"})
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
