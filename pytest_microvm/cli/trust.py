"""``pytest-microvm trust``: allow a project what its configuration asks for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_microvm import project_trust
from pytest_microvm.config import load_settings
from pytest_microvm.errors import UsageError
from pytest_microvm.project_grants import asked_by
from pytest_microvm.sanitize import sanitize


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "trust",
        help="allow a project the network, secrets and directories that its configuration asks for",
        description="`pytest --microvm` gives a project's tests nothing beyond their own files unless you "
        "allow it. This allows what the project's pyproject.toml asks for now; if it asks for something else "
        "later, you are asked again. So do the jobs of `pytest-microvm ci run`, as they are on the default "
        "branch. Where whoever runs the tests answers for them, as in a CI job, "
        "the variable PYTEST_MICROVM_TRUST=1 does the same.",
    )
    parser.add_argument(
        "project", nargs="?", type=Path, default=Path(), help="its folder (default: this one)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--show", action="store_true", help="only show what it asks for, and whether that is allowed"
    )
    how.add_argument("--revoke", action="store_true", help="allow it nothing any more")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    project: Path = arguments.project.resolve()
    if arguments.revoke:
        done = project_trust.revoke(project)
        print("nothing is allowed any more" if done else "nothing was allowed")
        return 0
    asked = {**asked_by(load_settings(project, {})), **_asked_by_jobs(project)}
    for line in project_trust.shown(asked):
        print(sanitize(line))
    if not asked:
        print("it asks for nothing")
    elif arguments.show:
        print("allowed" if project_trust.is_trusted(project, asked) else "not allowed")
    else:
        project_trust.trust(project, asked)
        print("allowed")
    return 0


def _asked_by_jobs(project: Path) -> Mapping[str, Any]:
    """Return what the CI jobs ask for that the project's repository defines, if it defines any.

    Raises:
        UsageError: The definition cannot be used.
    """
    from pytest_microvm.ci.definition.parsing import NoJobs  # noqa: PLC0415 - only for this command
    from pytest_microvm.ci.sources.repository import CodeRepository, read_definition  # noqa: PLC0415

    if not (project / ".git").exists():
        return {}
    repository = CodeRepository(project)
    try:
        default = repository.default_branch
    except UsageError:  # there is no commit yet, say: nothing that `ci run` would take jobs from
        return {}
    try:
        return read_definition(repository, default).asked
    except NoJobs:
        return {}
