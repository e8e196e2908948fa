"""Six small branches: ``ci run`` against six virtual environments one after another, cold and warm.

Natively each branch is checked out, gets a new virtual environment, its dependencies and its tests; warm
means that pip has the wheels in its cache. In machines, cold means that there is no template at all, only the
image; warm that the same was run before, so that the dependencies are in a prepared template.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import promise

from pytest_microvm.images.store import cache_root

BRANCHES = 6
NEEDS = ("iniconfig", "attrs", "packaging")
DEFINITION = f"""
[ci.jobs.test]
image = "python"
prepare = ["pip install --quiet --break-system-packages -r requirements.txt"]
prepare_inputs = ["requirements.txt"]
prepare_network = ["pip"]
steps = ["python3 -m pytest -q"]
# {" ".join(NEEDS)}
"""
TESTS = """
import attrs, iniconfig, packaging, pytest

@pytest.mark.parametrize("number", range(20))
def test_number(number):
    assert number == number
"""
COMMAND = "import sys; from pytest_microvm.cli import main; sys.exit(main())"


def main() -> list[dict[str, object]]:
    """Measure, print, and return what was promised."""
    with tempfile.TemporaryDirectory(prefix="bench-ci-") as folder:
        place = Path(folder)
        repository = _repository(place / "repository")
        pip_cache, cache = place / "pip", place / "cache"
        _copy_images(cache)
        native = [_native(repository, place / f"native{number}", pip_cache) for number in range(2)]
        machines = [_machines(repository, place / "out", cache) for _ in range(2)]
    for name, ours, theirs in zip(("cold", "warm"), machines, native, strict=True):
        print(f"{name}: {BRANCHES} branches in machines {ours:.1f} s, in virtual environments {theirs:.1f} s")
    return [
        promise("ci run of 6 branches, cold, in native runs", machines[0] / native[0], 2.0),
        promise("ci run of 6 branches, warm, in native runs", machines[1] / native[1], 0.75),
    ]


def _repository(folder: Path) -> Path:
    """Make a repository with six branches."""
    folder.mkdir()
    _git(folder, "init", "--quiet", "--initial-branch=main")
    (folder / "microvm.toml").write_text(DEFINITION)
    (folder / "requirements.txt").write_text("\n".join(["pytest", *NEEDS]) + "\n")
    (folder / "test_small.py").write_text(TESTS)
    _commit(folder)
    for number in range(BRANCHES):
        _git(folder, "checkout", "--quiet", "-b", f"branch{number}", "main")
        (folder / "text").write_text(str(number))
        _commit(folder)
    return folder


def _native(repository: Path, place: Path, pip_cache: Path) -> float:
    environment = {**os.environ, "PIP_CACHE_DIR": str(pip_cache), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    begin = time.perf_counter()
    for number in range(BRANCHES):
        tree, venv = place / f"tree{number}", place / f"venv{number}"
        _git(repository, "worktree", "add", "--quiet", "--detach", str(tree), f"branch{number}")
        for command in (
            [sys.executable, "-m", "venv", venv],
            [venv / "bin/pip", "install", "--quiet", "-r", "requirements.txt"],
            [venv / "bin/python", "-m", "pytest", "-q"],
        ):
            subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=True)
    return time.perf_counter() - begin


def _machines(repository: Path, output: Path, cache: Path) -> float:
    environment = {**os.environ, "PYTEST_MICROVM_CACHE": str(cache), "PYTEST_MICROVM_TRUST": "1"}
    command = [sys.executable, "-c", COMMAND, "ci", "run", "--branch", "branch*", "--output", str(output)]
    begin = time.perf_counter()
    subprocess.run(command, cwd=repository, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def _copy_images(cache: Path) -> None:
    """Give a new cache the images alone, so that no template is there."""
    cache.mkdir()
    for path in cache_root().iterdir():
        if path.name not in ("templates", "ci") and path.is_dir():
            shutil.copytree(path, cache / path.name, copy_function=os.link, symlinks=True)


def _commit(folder: Path) -> None:
    _git(folder, "add", "--all")
    _git(
        folder, "-c", "user.name=bench", "-c", "user.email=bench@example.com", "commit", "--quiet", "-m", "-"
    )


def _git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True)


if __name__ == "__main__":
    main()
