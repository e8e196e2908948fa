"""Script for an environment's Python: build the project's package, as tox's package environment would.

This module runs as a script in a machine, apart from this package. It makes a separate environment for the
project's build backend (PEP 517), which it uses for all builds.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from pip._vendor.pyproject_hooks import BuildBackendHookCaller

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

_LEGACY = {"requires": ["setuptools>=40.8.0"], "build-backend": "setuptools.build_meta:__legacy__"}  # PEP 517


def main(how: str, root: Path, folder: Path, extras: str) -> None:
    """Build the package and write a requirements file that installs it.

    Args:
        how: ``wheel`` builds a wheel directly, ``sdist`` by way of a source distribution.
        root: The project's folder.
        folder: The folder for the build environment, the packages and ``package.txt``.
        extras: The extras to install, such as ``[test]``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    _install(python, _system(root)["requires"])
    source = root if how == "wheel" else _unpacked_sdist(root, folder, python)
    hooks = _hooks(source, python)
    _install(python, hooks.get_requires_for_build_wheel())
    wheel = folder / hooks.build_wheel(str(folder))
    (folder / "package.txt").write_text(f"{wheel}{extras}\n", encoding="utf-8")


def _unpacked_sdist(root: Path, folder: Path, python: Path) -> Path:
    hooks = _hooks(root, python)
    _install(python, hooks.get_requires_for_build_sdist())
    with tarfile.open(folder / hooks.build_sdist(str(folder))) as sdist:
        sdist.extractall(folder / "source")  # noqa: S202 - made by the project, in its own machine
    (source,) = (folder / "source").iterdir()
    return source


def _system(root: Path) -> "dict[str, Any]":
    """Return the build system from pyproject.toml, with defaults for missing values."""
    try:
        told = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get(
            "build-system", _LEGACY
        )
    except FileNotFoundError:
        told = _LEGACY
    return {**told, "build-backend": told.get("build-backend", _LEGACY["build-backend"])}


def _hooks(root: Path, python: Path) -> Any:
    system = _system(root)
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])

    def run(command: Any, cwd: Any = None, extra_environ: Any = None) -> None:
        environment = {**os.environ, "PATH": path, **(extra_environ or {})}
        subprocess.run(command, cwd=cwd, env=environment, check=True)

    backend, folders = system["build-backend"], system.get("backend-path")
    caller: Any = BuildBackendHookCaller  # pip's types for it are unreliable
    return caller(str(root), backend, folders, runner=run, python_executable=str(python))


def _install(python: Path, requirements: "list[str]") -> None:
    if requirements:
        pip = [sys.executable, "-I", "-m", "pip", "--python", str(python), "install", "--quiet"]
        subprocess.run([*pip, *requirements], check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
