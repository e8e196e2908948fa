"""An environment with plug-ins of pytest that many people use (pyproject.toml's group ``plugins``)."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from filelock import FileLock

from support import guards

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def plugin_python(tmp_path_factory):
    """Return a Python that has the plug-ins, and everything that this one has."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent  # shared by the workers
    folder /= "plugins"
    with FileLock(f"{folder}.lock"):
        ready = folder / "ready"
        if not ready.exists():
            _make(folder)
            ready.touch()
    return folder / "bin" / "python"


def _make(folder):
    def run(*command):
        subprocess.run(command, cwd=REPOSITORY, check=True, timeout=guards.SUITE, stdout=subprocess.PIPE)

    run(sys.executable, "-m", "venv", "--without-pip", folder)
    place = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (place / "all.pth").write_text(f"{sysconfig.get_path('purelib')}\n{REPOSITORY}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--target", place, "--group", "plugins")
