"""``pytest-microvm trust``: grant a project's configuration its requests, per branch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_microvm.errors import UsageError
from pytest_microvm.git.checkout import OWN_REMOTE, CheckedOutRef, checked_out
from pytest_microvm.host.project_grants import asked_by, built_here, started_here
from pytest_microvm.settings import trust as project_trust
from pytest_microvm.settings.configuration import load_settings
from pytest_microvm.settings.trust import ANY_BRANCH, Grant
from pytest_microvm.untrusted.text import sanitize

_DESCRIPTION = """\
`pytest --microvm` gives a project's tests nothing beyond their own files unless you allow it. This shows what
the configuration in a folder asks for, and what it would start on this computer, and allows exactly that:
  - what pyproject.toml asks for now, and what tox's configuration reads and asks for, to the branch that is
    checked out;
  - what the jobs of `pytest-microvm ci run` ask for, to the branch that defines them: the default one.
If it asks for something else later, or if another branch is checked out, you are asked again. A pull request,
or a branch that follows another remote than origin, is not the branch of that name, however it is called.
Where whoever runs the tests answers for them, as in a CI job, PYTEST_MICROVM_TRUST=1 does it for one run.
"""
_EPILOG = """\
examples:
  pytest-microvm trust --show                    what is asked for, and what was allowed to which branch
  pytest-microvm trust                           allow it to the branch that is checked out
  pytest-microvm trust --branch 'feature/*'      allow it to branches by name, now and in future
  pytest-microvm trust --revoke                  allow nothing any more
"""


@dataclass(frozen=True)
class TrustRequest:
    """The requests of one part of a project.

    Args:
        part: ``configuration``, ``jobs`` or ``tox``.
        title: A readable name of the part.
        checkout: The checkout that it belongs to.
        asked: The requests, by key.
        notes: Readable lines about commands that would run on this computer.
    """

    part: str
    title: str
    checkout: CheckedOutRef
    asked: Mapping[str, Any]
    notes: Sequence[str] = ()

    def grant(self, branch: str | None) -> Grant:
        """Return a grant of the requests for branches that match ``branch``, or for their own branch."""
        remote = self.checkout.remote if self.checkout.remote != OWN_REMOTE else ""
        return Grant(self.part, self.checkout.name if branch is None else branch, remote, self.asked)


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "trust",
        help="allow a project the network, secrets and directories that its configuration asks for",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "project", nargs="?", type=Path, default=Path(), help="its folder (default: this one)"
    )
    parser.add_argument(
        "--branch",
        action="append",
        default=[],
        metavar="GLOB",
        help="branches to allow it for, such as 'feature/*' (default: the one that is checked out)",
    )
    parser.add_argument(
        "--any-branch",
        dest="branch",
        action="append_const",
        const=ANY_BRANCH,
        help="for every branch and commit, strangers' too",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--show", action="store_true", help="only show what it asks for, and which branches are allowed it"
    )
    how.add_argument(
        "--revoke", action="store_true", help="remove what is allowed, or that of --branch alone"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    project: Path = arguments.project.resolve()
    if arguments.revoke:
        done = project_trust.revoke(project, arguments.branch)
        print("nothing is allowed any more" if done else "nothing was allowed")
        return 0
    requests = list(_requests(project))
    if arguments.show:
        _show_granted(project)
    else:
        branches = arguments.branch or [None]
        project_trust.trust(project, [request.grant(each) for request in requests for each in branches])
    for request in (asking := [request for request in requests if request.asked]):
        _show(request, project)
    if not asking:
        print("it asks for nothing")
    return 0


def _show(request: TrustRequest, project: Path) -> None:
    """Print a part's requests, and the branches that they are granted to."""
    print(f"{sanitize(request.title)}, {sanitize(str(request.checkout))}, asks for")
    for line in (*project_trust.shown(request.asked), *request.notes):
        print(f"  {sanitize(line)}")
    allowed = [grant for grant in project_trust.granted(project) if grant.has(request.asked)]
    allowed = [grant for grant in allowed if grant.part == request.part]
    if not any(grant.is_for(request.checkout) for grant in allowed):
        print(f"not allowed for {sanitize(str(request.checkout))}")
    if allowed:
        print(f"allowed for {sanitize(', '.join(map(str, allowed)))}")


def _show_granted(project: Path) -> None:
    """Print all grants of a project."""
    for grant in project_trust.granted(project):
        print(f"{sanitize(str(project))}, {sanitize(str(grant))}, may have ({sanitize(grant.part)})")
        for line in project_trust.shown(grant.keys):
            print(f"  {sanitize(line)}")


def _requests(project: Path) -> Iterator[TrustRequest]:
    """Yield the requests of each part of a project; a part without requests has no keys."""
    checkout = checked_out(project)
    settings = load_settings(project, {})
    notes = [f"started on this computer, in /: {line}" for line in started_here(settings.spec, project)]
    notes += built_here(settings.spec.image, project)
    yield TrustRequest("configuration", str(project / "pyproject.toml"), checkout, asked_by(settings), notes)
    yield from _requests_of_tox(project)
    if (project / ".git").exists():
        yield from _requests_of_jobs(project)


def _requests_of_tox(project: Path) -> Iterator[TrustRequest]:
    """Yield the requests of a project's tox configuration, if it has one."""
    from pytest_microvm.tox.configuration import find  # noqa: PLC0415 - only for this command

    file = find(project)
    if file is not None:
        yield TrustRequest("tox", str(file.path), file.checkout, file.all_asked(), file.notes())


def _requests_of_jobs(project: Path) -> Iterator[TrustRequest]:
    """Yield the requests of the CI jobs that a repository defines, if it defines any.

    Raises:
        UsageError: The definition is invalid.
    """
    from pytest_microvm.ci.definition.parsing import NoJobs  # noqa: PLC0415 - only for this command
    from pytest_microvm.ci.running.run import check_commands_of, defined_by, trusted_project  # noqa: PLC0415
    from pytest_microvm.ci.sources.repository import CodeRepository, read_definition  # noqa: PLC0415

    repository = CodeRepository(project, bare=False)
    try:
        default = repository.default_branch
    except UsageError:  # for example no commit yet: `ci run` would find no jobs either
        return
    try:
        definition = read_definition(repository, default)
    except NoJobs:
        return
    check_commands_of(definition, project)
    specs = [job.all_grants for job in definition.jobs]
    found = dict.fromkeys(line for spec in specs for line in started_here(spec, project))
    notes = [f"started on this computer, in /: {line}" for line in found]
    with trusted_project(repository, default) as (kits, _bundles):
        images = {spec.image for spec in specs}
        notes += [line for each in images for line in built_here(each, kits)]
    checkout = defined_by(repository, definition)
    yield TrustRequest("jobs", f"jobs of {definition.where}", checkout, definition.asked, notes)
