"""Where programs of this computer are searched: never in the folder that a command starts in."""

from __future__ import annotations

import os
from pathlib import Path


def absolute_path() -> str:
    """Return ``PATH`` without relative and empty entries: what they name may be a project's."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    kept = [folder for folder in folders if Path(folder).is_absolute()]
    return os.pathsep.join(kept) or os.defpath  # an empty PATH means the current folder, too
