"""The files by which a step tells GitHub's runner something: outputs, and the job's summary."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from pytest_microvm.errors import UsageError

SUMMARY_LIMIT = 1024 * 1024 - 4096
"""Bytes of a step's summary; GitHub refuses a whole one of more than 1 MiB."""

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_CUT = "\n\n**The rest of this summary was cut**: GitHub shows no more than 1 MiB. It is in the artifacts.\n"


def set_outputs(values: Mapping[str, str]) -> None:
    """Set outputs of this step.

    Each value stands between lines that nobody can guess, so that it sets no other output, whatever is in it
    (https://docs.github.com/actions/reference/workflow-commands-for-github-actions#multiline-strings).

    Raises:
        UsageError: This is no step of a GitHub job.
    """
    text = ""
    for name, value in values.items():
        assert _NAME.fullmatch(name), name
        delimiter = f"ghadelimiter_{secrets.token_hex(16)}"
        text += f"{name}<<{delimiter}\n{value}\n{delimiter}\n"
    _append("GITHUB_OUTPUT", text)


def add_summary(markdown: str) -> None:
    """Add Markdown to what the job's page shows; what is too long is cut, and says so.

    Raises:
        UsageError: This is no step of a GitHub job.
    """
    _append("GITHUB_STEP_SUMMARY", shortened(markdown, SUMMARY_LIMIT))


def shortened(markdown: str, limit: int) -> str:
    """Return Markdown of at most ``limit`` bytes, cut between lines, with a note where it was cut."""
    data = markdown.encode(errors="replace")
    if len(data) <= limit:
        return data.decode()
    kept = data[: limit - len(_CUT.encode()) - len("\n```")].decode(errors="ignore")
    kept = kept[: kept.rfind("\n") + 1] or kept
    # A note inside a block of code would be part of it.
    inside = sum(line.startswith("```") for line in kept.splitlines()) % 2
    return kept + ("```" if inside else "") + _CUT


def _append(variable: str, text: str) -> None:
    file = os.environ.get(variable)
    if not file:
        raise UsageError(
            f"there is no variable {variable}: this is no step of a GitHub job",
            resolution="this command is for github-action/action.yml",
        )
    with Path(file).open("a", encoding="utf-8", errors="replace", newline="\n") as output:
        output.write(text)
