"""What a guest sends does not make the host grow: some of the ways of ``benchmarks/hostile_bytes.py``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "hostile_bytes.py"
MIB = 200  # more than any of these may keep, so that it would show


@pytest.mark.parametrize(
    ("way", "takes_all"),
    [
        ("console", True),
        pytest.param("console-one-line", True, marks=pytest.mark.thorough),
        ("stream-nobody-reads", False),
        pytest.param("stream-thrown-away", True, marks=pytest.mark.thorough),
        pytest.param("answers-nobody-asked-for", False, marks=pytest.mark.thorough),
        ("file-too-long", True),
        ("report-of-one-line", False),
        pytest.param("report-of-values", False, marks=pytest.mark.thorough),
        ("tar-large-members", True),
    ],
)
def test_the_host_stays_small(way, takes_all):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--one", way, "--mib", str(MIB)], check=True, capture_output=True
    )
    found = json.loads(done.stdout)
    assert found["grown"] < found["bound"], found
    taken = int(found["outcome"].split()[0])
    assert (taken >= MIB * 1024**2) is takes_all, found
