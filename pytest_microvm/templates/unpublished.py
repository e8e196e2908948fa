"""A running machine's state as a template for this process only; the machine runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_microvm.templates.store import Template

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class UnpublishedTemplate(Template):
    """A template that is not published: no other process sees it, and it is removed when closed.

    It is neither flushed to the disk nor sealed, which takes longer than making it.

    Args:
        key: The id of the machine that it was made from.
        folder: The folder of its files.
        drop: Removes that folder.
    """

    def __init__(self, key: str, folder: Path, drop: Callable[[Path], None]) -> None:
        super().__init__(key, folder, {}, -1, {})
        self._drop = drop
        self._open = True

    def intact(self) -> bool:
        """Return True while it is open."""
        return self._open

    def close(self) -> None:
        """Remove it; a second call does nothing. Copies that run need it no longer."""
        if self._open:
            self._open = False
            self._drop(self.folder)
