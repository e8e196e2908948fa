"""Plan the build and installation of the project's package, recorded for the template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tox.tox_env.errors import Fail
from tox.tox_env.python.extras import resolve_extras_static

from pytest_microvm.tox.installer import GuestPip, InstallPlan

if TYPE_CHECKING:
    from packaging.requirements import Requirement


@dataclass(frozen=True)
class Package:
    """The package to install.

    Args:
        how: tox's package type, as in ``package``; any but ``skip``.
        root: The project's folder.
        extras: The extras to install.
        given: The file that ``--installpkg`` names, for ``external``.
        env_dir: The environment's folder.
        python: The environment's Python.
    """

    how: str
    root: Path
    extras: frozenset[str]
    given: Path | None
    env_dir: Path
    python: Path


def plan_package(package: Package, installer: GuestPip, plan: InstallPlan) -> None:
    """Record the commands that build and install the package, and the files that they read.

    Raises:
        Fail: The package cannot be installed in this way.
    """
    if package.how == "deps-only":
        _plan_dependencies(package, installer)
        return
    suffix = f"[{','.join(sorted(package.extras))}]" if package.extras else ""
    constraints = installer.package_constraints()
    if package.how.startswith("editable"):
        installer.note(["-e", f"{package.root}{suffix}", *constraints], "package")
        return
    built = package.env_dir / ".pkg"
    requirement = str(built / "package.txt")
    if package.given is not None:
        plan.pushed[str(built / package.given.name)] = package.given
        plan.files[requirement] = f"{built / package.given.name}{suffix}\n"
    else:
        _plan_build(package, built, suffix, plan)
    installer.note(["-r", requirement, *constraints], "package")


def _plan_build(package: Package, built: Path, suffix: str, plan: InstallPlan) -> None:
    script = str(package.env_dir / "build_package.py")
    plan.files[script] = Path(__file__).with_name("build_package.py").read_text(encoding="utf-8")
    how = "wheel" if package.how == "wheel" else "sdist"
    command = (str(package.python), "-I", script, how, str(package.root), str(built), suffix)
    plan.commands.append((command, "build_package"))


def _plan_dependencies(package: Package, installer: GuestPip) -> None:
    dependencies = written_dependencies(package.root, set(package.extras))
    if dependencies is None:
        raise Fail("package = deps-only needs dependencies that are written in pyproject.toml")
    if dependencies:
        installer.install(dependencies, "microvm", "package_deps")


def written_dependencies(root: Path, extras: set[str]) -> list[Requirement] | None:
    """Return the dependencies that a project's pyproject.toml lists; ``None`` if its backend computes them.

    Raises:
        Fail: The file is invalid.
    """
    try:
        found: list[Requirement] | None = resolve_extras_static(root, extras)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Fail(f"{root / 'pyproject.toml'} has invalid dependencies: {error}") from None
    return found
