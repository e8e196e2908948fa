"""Files that record a machine's run: after a crash or an exceeded quota, or after a command."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from pytest_microvm.errors import QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from pytest_microvm.errors import MachineError
    from pytest_microvm.machine.instance import Instance, MachineFacts

RECORDED = ("console.txt", "machine.json", "events.jsonl", "network.jsonl")
"""The files that :func:`record` writes."""

_CONSOLE_LINES = 10_000
_NAME_LENGTH = 100


def folder_for(artifacts: Path, about: str, machine: str) -> Path:
    """Return the folder for the files about ``machine``, named after its test.

    Args:
        artifacts: The parent folder.
        about: A test's node id, which may contain any character.
        machine: The machine's id.
    """
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", about).strip("-.")[:_NAME_LENGTH]
    digest = hashlib.sha256(about.encode(errors="surrogatepass")).hexdigest()[:8]
    return artifacts / f"{readable or 'test'}-{digest}-{machine}"


def saved(artifacts: Path | None, about: str, machine: str, write: Callable[[Path], None]) -> str | None:
    """Call ``write`` with the folder for ``machine``; return its path, or the error that prevented saving.

    Without ``artifacts`` nothing is saved. An error is returned, not raised, so that the test is still
    reported.
    """
    if artifacts is None:
        return None
    folder = folder_for(artifacts, about, machine)
    try:
        write(folder)
    except OSError as failure:
        return f"could not be saved: {failure}"
    return str(folder)


def save(folder: Path, instance: Instance, facts: MachineFacts, error: MachineError, about: str) -> None:
    """Save the records of a machine that crashed or exceeded a quota.

    ``report.txt`` gives the cause; the other files are those of :func:`record`.

    Args:
        folder: The target folder; created if needed.
        instance: The machine.
        facts: Facts known from its start.
        error: The error that ended it.
        about: Its purpose, such as a test's node id.

    Raises:
        OSError: The folder cannot be written.
    """
    outcome = "quota" if isinstance(error, QuotaExceeded) else "crashed"
    known: dict[str, object] = {"outcome": outcome}
    if isinstance(error, QuotaExceeded):
        known["quota"] = {"name": error.quota, "limit": error.limit, "observed": error.observed}
    record(folder, instance, facts, about, known)
    text = instance.redactor.text(f"{error}\n")
    (folder / "report.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def record(
    folder: Path,
    instance: Instance,
    facts: MachineFacts,
    about: str,
    known: Mapping[str, object] | None = None,
) -> None:
    """Write a machine's facts, usage, console, events and network requests to a folder.

    ``machine.json`` holds facts and usage, ``console.txt`` the console's output, ``events.jsonl`` the events,
    including its last commands, ``network.jsonl`` its network requests.

    Args:
        folder: The target folder; created if needed.
        instance: The machine.
        facts: Facts known from its start.
        about: Its purpose, such as a test's node id.
        known: Additional entries of ``machine.json``, as JSON values.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "about": instance.redactor.text(about),
        "machine": asdict(facts),
        "usage": asdict(instance.usage()),
        "findings": [asdict(finding) for finding in instance.findings],
        **(known or {}),
    }
    console = instance.console_text(_CONSOLE_LINES)
    (folder / "console.txt").write_text(f"{console}\n", encoding="utf-8", errors="backslashreplace")
    (folder / "machine.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    (folder / "events.jsonl").write_text(instance.events.lines(), encoding="utf-8")
    requests = "".join(json.dumps(asdict(request)) + "\n" for request in instance.requests.list())
    (folder / "network.jsonl").write_text(requests, encoding="utf-8")
