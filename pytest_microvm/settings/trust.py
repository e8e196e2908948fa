"""Whether a project may ask for what reaches beyond it: network, secrets, credentials, directories.

``pytest --microvm`` runs suites that nobody read, and a branch brings its own pyproject.toml. What that asks
for is given only if this user has said so for exactly these words (as direnv and mise do), and for the branch
that is checked out. Whoever runs the tests on this computer anyway, as with the ``microvm`` fixture, is not
asked.
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
from pytest_microvm.git.checkout import OWN_REMOTE, Checkout, checked_out, matches
from pytest_microvm.settings import options

VARIABLE = "PYTEST_MICROVM_TRUST"
"""``1`` where whoever starts the run answers for the project, such as a CI job on branches of its own."""

GRANTS = ("image", "prepare_network", *(option.name for option in options.GRANTS))
"""The keys of the configuration that need it; an image does if its kit is the project's own."""

ANY_BRANCH = "any branch"
"""In place of a glob: every branch, commit and pull request, strangers' too. No branch can be called that."""

_FORMAT = 2  # before there were branches, a note had digests of keys alone
_SHOWN = 5  # branches that an error names


@dataclass(frozen=True)
class Grant:
    """What a user allowed: keys with their values, to a branch.

    Args:
        part: What asked: ``configuration``, ``jobs`` or ``tox``.
        branch: A glob of names as :class:`Checkout` has them, as in ``branches`` of a CI definition.
        remote: The remote that the branch may follow besides ``origin``.
        keys: What was asked for, by key, as written.
    """

    part: str
    branch: str
    remote: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)

    def is_for(self, checkout: Checkout) -> bool:
        """Whether it counts for what is checked out.

        A branch that follows another remote is somebody else's, whatever it is called here; and no glob of
        branches is for a commit or a pull request.
        """
        if self.branch == ANY_BRANCH:
            return True
        if checkout.remote not in ("", OWN_REMOTE, self.remote):
            return False
        if checkout.is_branch or self.branch.startswith("refs/"):
            return matches(checkout.name, [self.branch])
        return self.branch == checkout.name

    def has(self, asked: Mapping[str, Any]) -> bool:
        """Whether all that is asked for was allowed, with these values."""
        return all(key in self.keys and self.keys[key] == _plain(value) for key, value in asked.items())

    def __str__(self) -> str:
        return self.branch if self.branch == ANY_BRANCH else str(Checkout(self.branch, self.remote))


def check(project: Path, asked: Mapping[str, Any], checkout: Checkout | None = None) -> None:
    """Refuse what a project asks for if nobody has allowed it.

    Args:
        project: Its folder.
        asked: What its configuration asks for, by key, as written; what the command line says instead is not
            among it.
        checkout: Whose configuration it is; ``None``: that of what is checked out in the folder.

    Raises:
        UsageError: Nobody has.
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
    """Return what is asked for, a line for each key."""
    return [f"{key} = {json.dumps(value, default=str)}" for key, value in sorted(asked.items())]


def notes(project: Path, asked: Mapping[str, Any]) -> list[str]:
    """Return what may surprise whoever is refused: to whom the same was allowed, and an old note."""
    others = [str(grant) for grant in granted(project) if grant.has(asked)]
    if others:
        return [f"it is allowed for {', '.join(others[:_SHOWN])}"]
    if _is_old(_read(project)):
        return ["what an earlier version was told does not count any more: it was for all branches"]
    return []


def is_trusted(project: Path, asked: Mapping[str, Any], checkout: Checkout) -> bool:
    """Whether this user has allowed exactly that, or all of it and more keys, for what is checked out."""
    return any(grant.is_for(checkout) and grant.has(asked) for grant in granted(project))


def granted(project: Path) -> list[Grant]:
    """Return what was allowed to a project, the newest last; a note that cannot be read allows nothing."""
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
    """Remember what this user allows a project; a change of it will be asked about.

    Args:
        project: Its folder.
        grants: Each takes the place of what the same part was allowed for the same branch; one without keys
            takes that away.

    Raises:
        UsageError: It cannot be written down.
    """
    new = {(grant.part, grant.branch): grant for grant in grants}
    kept = [grant for grant in granted(project) if (grant.part, grant.branch) not in new]
    left = [*kept, *(grant for grant in new.values() if grant.keys)]
    if left:
        _write(project, left)
    else:
        revoke(project)


def revoke(project: Path, branches: Sequence[str] = ()) -> bool:
    """Forget what was allowed, for some globs of branches or for all; return whether anything was."""
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
    """Return a value as it comes back from a note."""
    return json.loads(json.dumps(value, default=str))
