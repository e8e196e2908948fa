"""Write the files that pass a step's outputs and summary to GitHub's runner."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from pytest_microvm.errors import UsageError

SUMMARY_LIMIT = 1024 * 1024 - 4096
"""Maximum number of bytes of a step's summary; GitHub rejects one of more than 1 MiB entirely."""

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_CUT = "\n\n**The rest of this summary was cut**: GitHub shows no more than 1 MiB. It is in the artifacts.\n"


def set_outputs(values: Mapping[str, str]) -> None:
    """Set outputs of this step.

    Each value is enclosed by random delimiters, so that no value can set another output
    (https://docs.github.com/actions/reference/workflow-commands-for-github-actions#multiline-strings).

    Raises:
        UsageError: The process is no step of a GitHub job.
    """
    text = ""
    for name, value in values.items():
        assert _NAME.fullmatch(name), name
        delimiter = f"ghadelimiter_{secrets.token_hex(16)}"
        text += f"{name}<<{delimiter}\n{value}\n{delimiter}\n"
    _append("GITHUB_OUTPUT", text)


def add_summary(markdown: str) -> None:
    """Append Markdown to the job's summary, cut to GitHub's limit with a note.

    Raises:
        UsageError: The process is no step of a GitHub job.
    """
    _append("GITHUB_STEP_SUMMARY", shortened(markdown, SUMMARY_LIMIT))


def shortened(markdown: str, limit: int) -> str:
    """Return Markdown cut between lines to at most ``limit`` bytes, with a note where it was cut."""
    data = markdown.encode(errors="replace")
    if len(data) <= limit:
        return data.decode()
    kept = data[: limit - len(_CUT.encode()) - len("\n```")].decode(errors="ignore")
    kept = kept[: kept.rfind("\n") + 1] or kept
    # Close an open code block first: a note inside it would be part of it.
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
