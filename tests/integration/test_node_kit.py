"""The kit ``node``: npm and npx through the proxy, and a suite by Node's own runner, its JUnit back."""

import json
import os
import shutil
import subprocess

import pytest
from junitparser import JUnitXml

from support import guards
from support.commands import MICROVM
from support.repositories import git

DEFINITION = """
[ci.jobs.test]
image = "node"
steps = ["npm test"]
junit = ["report.xml"]
"""
PACKAGE = {
    "name": "sum",
    "version": "1.0.0",
    "scripts": {
        "test": "node --test --test-reporter=junit --test-reporter-destination=report.xml sum.test.js"
    },
}
SUITE = """
const test = require('node:test');
const assert = require('node:assert');

test('adds', () => assert.strictEqual(1 + 2, 3));
test('is not done yet', { skip: 'later' }, () => {});
test('the time zone', () => {
  process.env.TZ = 'Asia/Tokyo';
  assert.strictEqual(new Date('2025-03-01T12:00Z').getHours(), 21);
});
test('the language', () => assert.strictEqual(
  new Intl.DateTimeFormat('de', { month: 'long' }).format(new Date(2025, 2, 1)), 'März'));
"""


def test_a_suite_of_node_reports_junit(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    for name, text in (
        ("microvm.toml", DEFINITION),
        ("package.json", json.dumps(PACKAGE)),
        ("sum.test.js", SUITE),
    ):
        (folder / name).write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "first")
    command = [*MICROVM, "ci", "run", "-C", str(folder), "--output", str(tmp_path / "results")]
    environment = {**os.environ, "PYTEST_MICROVM_TRUST": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=guards.SUITE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = JUnitXml.fromfile(str(tmp_path / "results" / "junit.xml"))
    found = {case.name: [type(entry).__name__ for entry in case.result] for suite in report for case in suite}
    assert found == {"adds": [], "is not done yet": ["Skipped"], "the time zone": [], "the language": []}


@pytest.mark.thorough
@pytest.mark.skipif(not shutil.which("npm"), reason="needs npm on this computer, whose registry it may use")
def test_npm_and_npx_use_the_registry_of_this_computer(host):
    with host.start(image="node", network=["npm"], timeout=guards.MACHINE) as machine:
        machine.run(
            "mkdir /srv/app && cd /srv/app && npm init --yes && npm install left-pad@1.3.0", check=True
        )
        padded = machine.run(["node", "-p", "require('left-pad')('x', 3)"], cwd="/srv/app", check=True)
        assert padded.stdout == "  x\n"
        done = machine.run(
            ["npx", "--yes", "semver@7.6.3", "1.2.3", "-i", "minor"], cwd="/srv/app", check=True
        )
        assert done.stdout == "1.3.0\n"
        assert {each.allowed for each in machine.network.requests} == {True}
