"""``sitecustomize`` of a machine: lets a Python whose ``sys.path`` was replaced import from its own path.

pytest-xdist treats a worker of the kind ``popen`` as local: the worker gets the controller's ``sys.path``,
and a temporary directory below the controller's. A machine has other folders, so this module finds modules
that the new path lacks in the machine's own, and creates the parent of the temporary directory.

PYTEST_DONT_REWRITE: pytest imports it as a plug-in after Python has already imported it.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any


class OwnPath:
    """An importer for the ``sys.path`` that Python started with.

    Args:
        path: That path.
    """

    def __init__(self, path: list[str]) -> None:
        self._path = path

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of a top-level module; ``None`` for submodules and unknown modules."""
        return None if path is not None else PathFinder.find_spec(name, self._path, target)

    def find_distributions(self, context: Any = None) -> Any:
        """Return the distributions in folders that ``sys.path`` lacks."""
        from importlib.metadata import DistributionFinder, MetadataPathFinder  # noqa: PLC0415 - slow to import

        hidden = [folder for folder in self._path if folder not in sys.path]
        name = None if context is None else context.name
        return MetadataPathFinder().find_distributions(DistributionFinder.Context(name=name, path=hidden))

    def invalidate_caches(self) -> None:
        """Do nothing: there is no cache of its own, and PathFinder's caches are invalidated separately."""


def pytest_sessionstart(session: Any) -> None:
    """Create the parent of the directory that xdist chose for temporary files."""
    base = getattr(session.config.option, "basetemp", None)
    if base and hasattr(session.config, "workerinput"):
        Path(base).parent.mkdir(mode=0o700, parents=True, exist_ok=True)


if __name__ == "sitecustomize" and not any(type(finder).__name__ == "OwnPath" for finder in sys.meta_path):
    sys.meta_path.append(OwnPath([folder for folder in sys.path if folder]))
