"""Share prepared templates safely: branches read their own and the default branch's, and write their own.

A template's content is the result of its commands and their inputs, including responses from the network. A
branch that could write where another reads could plant anything there, so each branch writes into its own
namespace and reads from that and the default branch's (as in GitHub's and GitLab's caches). A branch whose
inputs equal the default branch's, byte for byte, cannot influence the result: it uses that branch's template.
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
from pytest_microvm.host.preparing import prepared_step
from pytest_microvm.host.starting import machine_in_the_making
from pytest_microvm.machine.instance import Instance
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.templates.chain import Base, TemplateStep
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
    """Return the template that a task's machine is cloned from; make it if it is missing.

    Args:
        host: The host.
        base: The base of the task's machines.
        task: The task.
        work: The data that all tasks share.
        run: Runs one command of ``prepare``.

    Raises:
        MachineError: A command of ``prepare`` failed.
        UsageError: An input is not in the commit.
    """
    if not task.job.prepare:
        return host.template(base, [_warm_step(base)])
    tree = work.sources.tree(task.source)
    digest = tree.digest(task.job.prepare_inputs)

    def steps(branch: str) -> list[TemplateStep]:
        prepared = _step(host, base, task, tree, inputs=(digest, work.repository, branch), run=run)
        return [prepared, _warm_step(base)]

    found = host.cached(base, steps(work.default_branch))
    return found or host.template(base, steps(task.prepared_as or task.source.branch))


def with_owner(task: Task, sources: Sources, default: Source) -> Task:
    """Return the task with its template's owner branch set.

    Args:
        task: The task.
        sources: Provides the files.
        default: The default branch in its current state.
    """
    wanted = task.job.prepare_inputs
    try:
        same = sources.tree(task.source).digest(wanted) == sources.tree(default).digest(wanted)
    except UsageError:  # one branch lacks an input; its own attempt will report that
        same = False
    return replace(task, prepared_as=default.branch if same else task.source.branch)


def _warm_step(base: Base) -> TemplateStep:
    """Return a template step that runs pytest once, if it is installed, so that its files are in memory.

    Reading and unpacking these files takes two thirds of the time of a job's first pytest run.
    """

    def work(instance: Instance) -> dict[str, bytes]:
        machine = machine_in_the_making(base, instance)
        with suppress(subprocess.TimeoutExpired):
            machine.run(["/bin/sh", "-c", _WARM], timeout=_WARM_TIMEOUT)
        instance.take_away()
        return {}

    return TemplateStep("warm", (_WARM,), work, "running pytest once")


def _step(
    host: Host, base: Base, task: Task, tree: Tree, *, inputs: tuple[str, ...], run: Run
) -> TemplateStep:
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
