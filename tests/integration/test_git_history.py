"""Suites in real machines that ask git for their version (``--microvm-git``)."""

import subprocess

import pytest

from support import guards
from support.commands import PYTEST
from support.repositories import commit, git, repository

SUITE = """
import subprocess
from pathlib import Path

def ask(*words):
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

def test_version(request):
    expected = request.config.getini("expected")
    assert ask("describe", "--tags", "--dirty", "--long", "--match", "*[0-9]*") == expected
    assert Path("/opt/version").read_text() == expected + "\\n"
    assert ask("status", "--porcelain") == ""
    assert ask("diff-index", "HEAD") == ""
    assert not Path(".git/hooks").exists()
    assert not ask("remote")

def test_work_tree():
    Path("new").write_text("new")
    assert ask("status", "--porcelain") == "?? new"
    ask("add", "new")
    ask("-c", "user.name=x", "-c", "user.email=x@example.com", "commit", "-qm", "in a machine")
    assert ask("log", "--format=%s").splitlines()[0] == "in a machine"
"""

PREPARE = """
[tool.pytest-microvm]
prepare = ["git describe --tags --long > /opt/version", 'test -z "$(git status --porcelain)"']
prepare_inputs = [".git"]
"""


@pytest.fixture
def project(tmp_path):
    folder = repository(tmp_path / "project")
    git(folder, "remote", "add", "origin", "https://user:hunter2@example.invalid/x")
    commit(
        folder,
        {
            "test_it.py": SUITE,
            "conftest.py": "def pytest_addoption(parser):\n    parser.addini('expected', '')\n",
            "pyproject.toml": PREPARE,
            "pytest.ini": "[pytest]\n",
            ".gitignore": "__pycache__\n.pytest_cache\n",
        },
    )
    git(folder, "tag", "v1.0")
    commit(folder, {"data": "1"})
    return folder


def run(folder, *options):
    expected = git(folder, "describe", "--tags", "--dirty", "--long", "--match", "*[0-9]*")
    return subprocess.run(
        [*PYTEST, "--microvm", "-o", f"expected={expected}", *options],
        cwd=folder, capture_output=True, text=True, check=False, timeout=guards.SUITE,
    )  # fmt: skip


def test_suite_asks_git_and_new_commit_is_a_new_version(project):
    done = run(project, "--microvm-git", "--microvm-image=agent")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    git(project, "commit", "-qm", "nothing changed", "--allow-empty")
    done = run(project, "--microvm-git", "--microvm-image=agent", "-k", "version")
    assert done.returncode == 0, done.stdout + done.stderr
    assert git(project, "log", "--format=%s", "--all").splitlines()[0] == "nothing changed"


def test_image_without_git_is_an_error(project):
    (project / "pyproject.toml").unlink()
    done = run(project, "--microvm-git", "--microvm-image=python")
    assert done.returncode == 4
    assert "image python has no git" in done.stdout + done.stderr
    assert "take the image agent" in done.stdout + done.stderr
