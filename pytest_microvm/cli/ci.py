"""``pytest-microvm ci``: build and test each branch in its own machines."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.errors import UsageError
from pytest_microvm.settings.options import BY_NAME
from pytest_microvm.settings.spec import format_size
from pytest_microvm.untrusted.text import sanitize, sanitize_line

if TYPE_CHECKING:
    from pytest_microvm.ci.definition.task import Plan
    from pytest_microvm.ci.running.executor import Executor, Work
    from pytest_microvm.host.host import Host

EXIT_INTERRUPTED = 130
_OUTPUT = Path("microvm-ci")
_OF_A_CLUSTER = 64  # tasks submitted at a time; the scheduler decides which of them run

_DESCRIPTION = """\
Build and test branches, each job of each branch in a machine of its own. Jobs are defined in pyproject.toml
([tool.pytest-microvm.ci.jobs.NAME]) or microvm.toml, as they are on the default branch: a branch cannot
change what it may do. Nothing of a branch is checked out or run on this computer.
"""
_EPILOG = """\
Without --branch, --ref, --worktree or --changed-since it is the commit that is checked out.

exit status:
  0   all jobs succeeded            75   nothing failed, but a machine never did its work (infra)
  1   a job failed                  2, 4 bad input           130  interrupted

examples:
  pytest-microvm ci run --branch '*' --jobs 4          every branch, four machines at a time
  pytest-microvm ci run --changed-since main --dry-run what would be run
  pytest-microvm ci run --worktree --definition-from worktree   what lies here, not committed yet
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb ``ci`` and its own verbs."""
    from pytest_microvm.cli import ci_history, ci_worker  # noqa: PLC0415 - only for the command

    parser = verbs.add_parser("ci", help="build and test branches, each job in a machine of its own")
    own = parser.add_subparsers(metavar="VERB", required=True)
    run = own.add_parser(
        "run",
        help="run the jobs of branches",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = run.add_argument_group("what is run")
    what.add_argument(
        "--branch", action="append", default=[], metavar="GLOB", help="branches by name, such as 'feature/*'"
    )
    what.add_argument("--ref", action="append", default=[], help="a ref or commit, such as refs/pull/7/head")
    what.add_argument("--worktree", action="store_true", help="the work tree, with what is not committed")
    what.add_argument("--changed-since", metavar="REF", help="branches that are not part of REF yet")
    what.add_argument(
        "--job",
        action="append",
        default=[],
        metavar="NAME",
        help="only this job and the jobs that it needs (default: all)",
    )
    what.add_argument(
        "--definition-from",
        metavar="REF",
        help="where the jobs are defined: a ref you trust, or worktree (default: the default branch)",
    )
    how = run.add_argument_group("how")
    how.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="machines at the same time (default: one per core; on a cluster 64)",
    )
    how.add_argument("--fail-fast", action="store_true", help="end the run with the first failure")
    how.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    how.add_argument("--require-accel", **BY_NAME["require_accel"].arguments())
    how.add_argument("--locked", **BY_NAME["locked"].arguments())
    how.add_argument(
        "--output", type=Path, default=_OUTPUT, metavar="DIR",
        help="where the results go (default: microvm-ci); an earlier run's are replaced",
    )  # fmt: skip
    how.add_argument(
        "--junit-profile", default="generic", metavar="NAME",
        help="consumer of the JUnit files: generic, github, gitlab, jenkins or buildkite",
    )  # fmt: skip
    how.add_argument("--plain", action="store_true", help="print lines instead of a live table")
    how.add_argument("-C", dest="repository", type=Path, metavar="DIR", help="the repository")
    ci_worker.add_cluster_options(run.add_argument_group("where"))
    run.set_defaults(run=_run)
    schema = own.add_parser("schema", help="print the JSON Schema of the definition, for editors")
    schema.set_defaults(run=_schema)
    ci_history.add_parsers(own)
    ci_worker.add_parser(own)


def _schema(_arguments: argparse.Namespace) -> int:
    from pytest_microvm.ci.definition.schema import definition_schema  # noqa: PLC0415

    print(json.dumps(definition_schema(), indent=1))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console  # noqa: PLC0415 - only for the command

    from pytest_microvm.ci.results.history import History  # noqa: PLC0415
    from pytest_microvm.ci.running import run as running  # noqa: PLC0415
    from pytest_microvm.ci.running.live import live_watcher  # noqa: PLC0415
    from pytest_microvm.ci.sources.repository import CodeRepository  # noqa: PLC0415
    from pytest_microvm.host.host import Host  # noqa: PLC0415
    from pytest_microvm.reports.profiles import profile_named  # noqa: PLC0415

    named = arguments.repository is not None
    repository = CodeRepository(arguments.repository if named else Path(), bare=named)
    selection = running.Selection(
        arguments.branch, arguments.ref, arguments.worktree, arguments.changed_since, arguments.job,
        arguments.definition_from,
    )  # fmt: skip
    plan, definition = running.select(repository, selection)
    if arguments.dry_run:
        _show(plan)
        return 0
    profile_named(arguments.junit_profile, "--junit-profile")
    running.check_trust(repository, definition)
    if not plan.tasks:
        print("there is nothing to do: no job is for what was asked for", file=sys.stderr)
        return 0
    slots = _slots(arguments.jobs, cluster=arguments.scheduler is not None)
    console = Console(stderr=False)
    plain = arguments.plain or not console.is_terminal or os.environ.get("CI") == "true"
    with running.trusted_project(repository, arguments.definition_from) as (project, bundles):
        sources = running.RepositorySources(repository, bundles)
        plan = running.ready(plan, repository, sources, project)
        output = _emptied(arguments.output, named=arguments.output != _OUTPUT)
        with live_watcher(console, plain=plain, jobs=slots) as watcher:
            work = running.new_work(repository, output, watcher, sources)
            host = Host(
                project=project,
                checkout=repository.folder,
                require_accel=arguments.require_accel,
                lock="require" if arguments.locked else "follow",
                retries=0,  # the schedule retries, and reports it
                say=lambda line: console.print(sanitize_line(line), markup=False, highlight=False),
            )
            if arguments.locked:
                running.check_locked(plan, host)
            executor = _executor(arguments, host, work, slots, project)
            try:
                run = running.run_plan(
                    plan, executor, running.Outputs(work, arguments.junit_profile), History(host.cache),
                    repository=repository.folder, fail_fast=arguments.fail_fast,
                )  # fmt: skip
            finally:
                executor.close()
                host.close()
    for note in sources.notes():
        print(f"note: {note}")
    print(f"results: {output / 'summary.html'}, junit.xml, results.json in {output}")
    return EXIT_INTERRUPTED if run.interrupted else run.exit_code


def _executor(arguments: argparse.Namespace, host: Host, work: Work, slots: int, project: Path) -> Executor:
    """Return the executor that the options select."""
    from pytest_microvm.ci.running.local import LocalExecutor  # noqa: PLC0415
    from pytest_microvm.cli import ci_worker  # noqa: PLC0415

    if arguments.executor == "local":
        return LocalExecutor(host, work, slots)
    ci_worker.require_dask()
    from pytest_microvm.ci.cluster.executor import DaskExecutor  # noqa: PLC0415

    return DaskExecutor(
        host, work, slots, scheduler=arguments.scheduler, certificates=ci_worker.certificates(arguments),
        project=project, require_accel=arguments.require_accel,
    )  # fmt: skip


def _show(plan: Plan) -> None:
    """Print a plan."""
    print(f"jobs as defined in {sanitize_line(plan.definition)}")
    for task in plan.tasks:
        job, source = task.job, task.source
        needs = f", after {', '.join(task.needs)}" if task.needs else ""
        print(f"{sanitize_line(task.title)} ({source.commit[:12]}): {task.id}{needs}")
        made_of = [f"image {job.spec.image}"]
        made_of += [f"memory {format_size(job.spec.memory)}"] if job.spec.memory else []
        made_of += [f"network {', '.join(job.spec.network)}"] if job.spec.network else []
        spec = job.spec_for(source.branch, default=source.default)
        made_of += [f"secret {secret.name}" for secret in spec.secrets]
        made_of += [f"credential for {one.host}" for one in spec.credentials]
        steps = f"{len(job.steps)} step{'s' * (len(job.steps) != 1)}"
        print(f"    {', '.join(made_of)}; {steps} within {job.timeout:g} s")
        for step in job.steps:
            print("\n".join(f"    $ {line}" for line in sanitize(step.run).splitlines()))


def _slots(wanted: int | None, *, cluster: bool) -> int:
    if wanted is not None and wanted < 1:
        raise UsageError(
            f"invalid --jobs: expected 1 or more machines, got {wanted}",
            resolution="leave it out: one per core",
        )
    return wanted or (_OF_A_CLUSTER if cluster else os.cpu_count() or 2)


def _emptied(output: Path, *, named: bool) -> Path:
    """Create the output folder, or empty it if an earlier run created it.

    Args:
        output: The folder.
        named: Whether the user named it; if not, a link at its path may come from the project.

    Raises:
        UsageError: The folder has other content, or cannot be written.
    """
    output = output.absolute()
    if output.is_symlink() and not named:
        raise UsageError(
            f"{output} is a link, and the results would go where it leads",
            resolution="remove it, or name the folder with --output",
        )
    try:
        if output.exists() and any(output.iterdir()):
            if not (output / _MARK).is_file():
                raise UsageError(
                    f"--output: {output} is not empty, and not an earlier run's",
                    resolution="name an empty folder",
                )
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / _MARK).write_text("an output folder of `pytest-microvm ci run`: the next run empties it\n")
        (output / ".gitignore").write_text("*\n")
    except OSError as error:
        raise UsageError(f"--output: {output} cannot be used: {error.strerror}") from error
    return output


_MARK = ".microvm-ci"
