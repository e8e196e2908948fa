"""A published package's history as branches, its own suite as the job: the same counts as natively."""

import json
import os
import subprocess
import sys
import tarfile

import pytest
from junitparser import JUnitXml

from support import guards
from support.commands import MICROVM
from support.repositories import git

VERSIONS = ("1.20.1", "1.20.2")
SUITE = "PYTHONPATH=. python3 -m pytest -q -p no:cacheprovider --junitxml=report.xml tests"
DEFINITION = f"""
[ci.jobs.suite]
image = "python"
timeout = "10m"
steps = ["{SUITE}"]
junit = ["report.xml"]
"""


@pytest.mark.thorough
def test_the_suite_of_each_version_counts_as_natively(tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    git(repository, "init", "--quiet", "--initial-branch=main")
    (repository / "microvm.toml").write_text(DEFINITION)
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", "jobs")
    native = {}
    for version in VERSIONS:
        source = published("parse", version, tmp_path)
        git(repository, "checkout", "--quiet", "--orphan", f"v{version}")
        git(repository, "rm", "-r", "--quiet", "--force", ".")
        subprocess.run(["cp", "-R", f"{source}/.", repository], check=True)
        git(repository, "add", "--all", "--force")
        git(repository, "commit", "--quiet", "-m", version)
        command = SUITE.replace("python3", sys.executable).replace("report.xml", f"{tmp_path}/{version}.xml")
        subprocess.run(["sh", "-c", command], cwd=repository, env=plain(), timeout=guards.SUITE, check=True)
        native[version] = JUnitXml.fromfile(str(tmp_path / f"{version}.xml"))
    git(repository, "checkout", "--quiet", "main")

    done = subprocess.run(
        [*MICROVM, "ci", "run", "--branch", "v*", "--output", str(tmp_path / "out")],
        cwd=repository, env=plain(), capture_output=True, text=True, timeout=guards.SUITE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for task in json.loads((tmp_path / "out/results.json").read_text())["tasks"]:
        theirs = native[task["branch"].removeprefix("v")]
        tests = task["tests"]
        assert (theirs.failures, theirs.errors) == (tests["failed"], tests["errors"]) == (0, 0)
        assert (theirs.tests, theirs.skipped) == (tests["passed"] + tests["skipped"], tests["skipped"])
        assert names(JUnitXml.fromfile(str(tmp_path / "out" / task["id"] / "junit.xml"))) == names(theirs)
        assert theirs.tests > 90


def published(package, version, folder):
    """Return the unpacked source distribution of a version."""
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*download, "-d", folder, f"{package}=={version}"], check=True, timeout=guards.SUITE)
    with tarfile.open(folder / f"{package}-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"{package}-{version}"


def plain():
    """Return the environment without what pytest-xdist and pytest tell those that they start.

    Python writes no compiled modules: they would become part of the branches.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1"}


def names(report):
    return sorted((case.classname, case.name) for suite in report for case in suite)
