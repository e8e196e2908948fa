"""Find the programs that machines, image builds and pulls need, and report all missing ones in one error."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_microvm.errors import HostError, HypervisorMissing
from pytest_microvm.untrusted.program_path import absolute_path

if TYPE_CHECKING:
    from collections.abc import Sequence

INSTALL = "pytest-microvm setup"
"""The command that installs missing programs."""

Purpose = Literal["machines", "images", "pulls"]

_TABLE = Path(__file__).with_name("needed.txt")
_SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"  # Debian's PATH of ordinary users lacks them
_CANNOT = {
    "machines": "machines cannot run",
    "images": "images cannot be built",
    "pulls": "container images cannot be pulled",
}
_ACTIVITY = {"machines": "to run machines", "images": "to build images", "pulls": "to pull container images"}
_USUAL: tuple[Purpose, ...] = ("machines", "images")


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package with programs that pytest-microvm needs: a row of ``needed.txt``.

    Args:
        name: The package's name.
        where: The computers that need it.
        purpose: ``machines``, ``images`` or ``pulls``.
        programs: Names of programs, and absolute paths of files (globs).
    """

    name: str
    where: str
    purpose: str
    programs: tuple[str, ...]

    def __str__(self) -> str:
        because = f" with {self.where}" if "=" in self.where else ""
        programs = ", ".join(self.missing() or self.programs)
        return f"{programs} (Debian package {self.name}), {_ACTIVITY[self.purpose]}{because}"

    def needed_here(self) -> bool:
        """Return True if this computer and user need it."""
        variable, _, value = self.where.partition("=")
        if value:
            return os.environ.get(variable) == value
        return self.where in ("all", architecture(), "user" if os.geteuid() else "root")

    def missing(self) -> list[str]:
        """Return those of its programs that are not installed."""
        return [name for name in self.programs if not _exists(name)]


def architecture() -> str:
    """Return this computer's architecture, as ``uname -m`` prints it on Linux."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def find_program(name: str) -> str | None:
    """Return the path of a program, or ``None``; relative entries of ``PATH`` are not searched."""
    return shutil.which(name, path=f"{absolute_path()}:{_SYSTEM_FOLDERS}")


def missing_packages(purposes: Sequence[Purpose] = _USUAL) -> list[DebianPackage]:
    """Return the packages that this computer needs and lacks.

    Args:
        purposes: What it needs them for. By default not for pulls: few computers pull container images.
    """
    wanted = [package for package in _packages() if package.purpose in purposes]
    return [package for package in wanted if package.needed_here() and package.missing()]


def require(purpose: Purpose) -> None:
    """Check that all programs for a purpose are installed.

    Raises:
        HypervisorMissing: QEMU is missing; the error names all missing programs.
        HostError: Other programs are missing.
    """
    packages = missing_packages((purpose,))
    missing = [name for package in packages for name in package.missing()]
    if missing:
        raise _not_found(purpose, missing)


def require_program(name: str, purpose: Purpose = "machines") -> str:
    """Return the path of a program that is needed for a purpose.

    Raises:
        HypervisorMissing: It is QEMU, and is missing; the error names all missing programs.
        HostError: It is another one, and is missing.
    """
    path = find_program(name)
    if path is None:
        raise _not_found(purpose, [name])
    return path


@cache
def _packages() -> list[DebianPackage]:
    rows = [line.split() for line in _TABLE.read_text("ascii").splitlines() if not line.startswith("#")]
    return [DebianPackage(name, where, purpose, tuple(programs)) for name, where, purpose, *programs in rows]


def _exists(name: str) -> bool:
    return any(Path("/").glob(name[1:])) if name.startswith("/") else find_program(name) is not None


def _not_found(purpose: Purpose, names: list[str]) -> HostError:
    """Return the error for missing programs; its details list whatever else this computer lacks."""
    missing = missing_packages()
    foreign = [one for one in _packages() if one not in missing and set(names) & set(one.programs)]
    steps = [INSTALL] if missing or not foreign else []  # it leaves out QEMU for other architectures
    steps += [f"apt-get install {one.name}" for one in foreign]
    kind = HypervisorMissing if any(name.startswith("qemu-system-") for name in names) else HostError
    return kind(
        f"{_CANNOT[purpose]}: {', '.join(names)} not found",
        details="\n".join(f"missing: {package}" for package in [*missing, *foreign]),
        resolution=" and ".join(steps),
    )
