"""The generation of an environment's templates: ``tox -r`` begins a new one."""

from __future__ import annotations

import secrets
from pathlib import Path

_FILE = "generation"
_LONGEST = 16  # bytes


class Generation:
    """The part of templates' keys that ``tox -r`` changes, so that equal inputs give new templates."""

    def __init__(self) -> None:
        self._ended = False
        self._mark: str | None = None

    def end(self) -> None:
        """Let the next :meth:`mark` be a new one."""
        self._ended = True

    def mark(self, folder: Path) -> str:
        """Return the generation's mark, which is kept in a folder.

        Args:
            folder: The environment's folder on this computer.
        """
        if self._ended and self._mark is None:
            mark = secrets.token_bytes(_LONGEST)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _FILE).write_bytes(mark)
            self._mark = mark.hex()
        if self._mark is None:
            from pytest_microvm.untrusted.nofollow import read_below  # noqa: PLC0415 - see tox/plugin.py

            self._mark = (read_below(folder, _FILE, _LONGEST) or b"").hex()
        return self._mark
