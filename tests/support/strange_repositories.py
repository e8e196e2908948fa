"""Repositories that a stranger has prepared: git obeys them where it finds them."""

import shutil

from support.repositories import blob, commit, git, repository

THEIRS = '[ci.jobs.theirs]\nsteps = ["true"]\nimage = "python"\n'
"""Jobs that the repository in a folder of a clone defines."""


def embed(folder, program, outside):
    """Make of ``folder`` a bare repository that git finds, with an index and a configuration of its own.

    Its index names the file ``link/secret.txt`` behind a link that leads out, and a ``.gitignore`` that is
    not here: git reads that from its objects, and fetches it by ``program`` if it is missing.

    Args:
        folder: It is made; all of it can be committed.
        program: What git runs.
        outside: Where the link leads.
    """
    made = repository(folder.parent / "made")
    commit(made, {".gitignore": "*.log\n", "microvm.toml": THEIRS, "a": "a"})
    missing = git(made, "rev-parse", "HEAD:.gitignore")
    git(made, "update-index", "--skip-worktree", ".gitignore")
    git(made, "update-index", "--add", "--cacheinfo", f"100644,{blob(made, b'x')},link/secret.txt")
    (made / ".git" / "objects" / missing[:2] / missing[2:]).unlink()
    git(made, "config", "core.bare", "false")
    git(made, "config", "core.worktree", ".")
    set_promisor(made, program)
    git(made, "config", "remote.more.url", "https://attacker.example/x.git")
    shutil.copytree(made / ".git", folder)
    (folder / "link").symlink_to(outside)
    shutil.rmtree(made)


def set_promisor(folder, program):
    """Configure a remote that is a program, from which git fetches what is missing."""
    for key, value in {
        "remote.origin.url": f"ext::{program}", "protocol.ext.allow": "always", "protocol.allow": "always",
        "remote.origin.promisor": "true", "remote.origin.partialclonefilter": "blob:none",
        "extensions.partialClone": "origin", "core.repositoryformatversion": "1",
    }.items():  # fmt: skip
        git(folder, "config", key, value)


def clone_with_embedded(folder, program, files):
    """Make an ordinary clone in ``folder / "clone"`` in whose folder sub a repository was committed.

    Args:
        folder: Where it is made; ``outside/secret.txt`` is beside it.
        program: What git runs that finds the one in sub.
        files: More files that are committed, by name.
    """
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    theirs = repository(folder / "theirs")
    commit(theirs, {".gitignore": "*.log\n", "a": "a"})
    embed(theirs / "sub", program, outside)
    for name, text in files.items():
        (theirs / name).write_text(text)
    git(theirs, "add", "-f", "-A")
    git(theirs, "commit", "-qm", "sub")
    git(folder, "clone", "-q", "--template=", str(theirs), "clone")
    git(folder / "clone", "remote", "set-url", "origin", "https://ours.example/x.git")
    return folder / "clone"
