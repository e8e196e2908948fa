"""An edit of two tests until the first result, and the first run of all with an image that is there.

The edit is compared with a ``python -m pytest`` process without plug-ins, and with an edit where the
workspace shapes how Python starts, so that it starts anew. The machines have the image's Python, with
pytest alone; an edit with this environment mirrored, plug-ins included, is shown as well. With
``--against COMMIT`` both figures alternate with an earlier version of this project.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import Samples, promise
from previous import checkout

from pytest_microvm.images.store import cache_root

ROUNDS = 5
FIRST_ROUNDS = 3
TESTS = "".join(f"def test_{number}():\n    assert {number} < 9\n" for number in range(2))
# Other plug-ins of this environment only add noise: with -v, hypothesis imports itself on the host.
IMAGE = ("--microvm", "--microvm-python=image")
PYTEST = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]


class Project:
    """Two small tests in a folder.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._edits = 0
        (folder / "lib").mkdir()

    @property
    def lib(self) -> str:
        """A folder in the workspace; in PYTHONPATH it makes Python start after the workspace came."""
        return str(self._folder / "lib")

    def edit(self) -> None:
        """Change the tests' file."""
        self._edits += 1
        (self._folder / "test_it.py").write_text(f"{TESTS}# {self._edits}\n")

    def until_first_result(self, samples: Samples | None, *arguments: str, **variables: str) -> None:
        """Run the tests and add the seconds until the first result to ``samples``."""
        environment = {**os.environ, **variables}
        command = [*PYTEST, *arguments]
        with (samples or Samples()).timing():
            process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            passed = any("PASSED" in line for line in process.stdout)
        process.stdout.read()
        if process.wait() != 0 or not passed:
            raise SystemExit(f"{command} ended with status {process.returncode}")

    def native_process(self, samples: Samples) -> None:
        """Add the seconds that a native process without plug-ins takes for all tests to ``samples``."""
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        with samples.timing():
            subprocess.run(PYTEST, cwd=self._folder, env=environment, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def cache_without_templates() -> Iterator[str]:
    """Yield a cache that has the user's images and what is known of the accelerator, and nothing else."""
    with tempfile.TemporaryDirectory(dir=cache_root().parent) as folder:
        (Path(folder) / "images").symlink_to(cache_root() / "images")
        if (known := cache_root() / "accelerator.json").exists():
            shutil.copy(known, folder)
        yield folder


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    """Measure in turn, print, and return what was promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="an earlier version to alternate with")
    commit = parser.parse_args(arguments or []).against
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        if commit:
            with checkout(commit) as before:
                compare(project, str(before), commit)
        return promises(project)


def promises(project: Project) -> list[dict[str, object]]:
    """Compare this version with what is promised of it."""
    edited, mirrored, anew, bare = Samples(), Samples(), Samples(), Samples()
    project.edit()
    for python in (IMAGE, ("--microvm",)):  # makes the links that all edits have in common
        project.until_first_result(None, *python)
    for _ in range(ROUNDS):
        project.edit()
        project.until_first_result(edited, *IMAGE)
        project.native_process(bare)
        project.edit()
        project.until_first_result(mirrored, "--microvm")
        project.edit()
        project.until_first_result(anew, *IMAGE, PYTHONPATH=project.lib)
    print(f"an edit until the first result  {edited} s")
    print(f"the same, mirrored environment  {mirrored} s")
    print(f"the same, Python starts anew    {anew} s")
    print(f"python -m pytest, no plug-ins   {bare} s")
    return [
        promise("an edit, against Python starting anew", edited.median / anew.median, 0.5, " x"),
        promise("an edit, against python -m pytest", edited.median / bare.median, 16, " x"),
    ]


def compare(project: Project, before: str, commit: str) -> None:
    """Alternate with an earlier version, and print the figures of both."""
    old = {"PYTHONPATH": before}
    edits = {"now": Samples(), commit: Samples()}
    firsts = {"now": Samples(), commit: Samples()}
    project.edit()
    versions = (("now", IMAGE, {}), (commit, ("--microvm",), old))
    for _name, options, variables in versions:  # builds images, and makes the links that edits have in common
        project.until_first_result(None, *options, **variables)
    for _ in range(ROUNDS):
        for name, options, variables in versions:
            project.edit()
            project.until_first_result(edits[name], *options, **variables)
    for _ in range(FIRST_ROUNDS):
        for name, options, variables in versions:
            with cache_without_templates() as cache:
                project.until_first_result(firsts[name], *options, PYTEST_MICROVM_CACHE=cache, **variables)
    for what, samples in (("an edit", edits), ("a first run", firsts)):
        for name, each in samples.items():
            print(f"{what}, {name}  {each} s")
        print(f"{what}: {samples['now'].median / samples[commit].median:.3f} of {commit}'s")


if __name__ == "__main__":
    main(sys.argv[1:])
