"""Branches of strangers under tox: each has its verdict, and this computer is untouched."""

import os
import subprocess
import sys

import pytest

from support import guards
from support.branches import VERDICTS, Branches, one_by_one
from support.repositories import git

TOX_INI = """
[tox]
no_package = true

[testenv:tests]
base_python = python3.13
allowlist_externals = /usr/bin/python3
microvm_timeout = {timeout}
microvm_memory = 256M
commands = /usr/bin/python3 -m pytest -q -p no:hypothesispytest
"""


@pytest.fixture(scope="module")
def branches(tmp_path_factory):
    return Branches(tmp_path_factory.mktemp("tox"))


@pytest.mark.parametrize("branch", one_by_one())
def test_a_branch_has_its_verdict(branches, branch, tmp_path):
    tree = tmp_path / "tree"
    git(branches.folder, "worktree", "add", "--quiet", "--detach", str(tree), branch)
    config = tmp_path / "tox.ini"  # not the branch's: what tox is to do is not for it to say
    config.write_text(TOX_INI.format(timeout=15 if branch == "hanging" else 900))
    command = [sys.executable, "-m", "tox", "run", "-c", str(config), "--root", str(tree), "--microvm"]
    done = subprocess.run(
        [*command, "-e", "tests"], cwd=tree, env={**os.environ, "NO_COLOR": "1"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=guards.SUITE, check=False,
    )  # fmt: skip
    said = done.stdout.decode(errors="replace")
    assert (done.returncode == 0) == (VERDICTS[branch] == "passed"), said
    if branch == "hanging":
        assert "timeout" in said
    if branch == "hungry":
        assert "memory" in said
    if branch == "attacking":
        assert "forged" in said
    assert not branches.marker.exists()
