"""The temporary folders of a test: its ``tmp_path``, and what its fixtures got from ``tmp_path_factory``."""

from __future__ import annotations

import os
from typing import Any

_scandir = os.scandir  # a test may replace it


class TemporaryFolders:
    """The plug-in that knows which temporary folders the present test may have used.

    A folder of the factory may belong to a fixture of several tests, so each of them counts as its user.
    A ``tmp_path`` has one user.

    Args:
        factory: pytest's factory of temporary folders.
    """

    def __init__(self, factory: Any) -> None:
        self._factory = factory
        self._own: set[str] = set()  # the present test's ``tmp_path``; several if it is run again
        self._others: set[str] = set()  # those of the tests before it

    def begin(self) -> None:
        """Get ready for a test."""
        self._others |= self._own
        self._own = set()

    def pytest_fixture_post_finalizer(self, fixturedef: Any) -> None:
        """Notice the folder of the present test's ``tmp_path``."""
        result = fixturedef.cached_result
        if fixturedef.argname == "tmp_path" and result is not None and isinstance(result[0], os.PathLike):
            self._own.add(os.path.basename(os.fspath(result[0])))

    def found(self) -> dict[str, Any] | None:
        """Return the base folder, and the names of the present test's folders in it; ``None``: none."""
        base = self._factory._basetemp
        if base is None:
            return None
        try:
            with _scandir(base) as entries:
                names = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
        except Exception:  # noqa: BLE001 - a test may have removed the folder, or replaced what this needs
            return None
        return {"base": os.fspath(base), "names": sorted(names - self._others)}
