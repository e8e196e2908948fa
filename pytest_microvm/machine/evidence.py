"""What is saved of a machine: of one that crashed or exceeded a quota, or of what a command did."""

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
"""What :func:`record` writes."""

_CONSOLE_LINES = 10_000
_NAME_LENGTH = 100


def folder_for(artifacts: Path, about: str, machine: str) -> Path:
    """Return where the files about ``machine`` go, named after what it was used for.

    Args:
        artifacts: The folder of all of them.
        about: A test's node id, which may hold any character.
        machine: The machine's id.
    """
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", about).strip("-.")[:_NAME_LENGTH]
    digest = hashlib.sha256(about.encode(errors="surrogatepass")).hexdigest()[:8]
    return artifacts / f"{readable or 'test'}-{digest}-{machine}"


def saved(artifacts: Path | None, about: str, machine: str, write: Callable[[Path], None]) -> str | None:
    """Let ``write`` fill the folder about ``machine``, if there shall be one; return where, or why not.

    A folder that cannot be written costs no test its report.
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
    """Write what is known of a machine that has ended.

    ``report.txt`` says why it ended; the other files are those of :func:`record`.

    Args:
        folder: Where to; made if needed.
        instance: The machine.
        facts: What was known of it from its start.
        error: Why it ended.
        about: What it was used for.

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
    """Write what a machine was, used, said, did and asked of the network.

    ``machine.json`` says what it was and used, ``console.txt`` what it said, ``events.jsonl`` what happened,
    its last commands among it, ``network.jsonl`` what it asked of the network.

    Args:
        folder: Where to; made if needed.
        instance: The machine.
        facts: What was known of it from its start.
        about: What it was used for.
        known: More about it, as JSON values.

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
