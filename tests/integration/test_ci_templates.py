"""The templates for Jenkins and Buildkite: their shell parts, run as these do, in a clone like theirs."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from junitparser import JUnitXml

from support.repositories import git

REPOSITORY = Path(__file__).resolve().parents[2]
DEFINITION = '[ci.jobs.check]\nimage = "base"\nsteps = ["sh check.sh"]\n'


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A repository whose branch says it is something else, and fails."""
    folder = tmp_path_factory.mktemp("origin")
    git(folder, "init", "-q", "-b", "main")
    (folder / "microvm.toml").write_text(DEFINITION)
    (folder / "check.sh").write_text("echo as $MICROVM_CI_BRANCH\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    git(folder, "checkout", "-q", "-b", "feature")
    (folder / "microvm.toml").write_text('[ci.jobs.other]\nimage = "base"\nsteps = ["true"]\n')
    (folder / "check.sh").write_text("echo as $MICROVM_CI_BRANCH; exit 3\n")
    git(folder, "commit", "-qam", "two")
    return folder


@pytest.fixture
def clone(origin, tmp_path):
    """What these systems check out: one branch, and its commit, not the branch itself."""

    def make(branch):
        folder = tmp_path / "clone"
        git(tmp_path, "clone", "-q", "--single-branch", f"--branch={branch}", f"file://{origin}", folder)
        git(folder, "checkout", "-q", "--detach")
        git(folder, "branch", "-D", branch)
        return folder

    return make


def run(script, folder, **variables):
    environment = {**os.environ, "PYTEST_MICROVM_TRUST": "1", **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["XDG_RUNTIME_DIR"] = str(folder.parent)
    return subprocess.run(
        ["/bin/sh", "-c", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip


def jenkins_script():
    text = (REPOSITORY / "ci" / "jenkins" / "Jenkinsfile").read_text()
    [script] = re.findall(r"script: '''\n(.*?)'''", text, re.DOTALL)
    return textwrap.dedent(script)


def buildkite_step():
    [step] = yaml.safe_load((REPOSITORY / "ci" / "buildkite" / "pipeline.yml").read_text())["steps"]
    return step


def test_jenkins_runs_the_default_branch(clone, host):
    host.images.get("base", progress=print)
    folder = clone("main")
    done = run(jenkins_script(), folder, DEFAULT_BRANCH="main", BRANCH_NAME="main")
    assert done.returncode == 0, done.stdout
    assert "as main\n" in (folder / "microvm-ci" / "main.check" / "log.txt").read_text()
    assert len(JUnitXml.fromfile(str(folder / "microvm-ci" / "junit.xml"))) == 1


def test_buildkite_runs_a_pull_request_under_no_branchs_name(clone, host):
    host.images.get("base", progress=print)
    folder = clone("feature")
    step = buildkite_step()
    done = run(
        step["command"], folder, BUILDKITE_PULL_REQUEST="7", BUILDKITE_BRANCH="main",
        BUILDKITE_PIPELINE_DEFAULT_BRANCH="main",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert step["retry"]["automatic"][0]["exit_status"] == 75
    [log] = folder.glob("microvm-ci/*/log.txt")
    assert log.parent.name == "HEAD.check"  # the default branch's job, not its own
    assert "as HEAD\n" in log.read_text()
    assert list(folder.glob(step["artifact_paths"][0]))
