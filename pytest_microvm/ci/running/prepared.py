"""Where prepared templates are found: what the default branch made is everybody's, the rest is one's own.

A template's content is what its commands made of their inputs, the network's answers included. A branch that
could write where another reads could give it anything, so a branch writes into a namespace of its own and
reads from there and from the default branch's (as GitHub's and GitLab's caches do). A branch whose inputs are
the default branch's, byte for byte, has no say in what comes of them: its template is the default branch's.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from pytest_microvm.agent.transfer import send_tar
from pytest_microvm.ci.definition.job import WORKSPACE
from pytest_microvm.ci.definition.task import Source, Task
from pytest_microvm.ci.running.executor import Sources, Work
from pytest_microvm.ci.sources.tree import Tree
from pytest_microvm.errors import UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.host.preparing import machine_in_the_making, prepared_step
from pytest_microvm.machine.instance import Instance
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.templates.chain import Base, Step
from pytest_microvm.templates.store import Template

Run = Callable[[MicroVM, str], tuple[int, str]]

_WARM = """\
command -v python3 && python3 -c 'import pytest' && cd "$(mktemp -d)" || exit 0
echo 'def test(): assert True' > test_it.py
python3 -m pytest -q --junitxml=it.xml -p no:cacheprovider
rm -r "$PWD"
"""
_WARM_TIMEOUT = 120.0


def prepared_template(host: Host, base: Base, task: Task, work: Work, run: Run) -> Template:
    """Return what a task's machine is a copy of, made if it is missing.

    Args:
        host: Where.
        base: What the task's machines are made from.
        task: The task.
        work: The run.
        run: Runs one command of ``prepare``.

    Raises:
        MachineError: A command of ``prepare`` failed.
        UsageError: An input is not in the commit.
    """
    if not task.job.prepare:
        return host.template(base, [_warm_step(host, base)])
    tree = work.sources.tree(task.source)
    digest = tree.digest(task.job.prepare_inputs)

    def steps(branch: str) -> list[Step]:
        prepared = _step(host, base, task, tree, inputs=(digest, work.repository, branch), run=run)
        return [prepared, _warm_step(host, base)]

    found = host.cached(base, steps(work.default_branch))
    return found or host.template(base, steps(task.prepared_as or task.source.branch))


def with_owner(task: Task, sources: Sources, default: Source) -> Task:
    """Return the task with the branch whose its prepared template is.

    Args:
        task: The task.
        sources: The files.
        default: The default branch, as it is now.
    """
    wanted = task.job.prepare_inputs
    try:
        same = sources.tree(task.source).digest(wanted) == sources.tree(default).digest(wanted)
    except UsageError:  # one of them does not have them; its own attempt will tell
        same = False
    return replace(task, prepared_as=default.branch if same else task.source.branch)


def _warm_step(host: Host, base: Base) -> Step:
    """Return the link in which pytest runs once, if there is one: its files are in memory from then on.

    Reading and unpacking them is two thirds of what a job's first pytest takes.
    """

    def work(instance: Instance) -> dict[str, bytes]:
        machine = machine_in_the_making(host, base, instance)
        with suppress(subprocess.TimeoutExpired):
            machine.run(["/bin/sh", "-c", _WARM], timeout=_WARM_TIMEOUT)
        instance.take_away()
        return {}

    return Step("warm", (_WARM,), work, "running pytest once")


def _step(host: Host, base: Base, task: Task, tree: Tree, *, inputs: tuple[str, ...], run: Run) -> Step:
    job = task.job

    def put(machine: MicroVM) -> None:
        machine.path(WORKSPACE).mkdir(parents=True, exist_ok=True)
        send_tar(machine.client.link(), WORKSPACE, lambda archive: tree.fill(archive, job.prepare_inputs))

    return prepared_step(
        host,
        base,
        job.prepare,
        folder=WORKSPACE,
        put=put,
        inputs=("ci", *inputs, repr(job.env), repr(job.matrix), *job.prepare_network),
        grants=host.grants(MachineSpec(network=job.prepare_network, hosts=job.spec.hosts), base.image),
        run=run,
    )
