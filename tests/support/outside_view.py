"""A folder that machines work in, watched from outside: where it leads, and whether all around it stays."""

import os
import stat
from pathlib import Path

_MAX_NAMES = 4  # in a path that is looked at: links go round in circles


class OutsideView:
    """What a program of the host could find changed.

    Args:
        inside: The folder.
        outside: A folder beside it that nothing inside may change.

    Attributes:
        ways_out: Paths inside that led out at the beginning; the first link of each that does.
    """

    def __init__(self, inside, outside):
        self.inside = inside
        self.outside = outside
        self.ways_out = ways_out(inside)
        self._names = sorted(os.listdir(inside.parent))  # noqa: PTH208 - names
        self._before = _contents(outside)

    def check(self):
        """Assert that nothing outside has changed, and that no path leads out that did not.

        That a file outside lost a name inside is no change: the host can remove it there as well.
        """
        assert sorted(os.listdir(self.inside.parent)) == self._names  # noqa: PTH208
        now = _contents(self.outside)
        assert now.keys() == self._before.keys()
        for path, (links, *rest) in now.items():
            links_before, *before = self._before[path]
            assert rest == before, path
            assert links <= links_before, f"{path} has a new name"
        fresh = ways_out(self.inside) - self.ways_out
        assert not fresh, f"these lead out now: {sorted(fresh)}"


def ways_out(top):
    """Return the paths below a folder that lead out of it, as the kernel follows links; none below those."""
    found = set()

    def look(path, depth):
        try:
            names = os.listdir(path)  # noqa: PTH208 - bare names
        except OSError:
            return
        for name in names:
            below = path / name
            if below.is_symlink() and not _is_within(Path(os.path.realpath(below)), top):
                found.add(str(below.relative_to(top)))
            elif depth < _MAX_NAMES:
                look(below, depth + 1)

    look(top, 1)
    return found


def _is_within(path, top):
    return path == top or top in path.parents


def _contents(folder):
    """Return what is in a folder: names of each file, rights, owner, times and content."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)  # noqa: PTH115 - as text
        else:
            content = path.read_bytes() if path.is_file() else b""
        links = 0 if path.is_dir() else status.st_nlink
        found[str(path)] = (links, status.st_mode, status.st_uid, status.st_mtime_ns, status.st_size, content)
    return found
