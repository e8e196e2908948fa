"""Check the folders of this computer that a configuration makes tox read, empty or create."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import UsageError

if TYPE_CHECKING:
    from tox.config.main import Config

_INFO = ".tox-info.json"  # a file of tox in each environment
_WRITTEN = ("CACHEDIR.TAG", ".gitignore")  # files that tox writes to its work folder, even through a link


def check_core(conf: Config, folder: Path) -> None:
    """Check the folders that tox writes to before it makes an environment.

    As soon as tox has read its configuration it repairs the permissions of its work folder, and may empty it.

    Args:
        conf: tox's configuration.
        folder: The project's folder.

    Raises:
        UsageError: A folder is outside the project, or tox would write through a link.
    """
    core = conf.core
    root, work, temp = (core.get(key, Path) for key in ("tox_root", "work_dir", "temp_dir"))
    check_read("tox_root", root, folder)
    if conf.options.work_dir is None:  # --workdir on the command line is the user's own choice
        _inside("work_dir", work, [root])
    for file in (work / name for name in _WRITTEN):
        if file.is_symlink():
            raise UsageError(f"{file} is a link, and tox would write through it", resolution="delete it")
    if temp.is_symlink() and not any(is_below(temp.parent, top) for top in (root, work)):
        raise UsageError(  # tox removes a link there
            f"temp_dir is {temp}, a link which is not in the project",
            resolution="name a folder in the project",
        )
    check_made("temp_dir", temp, [root, work])


def check_environment(folder: Path, roots: Sequence[Path]) -> None:
    """Check that an environment's folder may be emptied.

    Args:
        folder: The environment's folder.
        roots: The folders that tox may work in: the project, and the work folder from the command line.

    Raises:
        UsageError: The folder is outside ``roots``, or is no environment of tox.
    """
    _inside("env_dir", folder, roots)
    info = folder / _INFO
    if info.is_symlink():
        raise UsageError(f"{info} is a link, and no file of tox", resolution="delete it")
    if folder.is_dir() and any(folder.iterdir()) and not info.is_file():
        raise UsageError(
            f"env_dir is {folder}, which has files and is no environment of tox: they would be removed",
            resolution="name a folder of its own, or empty it",
        )


def check_logs(folder: Path, roots: Sequence[Path]) -> None:
    """Check that a folder for logs may be emptied.

    Raises:
        UsageError: The folder is outside ``roots``, or contains other files than logs.
    """
    _inside("env_log_dir", folder, roots)
    if folder.is_dir() and any(file.suffix != ".log" or not file.is_file() for file in folder.iterdir()):
        raise UsageError(
            f"env_log_dir is {folder}, which has other files than logs: they would be removed",
            resolution="name a folder of its own, or empty it",
        )


def check_mirrored(folder: Path, roots: Sequence[Path], project: Path) -> None:
    """Check that an environment which a machine gets is in the project, and not behind a link of it.

    Raises:
        UsageError: The folder is outside ``roots``, or a link of the project leads to it.
    """
    from pytest_microvm.untrusted.nofollow import refuse_links  # noqa: PLC0415 - see tox/plugin.py

    _inside("env_dir", folder, roots)
    refuse_links(project, folder)


def check_made(key: str, folder: Path, roots: Sequence[Path]) -> None:
    """Check that a folder exists or may be created.

    Raises:
        UsageError: The folder would be created outside ``roots``.
    """
    if not folder.exists():
        _inside(key, folder, roots)


def check_read(key: str, path: Path, folder: Path) -> None:
    """Check that a path which a machine gets, or which is read for it, is inside the project.

    Args:
        key: The key that names it.
        path: The path.
        folder: The project's folder.

    Raises:
        UsageError: The path is outside the project.
    """
    if not is_below(path, folder):
        raise UsageError(
            f"{key} is {path}, which is not in the project",
            details=f"a machine would get files of this computer; the project is {folder}",
            resolution="name a folder in the project; or, on the command line, another project with --root",
        )


def check_file(key: str, path: Path, folder: Path) -> None:
    """Check a file of the project that tox reads on this computer.

    Args:
        key: The key that names it.
        path: The file; it need not exist.
        folder: The project's folder.

    Raises:
        UsageError: The file is outside the project, or no regular file: a pipe would make tox wait.
    """
    check_read(key, path, folder)
    if path.exists() and not path.is_file():
        raise UsageError(f"{key} is {path}, which is no file", resolution="put a file there")


def is_below(path: Path, folder: Path) -> bool:
    """Return True if a path is a folder or below it, with links resolved; False for a loop of links."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # Python before 3.13 raises RuntimeError for a loop
        return False


def _inside(key: str, folder: Path, roots: Sequence[Path]) -> None:
    if not any(is_below(folder, root) and not is_below(root, folder) for root in roots):
        raise UsageError(
            f"{key} is {folder}, which is not in the project",
            details="tox would make, read or empty it on this computer",
            resolution="name a folder in the project; or, for all of tox, another one with --workdir",
        )
