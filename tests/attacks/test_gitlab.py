"""Hostile branches and jobs through the stages of GitLab's custom executor, in real machines."""

from types import SimpleNamespace

import pytest

from support import guards
from support.attacks import Listener
from support.gitlab import GitlabRunner, Job, served
from support.hostile_branches import (
    HostileBranch,
    HostileRepository,
    acting,
    attacks_on,
    names_tested_by,
    users_environment,
)

OPERATOR = 'image = "agent"\n[images]\noffered = "agent"\n[machine]\nmemory = "256M"\n'


@pytest.fixture(scope="module")
def gitlab(request, tmp_path_factory):
    """A runner, a server that has the branches of all attacks, and the attacks by name."""
    folder = tmp_path_factory.mktemp("gitlab")
    repository = HostileRepository(folder / "repository")
    (folder / "runner").mkdir()
    names = names_tested_by(request.session, test_job_is_harmless)
    with Listener() as listener:
        attacks = {name: HostileBranch(name, folder / name, listener) for name in sorted(names)}
        for attack in attacks.values():
            repository.add(attack)
        with served(repository.folder, folder / "served") as server:
            config = folder / "gitlab.toml"
            config.write_text(OPERATOR + server.machine)
            runner = GitlabRunner(config, folder / "runner", users_environment(listener))
            yield SimpleNamespace(runner=runner, url=server.url, attacks=attacks, listener=listener)
        listener.shutdown()


@pytest.mark.parametrize("name", attacks_on("gitlab", "passed", "failed", "refused"))
def test_job_is_harmless(gitlab, name):
    attack = gitlab.attacks[name]
    wanted = attack.about["gitlab"]
    variables = {key: attack.filled(value) for key, value in wanted.get("variables", {}).items()}
    job = Job(
        ["sh step.sh"], variables=variables, image=attack.filled(wanted.get("image", "")),
        repository=gitlab.url, ref=attack.branch if attack.has_branch else "main", timeout=guards.SUITE,
    )  # fmt: skip
    verdict = gitlab.runner.run(job)
    assert verdict.status == ("success" if wanted["outcome"] == "passed" else "failed"), verdict.log
    assert ("build_script" in verdict.names) == (wanted["outcome"] != "refused")
    assert wanted.get("said", "") in verdict.log
    assert acting(verdict.log) == []
    assert attack.sprung(gitlab.listener) == [], verdict.log
