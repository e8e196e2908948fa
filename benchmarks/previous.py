"""A version of this project from its history, to be measured beside this one."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Yield a folder with a commit's files; as PYTHONPATH it makes this Python run that version.

    Args:
        commit: A commit of this repository.

    Raises:
        subprocess.CalledProcessError: There is none such.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit], check=True, stdout=subprocess.PIPE
        ).stdout
        subprocess.run(["tar", "-x", "-C", folder], check=True, input=archive)
        yield Path(folder)
