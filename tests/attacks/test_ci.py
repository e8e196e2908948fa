"""Hostile branches, archives and definitions through `pytest-microvm ci run`, on this computer and a cluster.

One run has the jobs of all branches, in real machines; each test looks at what came of one. The controls are
plain git, a shell, or another reader of the same file.
"""

import subprocess

import pytest

from support import guards
from support.attacks import ATTACKS, Listener
from support.commands import MICROVM
from support.hostile_branches import (
    HostileBranch,
    HostileRepository,
    about_attack,
    acting,
    attacks_on,
    controlled,
    names_tested_by,
    run_over,
    suite_of,
    unprotected,
    users_environment,
)

ENTRIES = ("ci", "dask", "gitlab")


@pytest.fixture
def listener():
    with Listener() as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
    names = names_tested_by(request.session, test_branch_on_this_computer)
    with run_over("ci", names, tmp_path_factory.mktemp("ci"), "--worktree") as done:
        yield done


@pytest.fixture(scope="module")
def cluster_run(request, tmp_path_factory):
    names = names_tested_by(request.session, test_branch_on_a_cluster)
    options = ("--executor", "dask", "--jobs", "2")
    with run_over("dask", names, tmp_path_factory.mktemp("dask"), *options) as done:
        yield done


@pytest.mark.parametrize("name", attacks_on("ci", "passed", "failed"))
def test_branch_on_this_computer(run, name):
    run.check(name)


def test_run_shows_nothing_that_acts(run):
    assert run.returncode in (0, 1), run.said
    assert acting(run.said) == []
    assert run.unchanged


def test_honest_branch_is_untouched(run):
    for name in ("main", "worktree"):
        task = run.tasks[name]
        assert (task["verdict"], task["tests"]["passed"], task["tests"]["failed"]) == ("passed", 1, 0)
    [case] = run.suites["main / test"]
    assert (case.name, case.result) == ("test_add", [])
    assert set(run.suites) == {suite_of(branch) for branch in run.tasks}


@pytest.mark.parametrize("name", attacks_on("dask", "passed", "failed"))
def test_branch_on_a_cluster(cluster_run, name):
    cluster_run.check(name)
    assert acting(cluster_run.said) == []
    assert {task["worker"] for task in cluster_run.tasks.values()} == {"0", "1"}


@pytest.fixture
def attack(name, tmp_path, listener):
    return HostileBranch(name, tmp_path / "project", listener)


def make_repository(attack):
    """Make the repository of an attack in its own folder, as its work tree, with its branch checked out."""
    if not attack.ci.get("unpacked"):
        repository = HostileRepository(attack.path)
        repository.add(attack)
        repository.check_out(attack.branch if attack.has_branch else "main")
        repository.arm(attack)


@pytest.mark.parametrize("name", attacks_on("ci", "refused"))
def test_refused(attack, tmp_path, listener):
    make_repository(attack)
    words = [attack.filled(word) for word in attack.ci.get("words", [])]
    done = subprocess.run(
        [*MICROVM, "ci", "run", *words, "--output", tmp_path / "out"], cwd=attack.path,
        env=users_environment(listener, PYTEST_MICROVM_TRUST="0"), capture_output=True, check=False,
        timeout=guards.MACHINE,
    )  # fmt: skip
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 4, said
    assert attack.ci["said"] in said
    assert acting(said) == []
    assert not (tmp_path / "out").exists()
    assert attack.sprung(listener) == [], said


@pytest.mark.thorough  # what the attacks do does not change with this package
@pytest.mark.parametrize(("entry", "name"), controlled("ci", "gitlab"))
def test_unprotected(attack, entry, listener):
    """The control: the same springs, or shows what acts."""
    make_repository(attack)
    wanted = attack.about[entry]
    said = unprotected(attack, attack.path, attack.filled(wanted["control"]), listener)
    shown = "unsaid" in wanted and wanted["unsaid"] in said
    assert attack.sprung(listener) or acting(said) or shown, said


def test_every_attack_has_a_control_or_says_that_it_has_none():
    tables = {
        name: [about[entry] for entry in ENTRIES if entry in (about := about_attack(name))]
        for name in ATTACKS
    }
    without = [
        name
        for name, told in tables.items()
        if told and not any("control" in table or table.get("native") is False for table in told)
    ]
    assert without == []
