"""Real git repositories for tests, made with a git that has no configuration of this computer."""

import io
import os
import shutil
import subprocess
import tarfile

TIME = "2026-01-02T03:04:05+00:00"


def run(folder, *arguments, **options):
    """Run git as a user would, with hooks, filters and all."""
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@x",
        "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@x", "GIT_AUTHOR_DATE": TIME,
        "GIT_COMMITTER_DATE": TIME,
    }  # fmt: skip
    command = ["git", "-c", "protocol.file.allow=always", "-C", folder, *arguments]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, **options)
    return done.stdout.decode(errors="surrogateescape").strip()


def repository(folder, *options):
    """Make a repository with the branch main."""
    folder.mkdir(parents=True)
    run(folder, "init", "-q", "-b", "main", "--template=", *options)
    return folder


def copied(made, folder):
    """Copy repositories that were made once for many tests: that is cheaper than git's processes.

    A clone among them has the copy as its origin.
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
    run(folder, "add", "-A")
    run(folder, "commit", "-qm", message, "--allow-empty")
    return run(folder, "rev-parse", "HEAD")


def raw_tree(folder, *entries):
    """Write a tree object as it is: (mode, name, object); git would refuse some of them."""
    data = b"".join(b"%s %s\0%s" % (mode, name, bytes.fromhex(which)) for mode, name, which in entries)
    return run(folder, "hash-object", "-t", "tree", "-w", "--literally", "--stdin", input=data)


def blob(folder, content):
    return run(folder, "hash-object", "-w", "--stdin", input=content)


def commit_tree(folder, tree):
    return run(folder, "commit-tree", "-m", "made", tree)


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
