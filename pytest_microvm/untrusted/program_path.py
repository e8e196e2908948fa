"""The search path for programs of this computer, which never includes the current folder."""

from __future__ import annotations

import os
from pathlib import Path


def absolute_path() -> str:
    """Return ``PATH`` without relative and empty entries, which may name a project's folders."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    kept = [folder for folder in folders if Path(folder).is_absolute()]
    return os.pathsep.join(kept) or os.defpath  # an empty PATH means the current folder, too
