"""A commit's files come byte for byte, nothing of the repository runs, and no path leaves the workspace."""

import hashlib
import os
import shutil
import subprocess
import tarfile

import pytest

from pytest_microvm.ci.sources import git_tree
from pytest_microvm.ci.sources.file_names import refusal
from pytest_microvm.ci.sources.git_tree import GitTree
from pytest_microvm.ci.sources.repository import CodeRepository
from pytest_microvm.ci.sources.tree import tree_digest
from pytest_microvm.ci.sources.work_tree import WorkTree
from pytest_microvm.errors import UsageError
from pytest_microvm.git.bundle import Repository
from pytest_microvm.git.commands import GitError, git, git_talk
from support.repositories import (
    blob,
    commit,
    commit_tree,
    copied,
    filled,
    lfs_pointer,
    raw_tree,
    repository,
    store_lfs_object,
)
from support.repositories import git as user_git

MARK = "a program of the repository ran"


@pytest.fixture
def project(tmp_path):
    return repository(tmp_path / "project")


def tree_of(folder, name="HEAD"):
    sources = CodeRepository(folder)
    return sources.tree(sources.ref(name))


def raw(folder, tree):
    """Return the tree of a commit made from a tree object."""
    return GitTree(Repository(folder / ".git", "sha1"), commit_tree(folder, tree))


# The same files, the same digest


def everything(folder):
    (folder / "folder").mkdir()
    (folder / "folder" / "link").symlink_to("../nowhere\n/../../etc/passwd")
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o755)
    (folder / os.fsdecode(b"not utf-8 \xff")).write_text("x")
    return commit(
        folder,
        {
            "a": "a\n",
            "empty": "",
            "folder/b": "b",
            "folder.txt": "sorts between",
            "large": os.urandom(3 * 1024 * 1024),
            "line\nbreak": "c",
            "ümlaut": "d\r\n",
        },
    )


def test_every_file_as_it_is(project):
    everything(project)
    contents, members = filled(tree_of(project))
    here = {}
    for path in project.rglob("*"):
        name = str(path.relative_to(project))
        if not name.startswith(".git/") and (path.is_symlink() or path.is_file()):
            here[name] = str(path.readlink()) if path.is_symlink() else path.read_bytes()
    assert contents == here
    assert {member.name: oct(member.mode) for member in members if member.isfile()}["run"] == "0o755"
    assert {member.mode for member in members if member.isfile()} == {0o644, 0o755}
    assert {(member.uid, member.mtime) for member in members} == {(0, 1767323045)}


def test_one_digest_for_every_kind_of_tree(project):
    everything(project)
    _contents, members = filled(tree_of(project))
    contents = filled(tree_of(project))[0]
    archived = tree_digest(
        (
            member.name,
            "link" if member.issym() else f"{member.mode:o}",
            hashlib.sha256(os.fsencode(contents[member.name])).hexdigest(),
        )
        for member in members
    )
    tree = tree_of(project)
    assert tree.digest() == WorkTree(project).digest() == archived
    assert tree.digest(["folder", "a"]) == WorkTree(project).digest(["a", "./folder/"]) != archived
    assert tree.digest([]) == WorkTree(project).digest([])


def test_the_digest_says_path_kind_and_content():
    base = ("a", "644", "0" * 64)
    different = [
        ("b", *base[1:]),
        (base[0], "755", base[2]),
        (base[0], "link", base[2]),
        (*base[:2], "1" * 64),
    ]
    digests = {tree_digest([one]) for one in [base, *different]} | {
        tree_digest([]),
        tree_digest([base, *different[:1]]),
    }
    assert len(digests) == 7
    assert tree_digest([base, different[0]]) == tree_digest([different[0], base])


def test_a_part_of_the_files(project):
    everything(project)
    for tree in (tree_of(project), WorkTree(project)):
        assert set(filled(tree, ["folder", "run"])[0]) == {"folder/b", "folder/link", "run"}
        assert set(filled(tree, ["."])[0]) == set(filled(tree)[0])
        for wrong in ("folde", "folder/b/c", "/a", "../project/a"):
            with pytest.raises(UsageError, match="nothing of the sources"):
                tree.digest([wrong])


def test_work_tree_includes_uncommitted_but_not_ignored_files(project):
    commit(project, {"a": "a", ".gitignore": "ignored\n"})
    (project / "a").write_text("changed")
    (project / "new").write_text("new")
    (project / "ignored").write_text("secret")
    sources = CodeRepository(project)
    source = sources.worktree()
    assert filled(sources.tree(source))[0] == {"a": b"changed", "new": b"new", ".gitignore": b"ignored\n"}
    assert source.branch == "worktree"
    assert source.commit == sources.tree(source).digest()
    assert not source.default


# Nothing of the repository runs, nothing is changed on the way


def trapped(folder):
    """Put a program into everything of a repository that can name one; return the mark it would leave."""
    mark = folder.parent / "mark"
    program = folder.parent / "program"
    program.write_text(f"#!/bin/sh\necho '{MARK}' >> '{mark}'\n")
    program.chmod(0o755)
    included = folder.parent / "included"
    included.write_text(f"[core]\n\tpager = {program}\n\tfsmonitor = {program}\n")
    for key, value in {
        "filter.x.smudge": program, "filter.x.clean": program, "filter.x.process": program,
        "filter.x.required": "true", "diff.x.textconv": program, "diff.x.command": program,
        "diff.external": program, "core.fsmonitor": program, "core.hooksPath": folder / "hooks",
        "core.pager": program, "core.editor": program, "core.sshCommand": program, "core.askPass": program,
        "core.alternateRefsCommand": program, "core.gitProxy": program, "credential.helper": program,
        "alias.ls-tree": f"!{program}", "alias.cat-file": f"!{program}", "alias.rev-parse": f"!{program}",
        "include.path": included, "uploadpack.packObjectsHook": program, "gpg.program": program,
        "log.showSignature": "true", "protocol.allow": "always", "protocol.ext.allow": "always",
        "remote.origin.url": f"ext::{program}", "remote.origin.promisor": "true",
        "remote.origin.partialclonefilter": "blob:none", "extensions.partialClone": "origin",
        "core.repositoryformatversion": "1", "trace2.eventTarget": folder.parent / "trace",
        "tar.x.command": program, "interactive.diffFilter": program, "pager.log": program,
        "pager.for-each-ref": program, "sequence.editor": program, "merge.x.driver": program,
    }.items():  # fmt: skip
        user_git(folder, "config", key, str(value))
    for hooks in (folder / "hooks", folder / ".git" / "hooks"):
        hooks.mkdir()
        for name in ("post-checkout", "reference-transaction", "post-index-change", "pre-auto-gc", "update"):
            (hooks / name).write_text(program.read_text())
            (hooks / name).chmod(0o755)
    return mark


ATTRIBUTES = """
* filter=x diff=x merge=x
exported export-ignore
subst export-subst
dos text eol=crlf
ident ident
utf16 working-tree-encoding=UTF-16
"""
BYTES = {
    ".gitattributes": ATTRIBUTES.encode(),
    "exported": b"here\n",
    "subst": b"$Format:%H$\n",
    "dos": b"one\ntwo\r\n",
    "ident": b"$Id$\n",
    "utf16": b"text\n",
}


def raw_commit(folder, files):
    """Commit files as they are, past every filter."""
    entries = sorted((name.encode(), blob(folder, content)) for name, content in files.items())
    made = commit_tree(folder, raw_tree(folder, *((b"100644", name, which) for name, which in entries)))
    user_git(folder, "update-ref", "refs/heads/main", made)
    return made


def test_no_program_of_the_repository_runs(project, tmp_path):
    head = raw_commit(project, BYTES)
    mark = trapped(project)

    user_git(project, "status")  # the traps are real: what any user would type springs one
    assert MARK in mark.read_text()
    mark.unlink()
    subprocess.run(["git", "-C", project, "archive", "HEAD"], capture_output=True, check=False, timeout=60)
    assert MARK in mark.read_text()
    mark.unlink()

    sources = CodeRepository(project)
    source = sources.ref("HEAD")
    assert filled(sources.tree(source))[0] == BYTES
    assert sources.tree(source).digest()
    assert sources.branches(["*"]) == [source]
    assert sources.changed_since("main") == []
    assert sources.read(head, "subst", 100) == BYTES["subst"]
    assert sources.export("main", "hooks", tmp_path / "out") is False
    assert set(sources.tree(sources.worktree()).digest()) <= set("0123456789abcdef")
    with (tmp_path / "bundle").open("wb") as file:
        sources.bundle(source, file)
    assert (tmp_path / "bundle").stat().st_size > 100
    assert not mark.exists()
    assert not (tmp_path / "trace").exists()


def test_what_is_missing_is_not_fetched(project):
    """A partial clone: its remote is a program, which git would run for a blob that is not here."""
    head = commit(project, {"a": "a" * 2000})
    name = user_git(project, "rev-parse", "HEAD:a")
    mark = trapped(project)
    (project / ".git" / "objects" / name[:2] / name[2:]).unlink()
    run_it = subprocess.run(
        ["git", "-C", project, "cat-file", "-p", name], capture_output=True, check=False, timeout=60
    )
    assert run_it.returncode
    assert MARK in mark.read_text()
    mark.unlink()
    tree = CodeRepository(project)._tree(head)
    with pytest.raises(GitError, match="missing"):
        filled(tree)
    assert not mark.exists()


def test_what_a_repository_allows_is_not_allowed(project, tmp_path):
    """Its own configuration says that a transport which is a program may be used."""
    commit(project, {"a": "a"})
    mark = trapped(project)
    for local in (False, True):
        with pytest.raises(GitError, match=r"not allowed"):
            git("--git-dir", project / ".git", "fetch", "--quiet", "origin", local=local)
    assert not mark.exists()
    git("init", "--quiet", "--bare", tmp_path / "other")
    git("--git-dir", tmp_path / "other", "fetch", "--quiet", project, "main:main", local=True)
    with pytest.raises(GitError, match=r"not allowed"):
        git("--git-dir", tmp_path / "other", "fetch", "--quiet", project, "main:more")


# Attacks by path


ATTACKS = [
    b"..", b".", b".git", b".GIT", b".Git", b".git ", b".git.", b".git. .", b"git~1", b"GIT~1",
    b".git::$INDEX_ALLOCATION", b".git:x", b".git\\hooks", "\u200c.git".encode(), ".g\u200dit".encode(),
    "\ufeff.GiT".encode(), b"x" * 256,
]  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS, ids=repr)
def test_names_that_are_attacks(project, name):
    good = blob(project, b"good")
    inner = raw_tree(project, (b"100644", b"file", good))
    for entry in ((b"100644", name, good), (b"40000", name, inner)):
        tree = raw(project, raw_tree(project, entry, (b"100644", b"good", good)))
        assert filled(tree)[0] == {"good": b"good"}
        assert "was left out" in tree.notes[0]


def test_paths_that_are_attacks(project):
    good = blob(project, b"good")
    for name in (b"/etc/passwd", b"../../x", b"a//b", b"a/../../x"):
        tree = raw(project, raw_tree(project, (b"100644", name, good), (b"100644", b"good", good)))
        assert filled(tree)[0] == {"good": b"good"}
    assert refusal(b"/".join([b"x" * 200] * 30))


@pytest.mark.parametrize("order", [1, -1])
def test_two_things_of_one_name(project, order):
    """A link that a folder of the same name would be written through, and a file that is there twice."""
    good, target = blob(project, b"good"), blob(project, b"/etc")
    inner = raw_tree(project, (b"100644", b"passwd", good))
    entries = [(b"120000", b"a", target), (b"40000", b"a", inner)][::order]
    tree = raw(project, raw_tree(project, *entries))
    contents, _members = filled(tree)
    assert len(contents) == 1
    assert len(tree.notes) == 1
    twice = raw(project, raw_tree(project, (b"100644", b"a", good), (b"100755", b"a", target)))
    assert filled(twice)[0] == {"a": b"good"}


def test_a_link_stays_a_link(project):
    target = blob(project, b"/etc/passwd")
    contents, members = filled(raw(project, raw_tree(project, (b"120000", b"a", target))))
    assert contents == {"a": "/etc/passwd"}
    assert members[0].issym()
    long = blob(project, b"x" * 5000)
    assert filled(raw(project, raw_tree(project, (b"120000", b"a", long))))[0] == {}


def test_a_bomb(project, monkeypatch):
    """Ten folders with ten folders each, ten deep: ten objects, ten thousand million files."""
    monkeypatch.setattr(git_tree, "MAX_FILES", 20_000)
    tree = raw_tree(project, *((b"100644", b"f%d" % i, blob(project, b"x")) for i in range(10)))
    for _depth in range(9):
        tree = raw_tree(project, *((b"40000", b"d%d" % i, tree) for i in range(10)))
    with pytest.raises(UsageError, match="more than 20000 files"):
        raw(project, tree).digest()


def test_too_many_bytes(project):
    head = commit(project, {"a": b"x" * 1000, "b": b"y" * 1001})
    with pytest.raises(UsageError, match="more than 2000 bytes"):
        GitTree(Repository(project / ".git", "sha1"), head, limit=2000).digest()
    assert GitTree(Repository(project / ".git", "sha1"), head, limit=2001).digest()


# Submodules


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A repository with a submodule that has a submodule."""
    place = tmp_path_factory.mktemp("made")
    inner = repository(place / "inner")
    commit(inner, {"inner.txt": "inner"})
    middle = repository(place / "middle")
    user_git(middle, "submodule", "--quiet", "add", str(inner), "deep")
    commit(middle, {"middle.txt": "middle"})
    outer = repository(place / "outer")
    user_git(outer, "submodule", "--quiet", "add", "--name", "its/name", str(middle), "lib/middle")
    user_git(outer, "submodule", "--quiet", "update", "--init", "--recursive")
    commit(outer, {"outer.txt": "outer"})
    return place


@pytest.fixture
def with_modules(made, tmp_path):
    copied(made, tmp_path)
    return tmp_path / "outer"


def test_submodules_that_are_here(with_modules):
    tree = tree_of(with_modules)
    contents, _members = filled(tree)
    assert {name: content for name, content in contents.items() if name.endswith(".txt")} == {
        "outer.txt": b"outer", "lib/middle/middle.txt": b"middle", "lib/middle/deep/inner.txt": b"inner",
    }  # fmt: skip
    assert tree.notes == []
    assert tree.digest() == WorkTree(with_modules).digest()


def test_the_pinned_commit_and_not_what_is_checked_out(with_modules):
    commit(with_modules / "lib" / "middle", {"middle.txt": "newer"})
    assert filled(tree_of(with_modules))[0]["lib/middle/middle.txt"] == b"middle"


def test_submodules_that_are_not_here(with_modules, tmp_path):
    user_git(tmp_path, "clone", "-q", str(with_modules), "clone")
    tree = tree_of(tmp_path / "clone")
    contents, members = filled(tree)
    assert set(contents) == {".gitmodules", "outer.txt"}
    assert [member.name for member in members if member.isdir()] == ["lib/middle"]
    assert "submodule lib/middle" in tree.notes[0]
    sources = CodeRepository(tmp_path / "clone")
    assert filled(sources.tree(sources.ref("main")))
    assert sources.notes(sources.ref("main")) == tree.notes


def with_module(folder, gitmodules, pinned):
    """Return the tree of a commit with a submodule in lib, and a .gitmodules of its own."""
    (folder / ".git" / "modules").mkdir()
    names = blob(folder, gitmodules.encode())
    entries = (b"100644", b".gitmodules", names), (b"160000", b"lib", pinned)
    made = commit_tree(folder, raw_tree(folder, *entries))
    return GitTree(Repository(folder / ".git", "sha1"), made, modules=[folder / ".git" / "modules"])


@pytest.mark.parametrize(
    "name", ["../../outside/.git", "x/../../../outside/.git", "./../../outside/.git", "..", "", "/"]
)
def test_names_of_submodules_that_are_attacks(project, tmp_path, name):
    outside = repository(tmp_path / "project" / "outside")
    pinned = commit(outside, {"secret": "secret"})
    tree = with_module(project, f'[submodule "{name}"]\n\tpath = lib\n\turl = x\n', pinned)
    assert set(filled(tree)[0]) == {".gitmodules"}
    assert tree.notes


def test_a_submodule_through_a_link_of_the_host(project, tmp_path):
    outside = repository(tmp_path / "outside")
    pinned = commit(outside, {"secret": "secret"})
    tree = with_module(project, '[submodule "lib"]\n\tpath = lib\n', pinned)
    (project / ".git" / "modules" / "lib").symlink_to(outside / ".git")
    assert set(filled(tree)[0]) == {".gitmodules"}


def test_gitmodules_that_includes_another_file(project, tmp_path):
    """The name of the submodule stands in a file of the host: it is not read."""
    included = tmp_path / "included"
    included.write_text('[submodule "lib"]\n\tpath = lib\n')
    commit(repository(tmp_path / "module"), {"a": "a"})
    pinned = user_git(tmp_path / "module", "rev-parse", "HEAD")
    for text, found in ((f"[include]\n\tpath = {included}\n", False), (included.read_text(), True)):
        tree = with_module(project, text, pinned)
        user_git(
            tmp_path,
            "clone",
            "-q",
            "--bare",
            str(tmp_path / "module"),
            str(project / ".git" / "modules" / "lib"),
        )
        assert ("lib/a" in filled(tree)[0]) is found
        shutil.rmtree(project / ".git" / "modules")


# Large files


def test_a_large_file_that_is_here(project):
    content = os.urandom(100_000)
    name, text = lfs_pointer(content)
    commit(project, {"data.bin": text, "other": "x"})
    store_lfs_object(project, name, content)
    tree = tree_of(project)
    assert filled(tree)[0]["data.bin"] == content
    assert tree.notes == []
    (project / "data.bin").write_bytes(content)
    assert tree.digest() == WorkTree(project).digest()


@pytest.mark.parametrize(
    "lying", ["missing", "other bytes", "shorter", "a size", "a link", "a linked folder", "a fifo"]
)
def test_a_large_file_that_is_not_here(project, tmp_path, lying):
    content = b"content" * 100
    name, text = lfs_pointer(content)
    if lying == "a size":
        text = text.replace("size 700", "size 70")
        store_lfs_object(project, name, content)
    commit(project, {"data.bin": text})
    if lying not in ("missing", "a size"):
        place = store_lfs_object(
            project, name, {"other bytes": content.upper(), "shorter": content[1:]}.get(lying, b"")
        )
        if lying == "a link":
            (tmp_path / "elsewhere").write_bytes(content)
            place.unlink()
            place.symlink_to(tmp_path / "elsewhere")
        if lying == "a linked folder":
            place.write_bytes(content)
            place.parent.rename(tmp_path / "elsewhere")
            place.parent.symlink_to(tmp_path / "elsewhere")
        if lying == "a fifo":
            place.unlink()
            os.mkfifo(place)
    tree = tree_of(project)
    assert filled(tree)[0] == {"data.bin": text.encode()}
    assert "data.bin" in tree.notes[0]
    assert tree.digest() == WorkTree(project).digest()


@pytest.mark.parametrize(
    "text",
    [
        "version https://git-lfs.github.com/spec/v1\noid sha256:../../../../etc/passwd\nsize 5\n",
        "version https://git-lfs.github.com/spec/v2\n" + lfs_pointer(b"x")[1].split("\n", 1)[1],
        lfs_pointer(b"x")[1] + "more\n",
    ],
)
def test_what_is_no_pointer(project, text):
    commit(project, {"data.bin": text})
    tree = tree_of(project)
    assert filled(tree)[0] == {"data.bin": text.encode()}
    assert tree.notes == []


def test_large_files_count(project):
    content = b"x" * 5000
    name, text = lfs_pointer(content)
    head = commit(project, {"data.bin": text})
    store_lfs_object(project, name, content)
    with pytest.raises(UsageError, match="more than 4000 bytes"):
        GitTree(Repository(project / ".git", "sha1"), head, limit=4000).digest()


# Talking with git


def test_a_talk_that_is_left_early_ends_git(project):
    everything(project)
    name = user_git(project, "rev-parse", "HEAD:large")
    command = ("--git-dir", project / ".git", "cat-file", "--batch")
    with pytest.raises(KeyError), git_talk(*command) as talk:  # noqa: PT012 - it is the block that is left
        talk.ask(name.encode() + b"\n")
        talk.until(b"\n")
        raise KeyError
    with pytest.raises(GitError, match="could not do its part"), git_talk("no-such-command") as talk:
        talk.exactly(1)
    with pytest.raises(GitError, match="could not do its part"), git_talk("no-such-command") as talk:
        assert list(talk.words(b"\n")) == []


def test_a_word_without_an_end(project):
    (project / "long").write_bytes(b"a" * 2**22)
    name = user_git(project, "hash-object", "-w", "long")
    command = ("--git-dir", project / ".git", "cat-file", "blob", name)
    with pytest.raises(GitError, match="too much"), git_talk(*command) as talk:
        talk.until(b"b")


def test_an_archive_that_breaks_off(project):
    """Whoever reads the archive has gone: git ends, and the error arrives."""
    everything(project)

    class Broken:
        def write(self, data):
            raise BrokenPipeError

    with (
        pytest.raises(BrokenPipeError),
        tarfile.open(fileobj=Broken(), mode="w|") as archive,
    ):
        tree_of(project).fill(archive)
