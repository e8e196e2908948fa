"""Explain failures that happen because the machine's Python lacks a module or a plug-in."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from pytest_microvm.suite.measuring import measures_workers, measuring_coverage
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_microvm.suite.backend import BackendFacts
    from pytest_microvm.suite.collected import Collected

_MODULE = re.compile(r"ModuleNotFoundError: No module named '([A-Za-z_]\w{0,99})")
_UNKNOWN_OPTION = "unrecognized arguments"
_MOST_NAMED = 5
_PATCH = "add `patch = subprocess` to section [run] of its configuration"


def lines_about_modules(collected: Collected, facts: BackendFacts) -> list[str]:
    """Return lines for the user if collection failed for want of modules that only the image lacks.

    A mirrored environment is the user's own: what it lacks is missing on this computer as well.
    """
    if facts.python:
        return []
    texts = (str((outcome.report or {}).get("longrepr")) for outcome in collected.reports)
    names = list(dict.fromkeys(name for text in texts for name in _MODULE.findall(text)))
    if not names:
        return []
    listed = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
    return [f"microvm: missing in the machine: {listed}", *(f"microvm: {line}" for line in _advice(facts))]


def with_advice(error: str, facts: BackendFacts) -> str:
    """Return pytest's usage error, with advice if a plug-in that only the image lacks explains it."""
    if facts.python or _UNKNOWN_OPTION not in error:
        return error
    return "\n".join([error, "does this option belong to a plug-in that the machine lacks?", *_advice(facts)])


def _advice(facts: BackendFacts) -> list[str]:
    return [
        f"its Python is that of image {facts.image}, without this computer's packages",
        "next step: --microvm-python=host mirrors the environment that runs pytest into the machine",
    ]


def lines_about_sharing(collected: Collected, isolation: str) -> list[str]:
    """Return lines about plug-ins whose tests need one process, if machines do not give them one."""
    order = ("test", "class", "module", "session")
    return [
        f"microvm: {plugin} keeps what it knows in the memory of the tests' process, and each machine has "
        f"its own: use --microvm-isolation={least}"
        for plugin, least in collected.sharing
        if order.index(isolation) < order.index(least)
    ]


def lines_about_pure_fixtures(collected: Collected, pure: Sequence[str]) -> list[str]:
    """Return lines about fixtures that are called pure, but are none that can be kept for later runs."""
    session = {fixture.name for fixture in collected.wide if fixture.scope == "session"}
    other = {fixture.name for fixture in collected.wide} - session
    behind = _behind_others(collected, pure)
    lines = []
    for name in pure:
        if name in other:
            lines.append(f"{name} is not kept: its scope is not session")
        elif name not in session:
            lines.append(f"no test needs a session fixture {name}")
        elif name in behind:
            lines.append(f"{name} is not kept: {behind[name]} is set up before it, and is not among them")
    return [sanitize_line(f"microvm: pure_fixtures: {line}") for line in lines]


def _behind_others(collected: Collected, pure: Sequence[str]) -> dict[str, str]:
    """Return the fixtures called pure before which each test sets up another one; with that one."""
    numbers = collected.pure(pure)
    behind: dict[str, str] = {}
    free = set()
    for needed in collected.needed:
        first = ""
        for number in needed:
            name = collected.wide[number].name
            if number not in numbers:
                first = first or name
            elif first:
                behind.setdefault(name, first)
            else:
                free.add(name)
    return {name: first for name, first in behind.items() if name not in free}


def lines_about_options(option: Any, collected: Collected, *, keeps_tmp: bool, launched: bool) -> list[str]:
    """Return lines about options that do less than natively.

    Args:
        option: The host's options.
        collected: The tests.
        keeps_tmp: Whether temporary folders of failed tests come back.
        launched: Whether `pytest-microvm test` has started this process.
    """
    lines = []
    if getattr(option, "basetemp", None) and not keeps_tmp:
        lines.append(
            "microvm: --basetemp: temporary folders stay in the machines; --microvm-keep-tmp brings those of "
            "failed tests back"
        )
    workers = getattr(option, "numprocesses", None) or getattr(option, "tx", None)
    measuring = measuring_coverage()
    if measuring is not None and workers and not measures_workers(measuring):
        lines.append(
            "microvm: coverage measures this process and not pytest-xdist's workers, which run the tests: "
            + _PATCH
        )
    if measuring is None and launched and os.environ.get("COVERAGE_RUN"):
        lines.append(f"microvm: coverage measures `pytest-microvm test`, but not what it starts: {_PATCH}")
    if getattr(option, "json_report", False):
        lines.append(
            "microvm: pytest-json-report writes its file on this computer, without the tests' json_metadata, "
            "output and log"
        )
    if collected.asks_for_worker and workers:
        lines.append(
            "microvm: fixture worker_id of pytest-xdist: each test has a machine of its own, in which it is "
            "'master'"
        )
    return lines
