"""``pytest-microvm github``: the steps of the GitHub Action."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_microvm.errors import MicroVMError, UsageError

_DESCRIPTION = """The steps of github-action/action.yml, in this order: plan, ready, run, keep, report. Each
gets the folder that the action made for this job, and tells GitHub's runner by its files what it found."""
_STEPS = {
    "plan": "check the action's inputs, and name the caches",
    "ready": "build the images that are missing, and try the accelerator",
    "run": "run the suite or the jobs, with nothing in their output that the runner obeys",
    "keep": "put the templates that are worth it where GitHub's cache takes them from",
    "report": "write the job's summary, annotations and outputs",
}


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("github", help="the steps of the GitHub Action", description=_DESCRIPTION)
    steps = parser.add_subparsers(metavar="STEP", required=True)
    for name, told in _STEPS.items():
        step = steps.add_parser(name, help=told, description=f"{told.capitalize()}.")
        step.add_argument("folder", metavar="FOLDER", type=Path, help="the action's folder")
        step.set_defaults(run=_run, step=name)


def _run(arguments: argparse.Namespace) -> int:
    from pytest_microvm.ci.github import steps as github_steps  # noqa: PLC0415 - only in a GitHub job
    from pytest_microvm.ci.github.commands import Annotation  # noqa: PLC0415 - the same

    try:
        getattr(github_steps, arguments.step)(arguments.folder.absolute())
    except MicroVMError as error:  # show it on the job's page, too
        print(Annotation("error", str(error), "pytest-microvm").command(), flush=True)
        return 4 if isinstance(error, UsageError) else 1
    return 0
