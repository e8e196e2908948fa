"""Make a folder of results acceptable to actions/upload-artifact, and remove all links from it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pytest_microvm.untrusted.text import sanitize_line

# Characters that make it reject the whole upload: the branch chooses its artifacts' file names.
_REFUSED = re.compile(r'["<>:|*?\x00-\x1f\x7f\\]|[^\x00-\x7f]')
_LONGEST = 200  # characters of a name


def make_uploadable(folder: Path) -> list[str]:
    """Rename files whose names the upload rejects, and remove links, which it would follow.

    Args:
        folder: The folder of results.

    Returns:
        One readable line for each path that was removed or renamed.
    """
    told = []
    for top, folders, files in os.walk(folder, topdown=False):
        for name in (*folders, *files):
            path = Path(top, name)
            if path.is_symlink():
                path.unlink()
                told.append(sanitize_line(f"removed a link: {name!a}"))
            elif (changed := _allowed(name)) != name:
                path.rename(_free(path.with_name(changed)))
                told.append(sanitize_line(f"renamed {name!a} to {changed}"))
    return told


def _allowed(name: str) -> str:
    return _REFUSED.sub(lambda found: f"%{ord(found[0]):02X}", name)[:_LONGEST]


def _free(path: Path) -> Path:
    """Return ``path``, or a numbered variant of it if that exists."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
