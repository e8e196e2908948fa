import os
import subprocess
import sys
from pathlib import Path

import pytest

from todofile import Store, Task

SOURCE = Path(__file__).parent.parent / "src"


@pytest.fixture(scope="session")
def sample():
    return [
        Task.parse(line)
        for line in (
            "(B) 2024-06-01 water the plants +home",
            "(A) call the bank +money",
            "x (A) 2024-05-01 pay the rent +money +home",
            "read a book",
        )
    ]


@pytest.fixture
def store(tmp_path, sample):
    store = Store(tmp_path / "todo.txt")
    for task in sample:
        store.add(task)
    return store


@pytest.fixture
def todofile(store):
    """Run the command in a process of its own."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "todofile", store.path, *arguments],
            env=os.environ | {"PYTHONPATH": str(SOURCE)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run
