"""Hostile projects of tests/attacks in real machines: those whose machine obeys what the host must not."""

import os
import subprocess
import sys
from pathlib import Path

from support import guards

REPOSITORY = Path(__file__).parents[2]
CHOSEN = "launcher and (log-file or basetemp or cache-dir-override or plugin-and-guard or entry-point-toml)"


def test_hostile_projects_in_machines():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-n0",
        "-q",
        "-k",
        CHOSEN,
        "tests/attacks",
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "PYTEST_MICROVM_TEST_BACKEND": "machines"},
        capture_output=True, text=True, timeout=guards.SUITE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "8 passed" in done.stdout
