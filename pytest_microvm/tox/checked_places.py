"""The files and folders of this computer that an environment uses: its configuration chooses them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.tox import folders
from pytest_microvm.tox.configuration import ToxFile

if TYPE_CHECKING:
    from tox.config.cli.parser import Parsed
    from tox.config.sets import CoreConfigSet, EnvConfigSet


class CheckedPlaces:
    """The places that an environment reads and writes.

    Args:
        core: The configuration of tox itself.
        conf: The environment's configuration.
        options: The command line's options.
    """

    def __init__(self, core: CoreConfigSet, conf: EnvConfigSet, options: Parsed) -> None:
        self._core = core
        self._conf = conf
        self._options = options

    @cached_property
    def file(self) -> ToxFile:
        """Tox's configuration file."""
        return ToxFile.of(self._core.get("config_file_path", Path), self._options)

    @property
    def roots(self) -> list[Path]:
        """The folders that tox may work in: the project, and the work folder that the command line names."""
        given = self._options.work_dir
        return [self._root, *([] if given is None else [Path(given)])]

    def check_reads(self, folder: Path, *, reads_project_file: bool) -> None:
        """Check that a machine gets only the project's files.

        Args:
            folder: The folder of the configuration, or the one that the command line names.
            reads_project_file: Whether dependencies are read from ``pyproject.toml``.

        Raises:
            UsageError: A path is outside the project.
        """
        folders.check_read("tox_root", self._root, folder)
        roots = {self._root}
        if "package_root" in self._core:  # older versions of tox have it only with a package environment
            roots.add(self._core.get("package_root", Path))
        for root in roots:
            folders.check_read("package_root", root, folder)
            if self._conf["pylock"]:
                folders.check_file("pylock", root / str(self._conf["pylock"]), folder)
            if self._conf["dependency_groups"] or reads_project_file:
                folders.check_file("pyproject.toml", root / "pyproject.toml", folder)

    def check_version_files(self, paths: Iterable[str]) -> None:
        """Check that files that name a version of Python are the project's.

        Raises:
            UsageError: One is outside the project.
        """
        for path in paths:
            folders.check_file("base_python_file", self._root / path, self.file.folder)

    def check_written(self, env_dir: Path) -> None:
        """Check that tox empties only its own folders.

        Args:
            env_dir: The environment's folder on this computer.

        Raises:
            UsageError: A folder is outside the project.
        """
        roots = self.roots
        folders.check_environment(env_dir, roots)
        folders.check_logs(self._conf.get("env_log_dir", Path), roots)
        folders.check_made("temp_dir", self._core.get("temp_dir", Path), roots)
        folders.check_made("change_dir", self._conf.get("change_dir", Path), roots)

    @property
    def _root(self) -> Path:
        return self._core.get("tox_root", Path)
