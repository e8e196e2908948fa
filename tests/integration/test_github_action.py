"""The GitHub Action's steps, run for real: a suite from cold and warm caches, and branches of strangers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from junitparser import JUnitXml

from pytest_microvm.images.store import cache_root
from support.branches import TESTS, VERDICTS, Branches, together
from support.github.runner import Runner
from support.repositories import git

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
        event={"repository": {"default_branch": "main"}},
    )
    return runner.run(ACTION, inputs)


@pytest.fixture(scope="module")
def marker(tmp_path_factory):
    """A file that comes to be if this computer runs code of the project."""
    return tmp_path_factory.mktemp("marker") / "made"


@pytest.fixture(scope="module")
def project(tmp_path_factory, marker):
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "tests").mkdir()
    for name in ("pytest.py", "pytest_microvm.py", "sitecustomize.py", "tests/conftest.py"):
        (folder / name).write_text(
            f"import os\nif os.path.exists({str(folder)!r} + '/.git'):\n    open({str(marker)!r}, 'w')\n"
        )
    (folder / "conftest.py").write_text(
        (folder / "pytest.py").read_text()
        + "def pytest_addoption(parser):\n    parser.addoption('--microvm', action='store_true')\n"
    )
    (folder / "pyproject.toml").write_text(
        "[project]\nname = 'small'\nversion = '1'\n"  # as tests/attacks has them: they would run here
        "[tool.pytest.ini_options]\naddopts = '-p no:microvm -p no:microvm-guard -n 3 --junitxml=/x.xml'\n"
    )
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
    done = job(folder, github, project, {"args": "-rA --maxfail=5 -p html", "requirements": "pytest-html"})
    sys.stdout.write(done.log)
    shutil.rmtree(github / "home")  # a hosted runner is thrown away
    return done, folder


@pytest.fixture(scope="module")
def warm(tmp_path_factory, github, project, cold):
    """The same job again, on a new runner that has nothing but GitHub's caches."""
    folder = tmp_path_factory.mktemp("warm")
    done = job(folder, github, project, {"python": sys.executable, "artifact-name": "again"})
    sys.stdout.write(done.log)
    return done, folder


def names(done, outcome):
    return [step.name for step in done.steps.values() if step.outcome == outcome]


def test_a_cold_cache(cold, image, marker):
    done, folder = cold
    assert (names(done, "failure"), names(done, "skipped")) == (["Verdict"], [])
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
    assert "html" in done.steps["run"].log.partition("plugins: ")[2].splitlines()[0]
    assert not marker.exists()


def test_a_warm_cache(warm, cold, image):
    done, folder = warm
    outputs = {**cold[0].outputs, **{name: done.outputs[name] for name in ("junit-path", "output-path")}}
    assert done.outputs == outputs | {"cache-hit": "true", "templates-cache-hit": "true"}
    saving = ["Python", "Templates for the cache", "Save templates", "Save images"]
    assert (names(done, "failure"), names(done, "skipped")) == (["Verdict"], saving)
    assert "booting" not in done.log  # it went on from the template
    assert (folder / "artifacts" / "again" / "junit.xml").is_file()


def test_a_guest_commands_nothing(cold):
    done, _folder = cold
    [error] = [command for command in done.commands if command.name == "error"]
    assert error.properties["file"] == "tests/test_small.py"
    lines = HOSTILE.splitlines()
    assert "def test_fails" in lines[int(error.properties["line"]) - 1]
    assert error.data.startswith("AssertionError: ::error::in the message, 100%\n")
    assert {command.name for command in done.commands} <= {"error", "warning", "remove-matcher"}
    assert all("forged" not in str(command) for command in done.commands)
    assert done.steps["run"].commands[-1].name == "remove-matcher"


def test_the_summary_shows_what_failed(cold):
    summary = cold[0].steps["report"].summary
    assert summary.startswith("## pytest-microvm: 1 failed, 1 passed\n")
    assert f"Accelerator: **{cold[0].outputs['accelerator']}**" in summary
    assert "### `tests.test_small: test_fails`" in summary


@pytest.mark.parametrize("chosen", together())
def test_the_branches_of_strangers(tmp_path, github, warm, chosen):
    """The same branches as test_ci_branches.py, through the action's steps."""
    branches = Branches(tmp_path)
    given = {"mode": "ci", "python": sys.executable, "cache": "false", "kvm": "false"}
    given["branches"] = " ".join(chosen)
    done = job(tmp_path / "job", github, branches.folder, given)
    sys.stdout.write(done.log)
    assert (names(done, "failure"), done.outputs["exit-code"]) == (["Verdict"], "1")
    results = json.loads(Path(done.outputs["output-path"], "results.json").read_text())
    verdicts = {branch: VERDICTS[branch] for branch in chosen}
    assert branches.verdicts(results["tasks"]) == verdicts
    tests = [TESTS[branch] for branch in chosen if branch in TESTS]
    failed = sum(failures for _passed, failures in tests)
    assert int(done.outputs["failures"]) >= failed
    assert int(done.outputs["tests"]) >= failed + sum(passed for passed, _failures in tests)

    # Nothing that a branch printed or named is a command, an output, or a link in what is uploaded.
    assert "forged" in done.log
    assert {command.name for command in done.commands} <= {"error", "warning", "remove-matcher"}
    assert all("forged" not in command.properties.get("title", "") for command in done.commands)
    errors = [command for command in done.steps["report"].commands if command.name == "error"]
    for branch, verdict in verdicts.items():
        assert any(branch in str(error) for error in errors) == (verdict != "passed"), branch
    assert all("file" not in error.properties for error in errors)  # other branches' files are not here
    assert all(branch in done.steps["report"].summary for branch in verdicts)
    uploaded = tmp_path / "job" / "artifacts" / "microvm-results"
    assert (uploaded / "main.test" / "artifacts" / "out" / "made.txt").is_file()
    assert not any(b"root:" in path.read_bytes() for path in uploaded.rglob("*") if path.is_file())
    assert not branches.marker.exists()


def test_no_other_branch_passes_for_the_default_one(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    git(code, "init", "-q", "-b", "main")
    (code / "microvm.toml").write_text('[ci.jobs.check]\nimage = "base"\nsteps = ["true"]\n')
    git(code, "add", ".")
    git(code, "commit", "-qm", "one")
    git(code, "branch", "bad")
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth=1", "--branch=bad", f"file://{code}", shallow)
    given = {"mode": "ci", "python": sys.executable, "cache": "false", "kvm": "false"}
    done = job(tmp_path / "job", tmp_path / "github", shallow, given, GITHUB_REF="refs/heads/bad")
    assert names(done, "failure") == ["Plan"]
    [error] = done.commands
    assert "which branch is the default one cannot be told" in error.data
    assert "fetch-depth: 0" in error.data
