"""Opens a file of this computer that must be one, not a link, a pipe or a folder in its place."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def plain_file(path: Path) -> Iterator[tuple[IO[bytes], int] | None]:
    """Give a plain file and its bytes, ``None`` for anything else and for what is not there.

    Args:
        path: Its last name is not followed if it is a link.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        yield None
        return
    with open(descriptor, "rb") as file:  # noqa: PTH123 - it is open already
        yield file, status.st_size
