"""An edit of a test, and the suite again: where Python has started before, and where it starts anew."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Samples, promise

ROUNDS = 5
TESTS = "".join(f"def test_{number}():\n    assert {number} < 9\n" for number in range(9))


def main() -> list[dict[str, object]]:
    """Measure in turn, print, and return what was promised."""
    command = [sys.executable, "-m", "pytest", "-q", "--microvm", "-p", "no:cacheprovider"]
    before, anew = Samples(), Samples()
    with tempfile.TemporaryDirectory() as folder:
        project, rounds = Path(folder), 0
        (project / "lib").mkdir()

        def edit_and_run(**variables: str) -> None:
            nonlocal rounds
            rounds += 1
            (project / "test_it.py").write_text(f"{TESTS}# {rounds}\n")
            subprocess.run(
                command, cwd=project, env={**os.environ, **variables}, check=True, stdout=subprocess.DEVNULL
            )

        edit_and_run()  # makes the links that both have in common
        for _ in range(ROUNDS):
            with before.timing():
                edit_and_run()
            with anew.timing():  # the workspace can shape how Python starts: see ADR 0024
                edit_and_run(PYTHONPATH=str(project / "lib"))
    print(f"Python has started  {before} s")
    print(f"Python starts anew  {anew} s")
    return [promise("an edit and nine tests, against Python starting anew", before.median / anew.median, 0.7)]


if __name__ == "__main__":
    main()
