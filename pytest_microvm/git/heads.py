"""What is checked out in a repository: read it, and check it out in a repository that this process made."""

from __future__ import annotations

from pytest_microvm.git.commands import GitError
from pytest_microvm.git.repository import Repository


def head_commit(repository: Repository) -> str:
    """Return the id of the commit that is checked out.

    Raises:
        GitError: The repository has no commit.
    """
    return repository.git("rev-parse", "--verify", "HEAD^{commit}").strip()


def head_branch(repository: Repository) -> str | None:
    """Return the branch that is checked out, such as ``refs/heads/main``; ``None`` if HEAD is detached."""
    try:
        return repository.git("symbolic-ref", "--quiet", "HEAD").strip() or None
    except GitError:
        return None


def set_head(made: Repository, branch: str | None, commit: str) -> None:
    """Check out a commit of a new repository, as a branch if there is one; the work tree is left alone.

    Args:
        made: The repository, which has the commit.
        branch: The branch, such as ``refs/heads/main``; ``None``: HEAD is detached.
        commit: The commit's id; empty: the branch has no commit yet.
    """
    unlogged = ("-c", "core.logAllRefUpdates=false")  # a reflog names this computer and its user
    if branch and commit:
        made.git(*unlogged, "update-ref", branch, commit)
    if branch:
        made.git(*unlogged, "symbolic-ref", "HEAD", branch)
    elif commit:
        made.git(*unlogged, "update-ref", "--no-deref", "HEAD", commit)
