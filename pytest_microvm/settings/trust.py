"""User trust in a project's configuration, which may ask for network, secrets, credentials, directories.

``pytest --microvm`` runs suites that no one has reviewed, and a branch brings its own pyproject.toml. Its
grants take effect only if this user has allowed exactly these words (as with direnv and mise) for the branch
that is checked out. Tests that run on this computer anyway, as with the ``microvm`` fixture, need no trust.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from pytest_microvm.errors import UsageError
from pytest_microvm.git.checkout import OWN_REMOTE, CheckedOutRef, checked_out, matches
from pytest_microvm.settings import options

VARIABLE = "PYTEST_MICROVM_TRUST"
"""``1`` if the user who starts the run vouches for the project, such as a CI job on its own branches."""

_OTHERS = ("image", "nested", "prepare_network", "write_back", "keep_tmp", "git", "debug_port")
GRANTS = (*_OTHERS, *(option.name for option in options.GRANTS))
"""The configuration keys that need trust; an image needs it if its kit is the project's own."""

ANY_BRANCH = "any branch"
"""In place of a glob: every branch, commit and pull request, also of strangers. Not a valid branch name."""

_FORMAT = 2  # records without a format hold digests of keys only, and predate branches
_SHOWN = 5  # branches listed in an error


@dataclass(frozen=True)
class Grant:
    """A user's permission: keys with their values, allowed for a branch.

    Args:
        part: The part of the project that asked: ``configuration``, ``jobs`` or ``tox``.
        branch: A glob of :class:`CheckedOutRef` names, as in ``branches`` of a CI definition.
        remote: The remote that the branch may follow besides ``origin``.
        keys: The allowed values, by key, as written.
    """

    part: str
    branch: str
    remote: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)

    def is_for(self, checkout: CheckedOutRef) -> bool:
        """Return True if the grant applies to ``checkout``.

        A branch that follows another remote belongs to someone else, whatever its local name; and a glob of
        branches never applies to a commit or a pull request.
        """
        if self.branch == ANY_BRANCH:
            return True
        if checkout.remote not in ("", OWN_REMOTE, self.remote):
            return False
        if checkout.is_branch or self.branch.startswith("refs/"):
            return matches(checkout.name, [self.branch])
        return self.branch == checkout.name

    def has(self, asked: Mapping[str, Any]) -> bool:
        """Return True if the grant allows every key in ``asked`` with exactly its value."""
        return all(key in self.keys and self.keys[key] == _plain(value) for key, value in asked.items())

    def __str__(self) -> str:
        return self.branch if self.branch == ANY_BRANCH else str(CheckedOutRef(self.branch, self.remote))


def check(project: Path, asked: Mapping[str, Any], checkout: CheckedOutRef | None = None) -> None:
    """Check that the user has allowed everything a project asks for.

    Args:
        project: Its folder.
        asked: The keys that its configuration asks for, as written, without those that the command line
            overrides.
        checkout: The checkout that the configuration belongs to; ``None``: the one in the folder.

    Raises:
        UsageError: The user has not allowed it.
    """
    asked = {key: value for key, value in asked.items() if value}
    if not asked or os.environ.get(VARIABLE) == "1":
        return
    checkout = checkout or checked_out(project)
    if is_trusted(project, asked, checkout):
        return
    raise UsageError(
        f"the configuration of {project} asks for more than its own files, and nobody has allowed that "
        f"for {checkout}",
        details="\n".join([*shown(asked), *notes(project, asked)]),
        resolution="if you trust it, say `pytest-microvm trust`; else give what it may have on the command "
        "line, such as --microvm-network pip, in place of the configuration's",
    )


def shown(asked: Mapping[str, Any]) -> list[str]:
    """Format the requested keys and values, one line per key."""
    return [f"{key} = {json.dumps(value, default=str)}" for key, value in sorted(asked.items())]


def notes(project: Path, asked: Mapping[str, Any]) -> list[str]:
    """Return hints for a refused user: other branches with the same grant, or an outdated trust record."""
    others = [str(grant) for grant in granted(project) if grant.has(asked)]
    if others:
        return [f"it is allowed for {', '.join(others[:_SHOWN])}"]
    if _is_old(_read(project)):
        return ["what an earlier version was told does not count any more: it was for all branches"]
    return []


def is_trusted(project: Path, asked: Mapping[str, Any], checkout: CheckedOutRef) -> bool:
    """Return True if one grant of this user covers all of ``asked``, or more, for ``checkout``."""
    return any(grant.is_for(checkout) and grant.has(asked) for grant in granted(project))


def granted(project: Path) -> list[Grant]:
    """Return a project's grants, the newest last; an unreadable trust record allows nothing."""
    note = _read(project)
    if not isinstance(note, dict) or note.get("format") != _FORMAT:
        return []
    try:
        return [
            Grant(str(each["part"]), str(each["branch"]), str(each["remote"]), dict(each["keys"]))
            for each in note["grants"]
        ]
    except (KeyError, TypeError, ValueError):
        return []


def trust(project: Path, grants: Iterable[Grant]) -> None:
    """Store this user's grants for a project; changed values will need trust again.

    Args:
        project: Its folder.
        grants: Each replaces the stored grant of the same part and branch; one without keys removes it.

    Raises:
        UsageError: The trust record cannot be written.
    """
    new = {(grant.part, grant.branch): grant for grant in grants}
    kept = [grant for grant in granted(project) if (grant.part, grant.branch) not in new]
    left = [*kept, *(grant for grant in new.values() if grant.keys)]
    if left:
        _write(project, left)
    else:
        revoke(project)


def revoke(project: Path, branches: Sequence[str] = ()) -> bool:
    """Remove a project's grants, for some globs of branches or for all; return whether any existed."""
    grants, note = granted(project), _file(project)
    kept = [grant for grant in grants if branches and grant.branch not in branches]
    if kept:
        _write(project, kept)
        return len(kept) < len(grants)
    try:
        note.unlink()
    except FileNotFoundError:
        return False
    return True


def _write(project: Path, grants: Sequence[Grant]) -> None:
    file = _file(project)
    note = {
        "format": _FORMAT,
        "project": str(project.resolve()),
        "grants": [{**asdict(grant), "keys": _plain(grant.keys)} for grant in grants],
    }
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft.write_text(json.dumps(note), encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error


def _read(project: Path) -> object:
    try:
        return json.loads(_file(project).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_old(note: object) -> bool:
    return isinstance(note, dict) and "format" not in note and "project" in note


def _file(project: Path) -> Path:
    name = hashlib.sha256(os.fsencode(project.resolve())).hexdigest()[:32]
    return platformdirs.user_state_path("pytest-microvm") / "trusted" / f"{name}.json"


def _plain(value: object) -> Any:
    """Return a value as it is read back from a trust record."""
    return json.loads(json.dumps(value, default=str))
