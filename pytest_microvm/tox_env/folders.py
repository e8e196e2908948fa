"""The folders of this computer that tox reads, empties or makes: a configuration chooses them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytest_microvm.errors import UsageError

_INFO = ".tox-info.json"  # what tox leaves in each environment


def check_environment(folder: Path, roots: Sequence[Path]) -> None:
    """See that an environment's folder may be emptied.

    Args:
        folder: Where the environment is to be.
        roots: What tox may work in: the project, and the work folder that the command line names.

    Raises:
        UsageError: It lies elsewhere, or is something else.
    """
    _inside("env_dir", folder, roots)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _INFO).is_file():
        raise UsageError(
            f"env_dir is {folder}, which has files and is no environment of tox: they would be removed",
            resolution="name a folder of its own, or empty it",
        )


def check_logs(folder: Path, roots: Sequence[Path]) -> None:
    """See that a folder for logs may be emptied.

    Raises:
        UsageError: It lies elsewhere, or has something else.
    """
    _inside("env_log_dir", folder, roots)
    if folder.is_dir() and any(file.suffix != ".log" or not file.is_file() for file in folder.iterdir()):
        raise UsageError(
            f"env_log_dir is {folder}, which has other files than logs: they would be removed",
            resolution="name a folder of its own, or empty it",
        )


def check_made(key: str, folder: Path, roots: Sequence[Path]) -> None:
    """See that a folder may be made.

    Raises:
        UsageError: It would be made elsewhere.
    """
    if not folder.exists():
        _inside(key, folder, roots)


def check_read(key: str, path: Path, folder: Path) -> None:
    """See that a path which a machine gets, or which is read for it, is the project's.

    Args:
        key: What names it.
        path: The path.
        folder: The project's folder.

    Raises:
        UsageError: It lies elsewhere.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{key} is {path}, which is not in the project",
            details=f"a machine would get files of this computer; the project is {folder}",
            resolution="name a folder in the project; or, on the command line, another project with --root",
        )


def _inside(key: str, folder: Path, roots: Sequence[Path]) -> None:
    real = folder.resolve()
    tops = [root.resolve() for root in roots]
    if not any(real != top and real.is_relative_to(top) for top in tops):
        raise UsageError(
            f"{key} is {folder}, which is not in the project",
            details="tox would make or empty it on this computer",
            resolution="name a folder in the project; or, for all of tox, another one with --workdir",
        )
