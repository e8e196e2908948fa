"""Bundles from a machine: attacks, all of them, until git's own checks have let them through."""

import hashlib
import os
import zlib
from pathlib import Path, PurePosixPath

import pytest

from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.git.bundle import BadBundle, Repository, import_commits
from pytest_microvm.git.commands import _MAX_OUTPUT, GitError, git
from pytest_microvm.mounts.git_clone import Clone
from pytest_microvm.settings.mounts import Mount
from support.repositories import copied
from support.repositories import git as user_git


def commit(folder, name, text, message="more"):
    (folder / name).write_text(text)
    user_git(folder, "add", name)
    user_git(folder, "commit", "-qm", message)
    return user_git(folder, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The user's repository, with work that is not committed, and the machine's clone of it."""
    place = tmp_path_factory.mktemp("made")
    folder = place / "host"
    folder.mkdir()
    user_git(folder, "init", "-q", "-b", "main", "--template=")
    commit(folder, "a", "a\n", "first")
    (folder / "a").write_text("not committed\n")
    user_git(place, "clone", "-q", "--template=", str(folder), "guest")
    return place


@pytest.fixture
def host(made, tmp_path):
    copied(made, tmp_path)
    return tmp_path / "host"


@pytest.fixture
def guest(host):
    return host.parent / "guest"


def bundle_of(guest, base, name="HEAD"):
    user_git(guest, "bundle", "create", "-q", "../bundle", name, f"^{base}")
    return guest.parent / "bundle"


def imported(host, bundle, base, tip):
    repository = Repository(host / ".git", "sha1")
    return import_commits(bundle, repository, base, tip, host.parent / "looking")


def state(folder):
    """Everything in a directory and all references, but objects."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "objects" not in path.relative_to(folder).parts
    }
    return found, user_git(folder, "for-each-ref")


def test_commits_come_over_and_nothing_else_changes(host, guest):
    base = user_git(host, "rev-parse", "HEAD")
    commit(guest, "b", "b\n", "second")
    tip = commit(guest, "c", "c\n", "third \x1b[2J ::error::x")
    before = state(host)
    new = imported(host, bundle_of(guest, base), base, tip)
    assert new.count == 2
    assert new.subjects == ("third \\x1b[2J ::error::x", "second")
    assert state(host) == before
    assert user_git(host, "show", f"{tip}:c") == "c"
    user_git(host, "fsck", "--strict")


def test_a_subject_of_any_length(host, guest):
    base = user_git(host, "rev-parse", "HEAD")
    (guest / "message").write_text("x" * (3 * _MAX_OUTPUT))
    (guest / "b").write_text("b")
    user_git(guest, "add", "b")
    user_git(guest, "commit", "-qF", "message")
    tip = user_git(guest, "rev-parse", "HEAD")
    assert [len(line) for line in imported(host, bundle_of(guest, base), base, tip).subjects] == [120]


def refused(host, bundle, base, tip, match):
    before, objects = state(host), sorted((host / ".git" / "objects").rglob("*"))
    with pytest.raises(BadBundle, match=match):
        imported(host, bundle, base, tip)
    assert state(host) == before
    assert sorted((host / ".git" / "objects").rglob("*")) == objects


@pytest.mark.parametrize("data", [b"", b"PACK", b"# v2 git bundle\n", b"#!/bin/sh\n\nPACK", b"\0" * 100_000])
def test_what_is_no_bundle(host, data):
    base = user_git(host, "rev-parse", "HEAD")
    (host.parent / "bundle").write_bytes(data)
    refused(host, host.parent / "bundle", base, "1" * 40, "no bundle")


def test_a_file_without_end(host):
    """Of what never ends, a little is read."""
    refused(host, Path("/dev/zero"), user_git(host, "rev-parse", "HEAD"), "1" * 40, "no bundle")


@pytest.mark.parametrize(
    "line",
    [
        b"%s refs/heads/main", b"%s ../../x", b"%s HEAD\n%s refs/heads/x", b"%s refs/heads/../../../x",
        b"@filter=blob:none\n%s HEAD", b"%s HEAD ", b" %s HEAD", b"%s\tHEAD", b"",
    ],
)  # fmt: skip
def test_references_that_were_not_asked_for(host, guest, line):
    base = user_git(host, "rev-parse", "HEAD")
    tip = commit(guest, "b", "b\n")
    pack = bundle_of(guest, base).read_bytes().partition(b"\n\n")[2]
    (host.parent / "bundle").write_bytes(
        b"# v2 git bundle\n-%s x\n%s\n\n" % (base.encode(), line.replace(b"%s", tip.encode())) + pack
    )
    refused(host, host.parent / "bundle", base, tip, "other references|no bundle")


def test_another_commit_than_it_said(host, guest):
    base = user_git(host, "rev-parse", "HEAD")
    commit(guest, "b", "b\n")
    refused(host, bundle_of(guest, base), base, base, "other references")


def test_a_commit_that_is_not_in_it(host, guest):
    base = user_git(host, "rev-parse", "HEAD")
    tip = commit(guest, "b", "b\n")
    bundle = bundle_of(guest, base)
    bundle.write_bytes(bundle.read_bytes().replace(tip.encode(), b"1" * 40))
    refused(host, bundle, base, "1" * 40, "git does not accept")


def test_commits_whose_parents_are_not_in_it(host, guest):
    base = user_git(host, "rev-parse", "HEAD")
    middle = commit(guest, "b", "b\n")
    tip = commit(guest, "c", "c\n")
    refused(host, bundle_of(guest, middle), base, tip, "git does not accept")


@pytest.mark.parametrize("where", ["middle", "end"])
def test_a_damaged_pack(host, guest, where):
    base = user_git(host, "rev-parse", "HEAD")
    tip = commit(guest, "b", "b\n" * 1000)
    data = bytearray(bundle_of(guest, base).read_bytes())
    if where == "middle":
        data[len(data) // 2 + 40] ^= 0xFF
    else:
        del data[-30:]
    (host.parent / "bundle").write_bytes(data)
    refused(host, host.parent / "bundle", base, tip, "git does not accept")


def test_a_tree_is_no_commit(host, guest):
    base = user_git(host, "rev-parse", "HEAD")
    commit(guest, "b", "b\n")
    tree = user_git(guest, "rev-parse", "HEAD^{tree}")
    user_git(guest, "update-ref", "refs/x", tree)
    bundle = bundle_of(guest, base, "refs/x")
    bundle.write_bytes(bundle.read_bytes().replace(b"refs/x", b"HEAD"))
    refused(host, bundle, base, tree, "git does not accept")


def loose(guest, kind, body):
    """Write an object that git itself would not make."""
    data = b"%s %d\0" % (kind, len(body)) + body
    name = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    path = guest / ".git" / "objects" / name[:2] / name[2:]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(zlib.compress(data))
    return name


def tree_of(*entries):
    return b"".join(b"%s %s\0%s" % (mode, name, bytes.fromhex(object_)) for mode, name, object_ in entries)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (b".git", b"40000"), (b"..", b"40000"), (b".", b"40000"), (b"a/b", b"100644"), (b".GIT", b"40000"),
        (b".gitmodules", b"120000"), (b"git~1", b"40000"), (b".g\xe2\x80\x8cit", b"40000"),
    ],
)  # fmt: skip
def test_trees_with_paths_that_escape_are_refused(host, guest, name, mode):
    base = user_git(host, "rev-parse", "HEAD")
    blob = loose(guest, b"blob", b"[core]\n\tfsmonitor = touch /tmp/owned\n")
    inner = loose(guest, b"tree", tree_of((b"100644", b"config", blob)))
    tree = loose(guest, b"tree", tree_of((mode, name, inner if mode == b"40000" else blob)))
    tip = loose(
        guest, b"commit",
        f"tree {tree}\nparent {base}\nauthor a <a@x> 1 +0000\ncommitter a <a@x> 1 +0000\n\nx\n".encode(),
    )  # fmt: skip
    user_git(guest, "update-ref", "--no-deref", "HEAD", tip)
    refused(host, bundle_of(guest, base), base, tip, "git does not accept")


def test_submodules_that_run_something(host, guest):
    base = user_git(host, "rev-parse", "HEAD")
    text = '[submodule "x"]\n\tpath = x\n\turl = -u./payload\n'
    tip = commit(guest, ".gitmodules", text)
    refused(host, bundle_of(guest, base), base, tip, "git does not accept")


# The host's git


@pytest.fixture
def trap(tmp_path):
    """A program that leaves a trace."""
    program = tmp_path / "trap"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\n")
    program.chmod(0o755)
    yield program
    assert not (tmp_path / "sprung").exists()


def test_nothing_of_the_repository_is_run(host, guest, trap, monkeypatch):
    base = user_git(host, "rev-parse", "HEAD")
    tip = commit(guest, "b", "b\n")
    bundle = bundle_of(guest, base)
    hooks = host / ".git" / "hooks"
    hooks.mkdir()
    for name in ("reference-transaction", "post-index-change", "post-checkout", "pre-auto-gc"):
        (hooks / name).symlink_to(trap)
    for key in ("core.fsmonitor", "core.sshCommand", "core.pager", "core.editor", "gc.recentObjectsHook"):
        user_git(host, "config", key, str(trap))
    user_git(host, "config", "alias.index-pack", f"!{trap}")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(trap))
    monkeypatch.setenv("GIT_PAGER", str(trap))
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    imported(host, bundle, base, tip)
    git("--git-dir", host / ".git", "update-ref", "refs/heads/x", tip)


def test_no_other_repository_is_read_unless_asked(host, tmp_path):
    git("init", "--quiet", tmp_path / "other")
    fetch = ("-C", tmp_path / "other", "fetch", host, "HEAD")
    with pytest.raises(GitError) as caught:
        git(*fetch)
    assert "not allowed" in caught.value.details
    git(*fetch, local=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_repository_of_another_user(host, tmp_path):
    """As root has it in a container, in whose volume a user has checked it out."""
    for path in (host, *host.rglob("*")):
        os.chown(path, 1000, 1000, follow_symlinks=False)
    git("init", "--quiet", tmp_path / "other")
    git("-C", tmp_path / "other", "fetch", host, "HEAD", local=True)


def test_a_branch_that_is_in_the_way_of_ours(host):
    mount = Mount(host, PurePosixPath("/r"), "rw", "git")
    Clone(None, mount)
    user_git(host, "branch", "microvm/x")
    Clone(None, mount)
    user_git(host, "branch", "-D", "microvm/x")
    user_git(host, "branch", "microvm")
    with pytest.raises(UsageError, match="has a branch microvm"):
        Clone(None, mount)
    Clone(None, Mount(host, PurePosixPath("/r"), "ro", "git"))


def test_what_git_says_is_safe_to_show_and_short(tmp_path):
    with pytest.raises(GitError) as caught:
        git("-C", tmp_path, "rev-parse", "--verify", "\x1b[2J" + "x" * 5000)
    assert "\x1b" not in caught.value.details
    assert len(caught.value.details) <= 2100


def test_however_much_it_prints(host):
    (host / "a").write_text("x\n" * 1_000_000)
    user_git(host, "add", "a")
    with pytest.raises(GitError):
        git("--git-dir", host / ".git", "cat-file", "-p", ":a")


def test_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match="git is not installed"):
        git("--version")
