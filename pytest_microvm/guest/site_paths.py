"""Reprocess ``.pth`` files once the workspace has arrived, for lines that had no effect at Python's start.

Python's ``site`` module skips directories that do not exist, and stops at a line whose import fails. An
editable installation has such files, with paths in the workspace.
"""

from __future__ import annotations

import os
import re
import site
import sys
from typing import NamedTuple

_IMPORT = re.compile(r"import[ \t]+([\w.]+)")


class _PthLine(NamedTuple):
    folder: str
    file: str
    text: str

    @property
    def path(self) -> str:
        return os.path.abspath(os.path.join(self.folder, self.text))

    @property
    def in_effect(self) -> bool:
        imported = _IMPORT.match(self.text)
        return imported[1] in sys.modules if imported else self.path in sys.path


def lines_in_effect() -> set[tuple[str, str, str]]:
    """Return the lines of ``.pth`` files that are in effect: folder, file, text."""
    return {(line.folder, line.file, line.text) for line in _lines() if line.in_effect}


def catch_up(done: set[tuple[str, str, str]]) -> None:
    """Process the lines that are not ``done``, as ``site`` would if Python started now."""
    place, folder, added = 0, "", False
    for line in _lines():
        if line.folder != folder:
            folder = line.folder
            place = sys.path.index(folder)
        if _IMPORT.match(line.text):
            if tuple(line) not in done:
                exec(line.text)  # noqa: S102 - .pth files contain code
        elif line.path in sys.path:
            place = sys.path.index(line.path)
        elif os.path.exists(line.path):
            place, added = place + 1, True
            sys.path.insert(place, line.path)
    if added and "sitecustomize" not in sys.modules:
        site.execsitecustomize()


def _lines() -> list[_PthLine]:
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    found = []
    for folder in folders:
        if folder in sys.path and os.path.isdir(folder):
            for name in sorted(os.listdir(folder)):
                if name.endswith(".pth") and not name.startswith("."):
                    found += [_PthLine(folder, name, text) for text in _texts(os.path.join(folder, name))]
    return found


def _texts(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [line.strip() for line in file]
    except OSError:
        return []
    return [line for line in lines if line and not line.startswith("#")]
