"""Hand a repository to a machine as a clone; the machine's commits come back as a branch.

The host sends the objects reachable from HEAD, in a clone without remotes, hooks or the user's
configuration. The machine returns one bundle. In the host's repository only objects and one branch are
added; work tree, index and HEAD are not touched, and nothing is checked out.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_microvm.agent.transfer import send_tar
from pytest_microvm.agent.users import GuestUser, give
from pytest_microvm.errors import TransferError, UsageError
from pytest_microvm.git.bundle import BadBundle, borrowing, import_commits
from pytest_microvm.git.commands import GitError, git
from pytest_microvm.git.heads import head_branch, head_commit, set_head
from pytest_microvm.git.repository import (
    Repository,
    checkout_at,
    find_checkout,
    repository_at,
    with_own_objects,
)
from pytest_microvm.mounts.copying import receive
from pytest_microvm.settings.mounts import Changes, Mount
from pytest_microvm.untrusted.manifest import Handover
from pytest_microvm.untrusted.nofollow import open_folder
from pytest_microvm.untrusted.text import sanitize

if TYPE_CHECKING:
    from pytest_microvm.mounts.machine import Machine

_OBJECT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LENT = "refs/heads/lent"
_MAX_BRANCHES = 100
_MAX_UNCOMMITTED = 10**6
_MAX_SAID = 2000  # characters of the error output of the machine's git


class Clone:
    """A mount that is a clone of a repository.

    Args:
        machine: The machine.
        mount: Source, target and access; the source is the top of a working tree, or a bare repository.

    Raises:
        UsageError: The source is no repository, or has no commit.
        HostError: git is missing on the host.
    """

    single = False

    def __init__(self, machine: Machine, mount: Mount) -> None:
        self._machine = machine
        self._mount = mount
        self._source = mount.source.resolve()
        self._repository = _repository(self._source)
        self._base = self._tip = _head(self._source, self._repository)
        if mount.access == "rw":
            self._check_name()
        self._branch: str | None = None  # the last branch created here, at ``_tip``
        self._last = Changes()
        self._user: str | None = None  # the one who runs git in the machine: the clone's owner

    def hand_over(self, owner: GuestUser | None) -> None:
        """Clone the repository into the machine and check out its branch there.

        Args:
            owner: To whom it belongs there; ``None``: root.

        Raises:
            UsageError: The machine has no git.
            TransferError: The machine could not store or check out the clone.
        """
        if self._machine.run("command -v git").returncode:
            raise UsageError(
                f"image {self._machine.facts.image} has no git",
                resolution="take the image agent, or a kit with the package git",
            )
        with tempfile.TemporaryDirectory(prefix="microvm-clone-") as folder:
            clone = Path(folder).resolve() / "clone"
            self._make_clone(clone)
            root = open_folder(clone)
            try:
                handed = Handover()
                send_tar(
                    self._machine.client.link(),
                    self._mount.target,
                    lambda archive: handed.write(archive, root),
                )
            finally:
                os.close(root)
        if owner is not None:
            give(self._machine.client, self._mount.target, owner)
            self._user = owner.numbers
        self._guest_git("reset", "--hard", "--quiet")

    def bring_back(self) -> Changes:
        """Import the machine's commits; see :meth:`pytest_microvm.mounts.mounting.Mounted.copy_back`."""
        tip = self._guest_git("rev-parse", "--verify", "HEAD^{commit}").strip()
        if not _OBJECT.fullmatch(tip):
            raise self._refused("its git names no commit")
        uncommitted = self._uncommitted()
        if tip in (self._base, self._tip) or self._handed_over(tip):
            return replace(self._last, uncommitted=uncommitted)
        with tempfile.TemporaryDirectory(prefix="microvm-bundle-") as folder:
            bundle = Path(folder) / "bundle"
            self._fetch_bundle(bundle)
            try:
                new = import_commits(bundle, self._repository, self._base, tip, Path(folder) / "looking")
            except BadBundle as error:
                raise self._refused(error.brief, error.details) from error
        branch = self._named(tip)
        subjects = tuple(map(self._machine.client.redactor.text, new.subjects))
        self._last = Changes(branch=branch, commits=new.count, subjects=subjects, uncommitted=uncommitted)
        return self._last

    # Into the machine

    def _make_clone(self, clone: Path) -> None:
        """Clone only the objects reachable from HEAD.

        They are fetched from a repository of our own that borrows the objects: git, at the remote end of a
        fetch, obeys the configuration of the repository that it reads.
        """
        git("init", "--quiet", "--template=", f"--object-format={self._repository.format}", clone)
        made = Repository(clone / ".git", self._repository.format, own=True)
        shallow = ["--update-shallow"] if (self._repository.directory / "shallow").exists() else []
        lender = borrowing(self._repository, clone.parent / "lender")
        lender.git("update-ref", _LENT, self._base)
        git(
            "--git-dir", made.directory, "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", *shallow,
            lender.directory, f"{_LENT}:refs/handed/over", local=True,
        )  # fmt: skip
        set_head(made, head_branch(self._repository), self._base)
        made.git("update-ref", "-d", "refs/handed/over")
        made.git("config", "user.name", f"microvm {self._machine.client.id}")
        made.git("config", "user.email", f"{self._machine.client.id}@microvm.invalid")

    # Out of the machine

    def _uncommitted(self) -> int:
        """Return the number of uncommitted changes that the machine reports."""
        script = 'git -C "$1" status --porcelain | wc -l'
        command = ["/bin/sh", "-c", script, "sh", str(self._mount.target)]
        done = self._machine.run(command, user=self._user)
        said = done.stdout.strip()
        return min(int(said), _MAX_UNCOMMITTED) if re.fullmatch(r"[0-9]{1,9}", said, re.ASCII) else 0

    def _fetch_bundle(self, bundle: Path) -> None:
        place = self._mount.target / ".git" / "microvm.bundle"
        self._guest_git("bundle", "create", "--quiet", str(place), "HEAD", f"^{self._base}")
        try:
            receive(self._machine, self._machine.path(place), bundle)
        except (OSError, TransferError) as error:
            raise self._refused("its bundle cannot be read", str(error)) from error
        self._machine.run(["rm", "-rf", str(place)], user=self._user)

    def _named(self, tip: str) -> str:
        """Create a branch for ``tip``, or fast-forward the one created before; return its name."""
        if self._branch and self._moved(self._branch, tip):
            return self._branch
        for number in range(1, _MAX_BRANCHES):
            branch = f"microvm/{self._machine.client.id}" + (f"-{number}" if number > 1 else "")
            if self._repository.git("for-each-ref", "--format=%(refname)", f"refs/heads/{branch}").strip():
                continue
            try:  # zeros: the branch must not exist
                self._update(branch, tip, "0" * len(tip))
            except GitError as error:
                raise self._refused(f"branch {branch} cannot be made", error.details) from error
            self._branch, self._tip = branch, tip
            return branch
        raise self._refused(f"there are {_MAX_BRANCHES} branches of this machine already")

    def _moved(self, branch: str, tip: str) -> bool:
        """Fast-forward a branch to ``tip`` if it is unchanged since the last import; return True if moved."""
        try:
            self._repository.git("merge-base", "--is-ancestor", self._tip, tip)
            self._update(branch, tip, self._tip)
        except GitError:
            return False
        self._tip = tip
        return True

    def _update(self, branch: str, new: str, old: str) -> None:
        self._repository.git(
            "update-ref", "--no-deref", "-m", "microvm: copied back", f"refs/heads/{branch}", new, old
        )

    def _check_name(self) -> None:
        """Reject a repository that cannot hold branches ``microvm/*``, before the machine does any work.

        Raises:
            UsageError: The repository has a branch named ``microvm``.
        """
        names = self._repository.git("for-each-ref", "--format=%(refname)", "refs/heads/microvm")
        if names == "refs/heads/microvm\n":
            raise UsageError(
                f"{self._source} has a branch microvm, so that there can be none that begins with microvm/",
                resolution="rename that branch, or hand the repository over with ro",
            )

    def _handed_over(self, commit: str) -> bool:
        """Return True if the machine got this commit from the host: its HEAD went back in history."""
        try:
            self._repository.git("merge-base", "--is-ancestor", commit, self._base)
        except GitError:
            return False
        return True

    def _guest_git(self, *arguments: str) -> str:
        """Run git in the machine as the clone's owner and return its output, which is untrusted.

        Not as root: that git would refuse the owner's repository, or run its hooks with root's rights.
        """
        done = self._machine.run(["git", "-C", str(self._mount.target), *arguments], user=self._user)
        if done.returncode:
            raise self._refused(f"its git {arguments[0]} failed", sanitize(done.stderr, _MAX_SAID))
        return str(done.stdout)

    def _refused(self, why: str, details: str = "") -> TransferError:
        return TransferError(
            f"{self._mount.target} of machine {self._machine.client.id}: {why}",
            details=details,
            resolution="the host's repository has no new branch; look into the machine's",
        )


def _repository(source: Path) -> Repository:
    """Return the repository at ``source``, the top of a working tree or a bare repository.

    Raises:
        UsageError: ``source`` is neither.
    """
    if not source.is_dir():
        raise UsageError(f"{source} is no directory", resolution="check the path of the mount")
    checkout = checkout_at(source)
    repository = checkout.repository if checkout else repository_at(source)
    if repository is None:
        if find_checkout(source):
            raise UsageError(
                f"{source} is within a repository", resolution="hand over the directory at its top"
            )
        raise UsageError(f"{source} is no git repository", resolution="mount it as copy")
    return with_own_objects(repository)


def _head(source: Path, repository: Repository) -> str:
    """Return the ID of the commit that is checked out.

    Raises:
        UsageError: The repository has no commit.
    """
    try:
        return head_commit(repository)
    except GitError as error:
        raise UsageError(
            f"{source} has no commit yet", details=error.details, resolution="commit something first"
        ) from error
