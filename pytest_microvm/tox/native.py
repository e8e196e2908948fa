"""Describe an environment that tox made on this computer, for a machine to mirror.

Its folder is in the project, so its files may be a stranger's: they are read as bounded data, without
following links, and its Python counts only if tox itself finds the same one on this computer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtualenv.app_data import make_app_data
from virtualenv.discovery.builtin import get_interpreter

from pytest_microvm.errors import UsageError
from pytest_microvm.images.mirror.environment import PythonEnvironment, checked, parse_config
from pytest_microvm.tox.folders import is_below
from pytest_microvm.tox.interpreters import python_info
from pytest_microvm.untrusted.nofollow import read_below

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tox.tox_env.python.api import PythonInfo

_CFG = "pyvenv.cfg"
_RECORD = ".tox-info.json"
_LONGEST = 1024 * 1024  # bytes of one of these files
_VERSION = re.compile(r"(3\.\d{1,3}\.\d{1,3})(?!\d)")


@dataclass(frozen=True)
class NativeEnvironment:
    """An environment that tox made on this computer.

    Args:
        environment: Its files.
        python: Its Python, as tox describes one.
        record: What tox recorded about its installations.
        next_step: How to make the environment again, for errors.
    """

    environment: PythonEnvironment
    python: PythonInfo
    record: Mapping[str, Any]
    next_step: str

    def stale(self, why: str) -> UsageError:
        """Return the error for an environment that differs from the configuration."""
        brief = f"the environment {self.environment.prefix} is stale: {why}"
        return UsageError(brief, resolution=self.next_step)

    def imports_from(self, folder: Path) -> bool:
        """Return True if an editable installation imports from a folder."""
        return any(is_below(path, folder) for path in self.environment.editable_sources())

    @property
    def copied_package(self) -> str:
        """The warning that commands use an installed copy of the project's package."""
        return (
            f"the project's package is the copy that tox installed in {self.environment.prefix}: later "
            f"changes are not in it; next step: {self.next_step}, or set package = editable"
        )


def native_environment(folder: Path, find: Callable[[str], Any], next_step: str) -> NativeEnvironment:
    """Return the environment in a folder of the project.

    Args:
        folder: The folder; there is no link of the project on the way to it.
        find: Returns this computer's interpreter of a version, see :func:`find_python`.
        next_step: How to make the environment, for errors.

    Raises:
        UsageError: The folder is no environment of tox, or its Python is not on this computer.
    """

    def refused(why: str) -> UsageError:
        return UsageError(f"env_dir is {folder}, which {why}", resolution=next_step)

    if not folder.is_dir():
        raise refused("does not exist: tox has not made the environment on this computer")
    config, record = (_text(folder, name) for name in (_CFG, _RECORD))
    if config is None or record is None:
        missing = _CFG if config is None else _RECORD
        raise refused(f"is no virtual environment of tox: it has no {missing}")
    keys = parse_config(config)
    match = _VERSION.match(keys.get("version_info") or keys.get("version", ""))
    home = keys.get("home", "")
    if match is None or not Path(home).is_absolute() or "\0" in home:
        raise refused(f"is no virtual environment: expected version and home in {_CFG}")
    python = find(match[1])
    base = None if python is None else _base(home, python)
    if base is None:
        raise refused(f"was made with Python {match[1]} in {home}, which tox does not find on this computer")
    if python.implementation != "CPython":
        raise refused(f"was made with {python.implementation}: only CPython can be mirrored into a machine")
    if not (folder / "bin" / "python").exists():
        raise refused("has no bin/python, or its Python is gone")
    shares = keys.get("include-system-site-packages", "").lower() == "true"
    environment = PythonEnvironment(folder, base, match[1], shares, confined=True)
    try:
        return NativeEnvironment(checked(environment), _described(python), _parsed(record), next_step)
    except ValueError:
        raise refused(f"has a damaged {_RECORD}") from None
    except UsageError as error:
        raise UsageError(error.brief, resolution="use the image's Python: microvm_python = image") from None


def find_python(version: str, project: Path, first: Sequence[str]) -> Any:
    """Return this computer's CPython of a version as tox finds it; ``None`` if there is none.

    virtualenv starts the programs that it finds, so those in the project are hidden from it.

    Args:
        version: The version, such as ``3.13.5``.
        project: The project's folder.
        first: Programs that the user named, which are tried first.
    """
    search = os.environ.get("PATH", "").split(os.pathsep)
    allowed = [folder for folder in search if folder and not is_below(Path(folder), project)]
    variables = {**os.environ, "PATH": os.pathsep.join(allowed)}
    data = make_app_data(None, read_only=False, env=os.environ)
    try:
        return get_interpreter(f"cpython{version}", first, data, variables)
    except RuntimeError:  # one that the user named does not start
        return None


def _base(home: str, python: Any) -> Path | None:
    """Return the installation in which ``python`` is, if a ``pyvenv.cfg`` with this ``home`` means it."""
    program = Path(python.system_executable or python.executable)
    if _real(home) not in (_real(program.parent), _real(program).parent):
        return None
    prefix, above = Path(python.system_prefix), Path(home).parent
    same = os.path.normpath(home) == home and _real(above) == _real(prefix)
    return above if same else prefix  # Python derives the installation from this path, even if it has links


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, no error for a loop of links


def _described(python: Any) -> PythonInfo:
    program = Path(python.system_executable or python.executable)
    return python_info(
        implementation=python.implementation,
        version_info=tuple(python.version_info),
        version=python.version,
        is_64=python.architecture == 64,  # noqa: PLR2004 - bits
        platform=python.platform,
        extra={"executable": program.resolve(), "called": str(program)},
        free_threaded=bool(getattr(python, "free_threaded", False)),
        debug=bool(getattr(python, "debug_build", False)),
        machine=getattr(python, "machine", None),
        marker_environment=getattr(python, "marker_environment", None),
    )


def _text(folder: Path, name: str) -> str | None:
    try:
        content = read_below(folder, name, _LONGEST)
    except OSError as error:
        raise UsageError(f"{folder / name} cannot be read: {error.strerror}") from None
    return None if content is None else content.decode("utf-8", errors="replace")


def _parsed(record: str) -> dict[str, Any]:
    """Return tox's record.

    Raises:
        ValueError: It is damaged.
    """
    try:
        value = json.loads(record)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("no object")  # noqa: TRY004 - one error for all damaged records
    return value
