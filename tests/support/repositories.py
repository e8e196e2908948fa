"""Real git repositories, made by a git that uses no configuration of this computer."""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile

TIME = "2026-01-02T03:04:05+00:00"
"""The author and committer date of every commit."""

_FIXED = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "somebody", "GIT_AUTHOR_EMAIL": "somebody@example.com", "GIT_AUTHOR_DATE": TIME,
    "GIT_COMMITTER_NAME": "somebody", "GIT_COMMITTER_EMAIL": "somebody@example.com",
    "GIT_COMMITTER_DATE": TIME,
}  # fmt: skip


def git(folder, *arguments, config=os.devnull, **options):
    """Run git in a folder as its user would, with the repository's own hooks, filters and configuration.

    It is hermetic: the system's and the user's configuration and the environment are left out, and the
    identity and the date of commits are fixed.

    Args:
        folder: Where git runs, and its home directory.
        arguments: The command line after ``git``.
        config: The file that takes the place of the user's configuration (``git config --global``).
        options: For :func:`subprocess.run`; ``input`` is bytes.

    Returns:
        What git wrote to stdout, without white space at its ends.

    Raises:
        RuntimeError: git failed; the message has what it wrote to stderr.
    """
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_GLOBAL": str(config), **_FIXED
    }  # fmt: skip
    # Submodules may come from folders of this computer: without the setting git refuses them.
    command = ["git", "-c", "protocol.file.allow=always", "-C", folder, *arguments]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, **options)
    if done.returncode:
        words = " ".join(map(str, arguments))
        stderr = done.stderr.decode(errors="replace")
        raise RuntimeError(f"git {words} failed (exit {done.returncode}): {stderr}")
    return done.stdout.decode(errors="surrogateescape").strip()


def repository(folder, *options):
    """Make a folder that is a repository with the branch main, without commits; return the folder."""
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main", "--template=", *options)
    return folder


def copied(made, folder):
    """Copy repositories that were made once for many tests: that is cheaper than git's processes.

    A clone among them has the copy as its origin.

    Args:
        made: The folder that holds them.
        folder: The folder that gets the copies.
    """
    shutil.copytree(made, folder, symlinks=True, dirs_exist_ok=True)
    for config in folder.glob("*/.git/config"):
        config.write_text(config.read_text().replace(str(made), str(folder)))


def commit(folder, files, message="more"):
    """Write files, by name, and commit them with everything else; return the commit."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message, "--allow-empty")
    return git(folder, "rev-parse", "HEAD")


def raw_tree(folder, *entries):
    """Write a tree object as it is: (mode, name, object); git would refuse some of them."""
    data = b"".join(b"%s %s\0%s" % (mode, name, bytes.fromhex(which)) for mode, name, which in entries)
    return git(folder, "hash-object", "-t", "tree", "-w", "--literally", "--stdin", input=data)


def blob(folder, content):
    """Write an object with ``content``, in bytes; return its name."""
    return git(folder, "hash-object", "-w", "--stdin", input=content)


def commit_tree(folder, tree):
    """Write a commit of a tree, without parents; return its name."""
    return git(folder, "commit-tree", "-m", "made", tree)


def filled(tree, paths=None):
    """Return what a tree writes into an archive: contents by path, and the members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        tree.fill(archive, paths)
    stream.seek(0)
    with tarfile.open(fileobj=stream) as archive:
        members = archive.getmembers()
        contents = {
            member.name: archive.extractfile(member).read() if member.isfile() else member.linkname
            for member in members
            if not member.isdir()
        }
    return contents, members


def lfs_pointer(content):
    """Return the name of a large file's object (Git LFS), and the pointer that stands for it."""
    name = hashlib.sha256(content).hexdigest()
    return name, f"version https://git-lfs.github.com/spec/v1\noid sha256:{name}\nsize {len(content)}\n"


def store_lfs_object(folder, name, content):
    """Put a large file where git-lfs keeps it in a repository; return its path."""
    place = folder / ".git" / "lfs" / "objects" / name[:2] / name[2:4] / name
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    return place
