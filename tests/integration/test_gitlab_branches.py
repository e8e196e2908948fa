"""Branches of strangers as GitLab jobs: each has its verdict, and the runner's computer is untouched."""

import pytest

from support import guards
from support.branches import Branches, one_by_one
from support.gitlab import GitlabRunner, Job, served

HANGING = 15  # seconds
STATUSES = {"good": "success", "hanging": "timeout"}


@pytest.fixture(scope="module")
def gitlab(tmp_path_factory):
    """A runner, the repository's URL, and the marker that only code on this computer could make."""
    folder = tmp_path_factory.mktemp("gitlab")
    branches = Branches(folder)
    (folder / "served").mkdir()
    with served(branches.folder, folder / "served") as server:
        config = folder / "gitlab.toml"
        config.write_text(f'image = "agent"\n[machine]\nmemory = "256M"\n{server.machine}')
        (folder / "runner").mkdir()
        yield GitlabRunner(config, folder / "runner"), server.url, branches.marker


@pytest.mark.parametrize("branch", one_by_one())
def test_a_branch_has_its_verdict(gitlab, branch):
    runner, url, marker = gitlab
    timeout = HANGING if branch == "hanging" else guards.SUITE
    script = ["python3 -m pytest -q -p no:hypothesispytest --junitxml=out/junit.xml"]
    verdict = runner.run(Job(script, repository=url, ref=branch, timeout=timeout))
    assert verdict.status == STATUSES.get(branch, "failed"), verdict.log
    assert "\x1b]0;" not in verdict.log
    if branch == "exfiltrating":
        assert "denied CONNECT collector.example:443" in verdict.log
    if branch == "hungry":
        assert "memory" in verdict.log
    if branch == "attacking":
        assert "forged" in verdict.log
    assert not marker.exists()
