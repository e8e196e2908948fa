"""What runs on this computer below a process."""

import os
from pathlib import Path


def children(pid=None):
    """Return the ids of all processes below ``pid``, the living ones."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found, below = [], [pid or os.getpid()]
    while below:
        below = [child for parent in below for child in parents.get(parent, [])]
        found += below
    return found
