"""Describe a Python environment of this computer by its files. Nothing of the environment is executed."""

from __future__ import annotations

import ast
import os
import platform
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import UsageError
from pytest_microvm.untrusted.nofollow import open_named

if TYPE_CHECKING:
    from collections.abc import Iterator

_CFG = "pyvenv.cfg"
_VERSION = re.compile(r"(3\.\d+)\.\d+")
_MAX_TEXT = 1024**2  # bytes of a .pth file or a finder module; larger ones are no editable installation
_OWN = re.compile(r"(_{1,3}editable_{2,3}[._]?|_editable_impl_)?pytest[-_.]microvm\b.*", re.IGNORECASE)
_INSTALLED = (".dist-info", ".egg-info")


@dataclass(frozen=True)
class PythonEnvironment:
    """A virtual environment, or an installation of Python without one.

    Args:
        prefix: Its folder (``sys.prefix``).
        base: The folder of the installation that it was made from (``sys.base_prefix``).
        version: The interpreter's version, such as ``3.13.5``.
        shares_base: Whether it uses the packages installed in ``base``.
        confined: Whether its files may be a stranger's. Then nothing in ``prefix`` selects a file elsewhere,
            except those of ``base`` and of the system's libraries.
    """

    prefix: Path
    base: Path
    version: str
    shares_base: bool
    confined: bool = False

    @property
    def name(self) -> str:
        """Its folder's name, for display."""
        return self.prefix.name or str(self.prefix)

    @property
    def library(self) -> str:
        """Name of the standard library's folder, such as ``python3.13``."""
        return "python" + self.version.rpartition(".")[0]

    @property
    def whole(self) -> bool:
        """True if everything in ``prefix`` belongs to it: a virtual environment, pyenv, conda; not /usr."""
        return self.prefix != self.base or self.prefix not in (Path("/usr"), Path("/usr/local"))

    @cached_property
    def standard_libraries(self) -> tuple[Path, ...]:
        """The standard library's folders."""
        found = (self.base / below / self.library for below in ("lib", "lib64"))
        return tuple(dict.fromkeys(folder for folder in found if (folder / "encodings").is_dir()
                                   or (folder / "lib-dynload").is_dir()))  # fmt: skip

    @cached_property
    def sites(self) -> tuple[Path, ...]:
        """The folders of installed packages that exist."""
        own = [] if self.prefix == self.base else [self.prefix / below / self.library / "site-packages"
                                                   for below in ("lib", "lib64")]  # fmt: skip
        if self.confined:
            top = os.path.realpath(self.prefix) + os.sep
            own = [path for path in own if os.path.realpath(path).startswith(top)]
        return tuple(dict.fromkeys(p for p in [*own, *self._base_sites()] if p.is_dir()))

    def _base_sites(self) -> list[Path]:
        if not self.shares_base:
            return []
        found = [self.base / below / self.library / "site-packages" for below in ("lib", "lib64")]
        if self.base == Path("/usr"):  # Debian's names; /usr/local belongs to the same Python
            found += [
                Path("/usr/lib/python3/dist-packages"),
                Path("/usr/lib") / self.library / "dist-packages",
            ]
            found += [
                Path("/usr/local/lib") / self.library / kind for kind in ("dist-packages", "site-packages")
            ]
        return found

    def packages(self) -> int:
        """Return the number of installed distributions."""
        return sum(name.endswith(_INSTALLED) for site in self.sites for name in os.listdir(site))

    def describe(self) -> str:
        """Return a description for users, such as ``.venv (CPython 3.13.5, 84 packages)``."""
        count = self.packages()
        return f"{self.name} (CPython {self.version}, {count} package{'' if count == 1 else 's'})"

    def editable_sources(self) -> Iterator[Path]:
        """Yield the folders and files from which editable installations import."""
        for site in self.sites:
            for name in sorted(os.listdir(site)):
                if is_own(name):
                    continue
                if name.endswith(".pth"):
                    yield from _paths_in(site, site / name)
                elif name.startswith("__editable__") and name.endswith("_finder.py"):
                    yield from _mapping_in(site / name)


def running_environment() -> PythonEnvironment:
    """Return the environment that runs this process.

    Raises:
        UsageError: It cannot be mirrored; the error says why and what to do.
    """
    refuse_unusable()
    prefix, base = Path(sys.prefix), Path(sys.base_prefix)
    return checked(PythonEnvironment(prefix, base, platform.python_version(), _shares_base(prefix, base)))


def refuse_unusable() -> None:
    """Check that this process's Python can run in a machine.

    Raises:
        UsageError: It cannot: another system, C library or implementation.
    """
    if sys.platform != "linux":
        why = "a machine runs Linux, and this Python is for another system"
    elif platform.python_implementation() != "CPython":
        why = f"{platform.python_implementation()} is not CPython"
    else:
        return
    raise _refused(sys.prefix, why)


def environment_at(prefix: Path) -> PythonEnvironment:
    """Return the virtual environment in the folder ``prefix``.

    Raises:
        UsageError: It is not a virtual environment of a Python that is installed here.
    """
    try:
        config = _read_config(prefix)
    except OSError as error:
        raise UsageError(
            f"invalid virtual environment {prefix}: expected a {_CFG} in it",
            details=str(error),
            resolution="create it with `python -m venv`, or name another one",
        ) from None
    version = config.get("version_info") or config.get("version", "")
    if not (match := _VERSION.match(version)) or not (home := config.get("home")):
        raise UsageError(
            f"invalid virtual environment {prefix}: expected version and home in {_CFG}",
            resolution="create it again with `python -m venv`",
        )
    library = f"python{match[1]}"
    base = next((b for b in _bases(Path(home), library) if (b / "lib" / library / "os.py").is_file()), None)
    if base is None:
        raise UsageError(
            f"invalid virtual environment {prefix}: its Python is no longer in {home}",
            resolution="create it again with a Python that is installed",
        )
    return checked(PythonEnvironment(prefix.absolute(), base, match[0], _shares_base(prefix, base)))


def is_own(name: str) -> bool:
    """Return True for pytest-microvm's own files in site-packages: the machine gets its part another way."""
    return _OWN.fullmatch(name) is not None


def checked(environment: PythonEnvironment) -> PythonEnvironment:
    """Return the environment if a machine can have it at the same paths.

    Raises:
        UsageError: It cannot.
    """
    hidden = {"/run", "/dev", "/proc", "/sys"}
    for folder in (environment.prefix, environment.base):
        if hidden & {str(parent) for parent in [*folder.parents, *folder.resolve().parents]}:
            raise _refused(environment.prefix, f"{folder} is in a folder that every machine has of its own")
    if not environment.standard_libraries:
        why = f"{environment.base} has no standard library of {environment.library} in a folder"
        raise _refused(environment.prefix, why)
    return environment


def parse_config(text: str) -> dict[str, str]:
    """Return the keys, in lower case, and values of a ``pyvenv.cfg``."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip().lower(): value.strip() for key, _equals, value in pairs}


def _refused(prefix: object, why: str) -> UsageError:
    return UsageError(
        f"the Python {prefix} cannot be mirrored into a machine: {why}",
        resolution='use an image\'s Python: --microvm-python=image (python = "image" in the configuration), '
        "with what the tests need in a kit or in `prepare`",
    )


def _bases(home: Path, library: str) -> Iterator[Path]:
    """Yield folders that may be the installation to which the interpreter in ``home`` belongs."""
    yield home.parent
    for name in (library, "python3", "python"):
        if (program := home / name).exists():
            yield program.resolve().parent.parent


def _shares_base(prefix: Path, base: Path) -> bool:
    if prefix == base:
        return True
    try:
        return _read_config(prefix).get("include-system-site-packages", "false").lower() == "true"
    except OSError:
        return False


def _read_config(prefix: Path) -> dict[str, str]:
    return parse_config((prefix / _CFG).read_text(encoding="utf-8", errors="replace"))


def _paths_in(site: Path, file: Path) -> Iterator[Path]:
    for line in _text(file).splitlines():
        text = line.strip()
        if text and not text.startswith("#") and not re.match(r"import[ \t]", text):
            path = Path(os.path.normpath(site / text))
            if os.path.exists(path):  # unlike Path.exists, False for a name that is too long
                yield path


def _mapping_in(file: Path) -> Iterator[Path]:
    """Yield the paths in ``MAPPING`` of a finder that setuptools wrote, read as a literal."""
    try:
        module = ast.parse(_text(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for statement in module.body:
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        if statement.value is None or not any(isinstance(t, ast.Name) and t.id == "MAPPING" for t in targets):
            continue
        try:
            mapping = ast.literal_eval(statement.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            return
        if isinstance(mapping, dict):
            yield from (Path(p) for p in mapping.values() if isinstance(p, str) and os.path.exists(p))


def _text(file: Path) -> str:
    try:
        with open_named(file) as stream:
            return stream.read(_MAX_TEXT).decode("utf-8-sig", errors="replace")
    except OSError:
        return ""
