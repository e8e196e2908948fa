"""Six branches of strangers and the default one: one command, a verdict each, the host untouched."""

import json
import os
import subprocess

from junitparser import JUnitXml

from support import guards
from support.branches import SUITES, TESTS, VERDICTS, Branches
from support.commands import MICROVM
from support.repositories import git


def test_every_branch_has_its_verdict_and_the_host_is_untouched(tmp_path):
    branches = Branches(tmp_path)
    git_before = git(branches.folder, "for-each-ref"), git(branches.folder, "status", "--porcelain")
    config = (branches.folder / ".git/config").read_text()
    (branches.folder / ".git/config").write_text(
        config
        + "".join(
            f'[{section} "attack"]\n\t{key} = touch {branches.marker}; cat\n'
            for section, key in (("filter", "smudge"), ("filter", "clean"), ("diff", "textconv"))
        )
    )  # what a branch's .gitattributes would need; a plain checkout of it runs it
    done = subprocess.run(
        [*MICROVM, "ci", "run", "--branch", "*", "--output", str(tmp_path / "out")],
        cwd=branches.folder, env={**os.environ, "CI": "true"}, capture_output=True, timeout=guards.SUITE,
        check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1, said.decode()
    results = json.loads((tmp_path / "out/results.json").read_text())
    tasks = {task["branch"]: task for task in results["tasks"]}
    assert {branch: task["verdict"] for branch, task in tasks.items()} == VERDICTS
    assert "timeout" in tasks["hanging"]["reason"]
    assert "memory" in tasks["hungry"]["reason"]
    assert "collector.example:443" in tasks["exfiltrating"]["denied"][0]

    # Every test is in the merged report, with what came of it.
    suites = {suite.name: suite for suite in JUnitXml.fromfile(str(tmp_path / "out/junit.xml"))}
    assert set(suites) == SUITES
    for branch, (passed, failed) in TESTS.items():
        tests = tasks[branch]["tests"]
        assert (tests["passed"], tests["failed"], tests["errors"]) == (passed, failed, 0)
        own = [case for case in suites[f"{branch} / test"] if case.name != "job"]
        assert (len(own), sum(case.is_failure for case in own)) == (passed + failed, failed)
    for branch, verdict in VERDICTS.items():
        [suite] = [suite for name, suite in suites.items() if name.startswith(f"{branch} /")]
        assert (suite.failures + suite.errors > 0) == (verdict != "passed"), branch

    # Nothing of a branch has run here, or can make somebody's terminal or CI system do anything.
    assert not branches.marker.exists()
    assert (git(branches.folder, "for-each-ref"), git(branches.folder, "status", "--porcelain")) == git_before
    written = [said, *(path.read_bytes() for path in (tmp_path / "out").rglob("*") if is_ours(path))]
    for content in written:
        assert b"\x1b]0;" not in content
        assert not any(line.lstrip().startswith(b"::") for line in content.splitlines())
        assert b"##[" not in content
        assert b"root:" not in content  # of /etc/shadow
    assert b"forged" in said  # it was tried
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()] == []
    git(branches.folder, "checkout", "--quiet", "attacking")  # the marker would have been there
    assert branches.marker.exists()


def is_ours(path):
    return path.is_file() and "junit" not in path.parts and "artifacts" not in path.parts
