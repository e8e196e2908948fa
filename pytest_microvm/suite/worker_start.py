"""Runs in a machine as ``sitecustomize``: a Python whose ``sys.path`` is replaced can still import.

pytest-xdist takes a worker of the kind ``popen`` for one on its own computer: the worker gets the
controller's ``sys.path``, and a temporary directory below the controller's. A machine has other folders, so
this finds what the new path lacks in the machine's own, and makes the directory above the temporary one.

PYTEST_DONT_REWRITE: pytest imports it as a plug-in, when Python has imported it already.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any


class OwnPath:
    """An importer over the path that Python started with.

    Args:
        path: That path.
    """

    def __init__(self, path: list[str]) -> None:
        self._path = path

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return where a top-level module is."""
        return None if path is not None else PathFinder.find_spec(name, self._path, target)

    def find_distributions(self, context: Any = None) -> Any:
        """Return the distributions that ``sys.path`` does not lead to."""
        from importlib.metadata import DistributionFinder, MetadataPathFinder  # noqa: PLC0415 - slow to import

        hidden = [folder for folder in self._path if folder not in sys.path]
        name = None if context is None else context.name
        return MetadataPathFinder().find_distributions(DistributionFinder.Context(name=name, path=hidden))

    def invalidate_caches(self) -> None:
        """Keep nothing: PathFinder's caches are invalidated by itself."""


def pytest_sessionstart(session: Any) -> None:
    """Make the directory above the one that xdist chose for temporary files."""
    base = getattr(session.config.option, "basetemp", None)
    if base and hasattr(session.config, "workerinput"):
        Path(base).parent.mkdir(mode=0o700, parents=True, exist_ok=True)


if __name__ == "sitecustomize" and not any(type(finder).__name__ == "OwnPath" for finder in sys.meta_path):
    sys.meta_path.append(OwnPath([folder for folder in sys.path if folder]))
