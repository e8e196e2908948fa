"""Download a kit's wheels for the guest's Python, with this computer's pip."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from pytest_microvm.errors import HostError
from pytest_microvm.images.process import run

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_microvm.images.kits import Kit

_OLDEST_GLIBC, _NEWEST_GLIBC = 5, 36  # the manylinux tags that the C library of Debian 12 and later satisfies


def download_wheels(folder: Path, kit: Kit, python: str) -> list[Path]:
    """Download the kit's wheels with this computer's pip, so that its configuration and index apply.

    Raises:
        BuildError: A wheel cannot be found.
        HostError: This Python has no pip.
    """
    folder.mkdir()
    has_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
    if has_pip.returncode != 0:
        raise HostError(
            f"the kit's wheels cannot be downloaded: {sys.executable} has no pip",
            resolution="install pip into this Python (python -m ensurepip, or uv pip install pip)",
        )
    tag = "cp" + python.replace(".", "")
    minors = range(_NEWEST_GLIBC, _OLDEST_GLIBC - 1, -1)
    platforms = [f"manylinux_2_{minor}_{kit.architecture}" for minor in minors]
    platforms += [f"manylinux2014_{kit.architecture}", f"linux_{kit.architecture}"]
    if kit.architecture == "x86_64":
        platforms += ["manylinux2010_x86_64", "manylinux1_x86_64"]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
        "--only-binary=:all:", "--implementation=cp", f"--python-version={python}",
        f"--abi={tag}", "--abi=abi3", "--abi=none",
        *(f"--platform={name}" for name in platforms), f"--dest={folder}", *kit.wheels,
    ]  # fmt: skip
    run(command, what="pip download", environment=_pip_environment())
    return sorted(folder.glob("*.whl"))


def _pip_environment() -> dict[str, str]:
    """Return the user's own environment, which configures pip's index and certificates."""
    return {**os.environ, "LC_ALL": "C.UTF-8"}
