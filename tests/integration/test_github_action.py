"""The GitHub Action's steps, run for real: a suite from a cold and from a warm cache."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from junitparser import JUnitXml

from pytest_microvm.images.store import cache_root
from tests.github_runner import Runner

REPOSITORY = Path(__file__).resolve().parents[2]
ACTION = REPOSITORY / "github-action"
HOSTILE = """
import sys

def test_passes():
    assert True

def test_fails():
    print("::error title=forged::a guest's")
    sys.stdout.write("\\r::notice::a guest's too")
    print("##[warning]and this")
    print("::stop-commands::mine\\n::mine::\\n::set-output name=exit-code::0")
    assert False, "::error::in the message, 100%\\n::error::next, line"
"""


def git(folder, *words):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def image(host):
    return host.images.get("python", progress=print)


@pytest.fixture(scope="module")
def github(tmp_path_factory):
    """What outlives a job: the repository's caches."""
    return tmp_path_factory.mktemp("github")


def images_only(target, image):
    """A cache folder with one image, as if it had been built there, and nothing else."""
    source = cache_root() / "images"
    left_out = shutil.ignore_patterns("building", "blobs", "locks")
    shutil.copytree(source, target / "images", ignore=left_out)
    for file in image.files().values():
        place = target / "images" / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, place)


def job(folder, github, workspace, inputs, **variables):
    """Run the action as a job of its own: other folders, the same caches."""
    cache = github / "home"  # the same path in each job, as ~/.cache is at GitHub
    runner = Runner(
        folder,
        workspace,
        caches=github / "caches",
        artifacts=folder / "artifacts",
        variables={"PYTEST_MICROVM_CACHE": str(cache), "GITHUB_REF": "refs/heads/main", **variables},
    )
    return runner.run(ACTION, inputs)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "pyproject.toml").write_text("[project]\nname = 'small'\nversion = '1'\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_small.py").write_text(HOSTILE)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    return folder


@pytest.fixture(scope="module")
def cold(tmp_path_factory, github, project, image):
    """The first job: its images are there as if it had built them, all else it does itself."""
    images_only(github / "home", image)
    folder = tmp_path_factory.mktemp("cold")
    done = job(folder, github, project, {"args": "-rA --maxfail=5", "requirements": "pytest-timeout"})
    print(done.log)
    shutil.rmtree(github / "home")  # a hosted runner is thrown away
    return done, folder


def test_a_cold_cache(cold, image):
    done, folder = cold
    assert [step.name for step in done.steps.values() if step.outcome != "success"] == ["Verdict"], done.log
    assert done.conclusion == "failure"
    assert done.outputs == {
        "junit-path": done.outputs["junit-path"],
        "output-path": done.outputs["output-path"],
        "accelerator": done.outputs["accelerator"],
        "exit-code": "1",
        "image-digest": image.digest,
        "cache-hit": "false",
        "templates-cache-hit": "false",
        "tests": "2",
        "failures": "1",
    }
    assert done.outputs["accelerator"] in {"kvm", "tcg"}
    assert len(JUnitXml.fromfile(done.outputs["junit-path"])) > 0
    uploaded = folder / "artifacts" / "microvm-results" / "junit.xml"
    assert uploaded.read_bytes() == Path(done.outputs["junit-path"]).read_bytes()
