"""Told to an environment's Python: build the project's package, as tox's package environment would.

It is no part of this package when it runs: its text is a script in a machine. The project's build backend
runs in an environment of its own (PEP 517), made here and used for every build.
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
    """Build it and write the requirement by which it is installed.

    Args:
        how: ``wheel``, or ``sdist``: from the source distribution.
        root: The project.
        folder: Where the environment of the build, the packages and ``package.txt`` are to be.
        extras: What to install with it, such as ``[test]``.
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
        sdist.extractall(folder / "source")  # noqa: S202 - by the project, in its machine
    (source,) = (folder / "source").iterdir()
    return source


def _system(root: Path) -> "dict[str, Any]":
    """Return what pyproject.toml says of the build."""
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
    caller: Any = BuildBackendHookCaller  # pip ships no types of it that hold
    return caller(str(root), backend, folders, runner=run, python_executable=str(python))


def _install(python: Path, requirements: "list[str]") -> None:
    if requirements:
        pip = [sys.executable, "-I", "-m", "pip", "--python", str(python), "install", "--quiet"]
        subprocess.run([*pip, *requirements], check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
