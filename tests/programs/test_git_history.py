"""The ``.git`` of a machine's workspace: git says there what it says in the work tree, and knows no more."""

import itertools
import os
import stat
import tempfile
import time
from pathlib import Path

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.git import history
from pytest_microvm.guest.files import StreamReader, unpack
from pytest_microvm.suite.workspace import scan
from support import repositories
from support.repositories import blob, commit, git, repository
from support.tiers import thorough_but

# What setuptools-scm, versioningit, versioneer, hatch-vcs and people ask.
QUESTIONS = (
    "status --porcelain=v2 --branch", "status --porcelain --untracked-files=no", "rev-parse HEAD",
    "symbolic-ref --short HEAD", "describe --always", "describe --tags --long --dirty --match *[0-9]*",
    "describe --tags --always --first-parent --dirty", "log -1 --format=%cI%D", "tag --points-at HEAD",
    "diff-index --name-status HEAD", "diff-files --name-status", "diff --cached --name-status -M",
    "ls-files --stage -v", "rev-parse --is-shallow-repository", "stash list", "submodule status",
)  # fmt: skip


def ask(folder, question):
    try:
        return git(folder, *question.split())
    except RuntimeError:
        return "failed"


def answers(folder):
    return {question: ask(folder, question) for question in QUESTIONS}


def copy(top, target):
    """Unpack in ``target`` what a machine gets of a work tree; return ``target``."""
    with tempfile.TemporaryFile() as archive:
        scan(top, git=True).write_tar(archive)
        archive.seek(0)
        unpack(StreamReader(lambda: archive.read(65536)), str(target))
    return target


@pytest.fixture
def clock(monkeypatch):
    """Let a day pass: with commits of one time ``git describe`` counts wrongly."""
    days = itertools.count(3)
    return lambda: monkeypatch.setitem(
        repositories._FIXED, "GIT_COMMITTER_DATE", f"2026-01-{next(days):02}T03:04:05+00:00"
    )


@pytest.fixture
def project(tmp_path, clock):
    """Return a repository with a branch that was merged, an annotated tag and others, and ignored files."""
    folder = repository(tmp_path / "project")
    clock()
    commit(folder, {".gitignore": "*.log\n", "a": "a\n", "sub/run": "#!/bin/sh\n"}, "first")
    (folder / "sub" / "run").chmod(0o755)
    git(folder, "tag", "v0.1")
    git(folder, "checkout", "-qb", "side")
    clock()
    commit(folder, {"side": "side\n"}, "side")
    git(folder, "checkout", "-q", "main")
    clock()
    commit(folder, {"b": "b\n"}, "second")
    git(folder, "tag", "-am", "Version 1.0", "v1.0")
    clock()
    git(folder, "merge", "-q", "--no-edit", "side")
    git(folder, "tag", "nightly")
    clock()
    commit(folder, {"c": "c\n"}, "third")
    (folder / "x.log").write_text("ignored")
    return folder


def changed(folder):
    (folder / "a").write_text("other\n")
    (folder / "new").write_text("new\n")


def staged(folder):
    changed(folder)
    git(folder, "mv", "b", "moved")
    git(folder, "rm", "-q", "c")
    git(folder, "add", "new")
    (folder / "new").write_text("more\n")
    git(folder, "add", "-N", "a")


def conflicting(folder):
    git(folder, "checkout", "-qb", "other", "HEAD~1")
    commit(folder, {"c": "other\n"})
    with pytest.raises(RuntimeError, match="git merge main failed"):
        git(folder, "merge", "main")


def without_commits(folder):
    git(folder, "checkout", "-q", "--orphan", "empty")


def sparse(folder):
    git(folder, "sparse-checkout", "set", "--no-cone", "/a")


def split(folder):
    git(folder, "update-index", "--split-index")
    commit(folder, {"d": "d\n"})


STATES = {
    "clean": lambda _folder: None,
    "changed": changed,
    "staged": staged,
    "conflicting": conflicting,
    "detached": lambda folder: git(folder, "checkout", "-q", "v1.0"),
    "without commits": without_commits,
    "sparse": sparse,
    "split index": split,
    "deleted": lambda folder: (folder / "a").unlink(),
}


@pytest.mark.parametrize("state", thorough_but(STATES, "clean", "staged", "conflicting", "detached"))
def test_git_says_the_same(project, tmp_path, state):
    STATES[state](project)
    made = copy(project, tmp_path / "machine")
    assert answers(made) == answers(project)
    assert git(made, "fsck", "--strict", "--no-dangling") == ""


@pytest.mark.parametrize("whole", [history.WHOLE, 0], ids=["whole", "cut"])
def test_linked_work_tree_and_sha256(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(history, "WHOLE", whole)
    main = repository(tmp_path / "main", "--object-format=sha256")
    for number in range(4):
        commit(main, {"a": str(number)})
        git(main, "tag", f"{number}.0")
    git(main, "worktree", "add", "-q", "../linked", "-b", "feature/x", "HEAD~1")
    commit(tmp_path / "linked", {"b": "b"})
    made = copy(tmp_path / "linked", tmp_path / "machine")
    said = answers(tmp_path / "linked")
    assert said["describe --tags --long --dirty --match *[0-9]*"].startswith("2.0-1-g")
    assert {**answers(made), "rev-parse --is-shallow-repository": "false"} == said
    assert ask(made, "rev-parse --is-shallow-repository") == ("false" if whole else "true")


def grown(folder, clock):
    """Continue after a tag with merges of a branch that began before it, and a tag of another kind."""
    git(folder, "checkout", "-qb", "old", "v0.1")
    for number in range(3):
        clock()
        commit(folder, {f"old{number}": "x"})
    git(folder, "checkout", "-q", "main")
    clock()
    git(folder, "merge", "-q", "--no-edit", "old")
    commit(folder, {"more": "x"})
    git(folder, "tag", "release")
    clock()
    commit(folder, {"more": "y"})


def test_large_history_is_cut_where_describe_needs_no_more(project, tmp_path, monkeypatch, clock):
    clock()
    commit(project, {"huge": os.urandom(200_000)})
    git(project, "rm", "-q", "huge")
    commit(project, {"c": "1\n"})
    git(project, "tag", "-am", "Version 2.0", "v2.0")
    grown(project, clock)
    monkeypatch.setattr(history, "WHOLE", 100_000)
    made = copy(project, tmp_path / "machine")
    for question in QUESTIONS:
        if "shallow" not in question:
            assert ask(made, question) == ask(project, question)
    for range_ in ("release..HEAD", "v2.0..HEAD"):
        assert ask(made, f"rev-list --count {range_}") == ask(project, f"rev-list --count {range_}")
    assert git(made, "tag") == "release\nv2.0"
    assert git(made, "rev-parse", "--is-shallow-repository") == "true"
    assert int(ask(made, "rev-list --count HEAD")) < int(ask(project, "rev-list --count HEAD"))
    assert sum(path.stat().st_size for path in (made / ".git").rglob("*")) < 100_000
    assert git(made, "fsck", "--no-dangling") == ""


def test_history_without_tags_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "WHOLE", 0)
    folder = repository(tmp_path / "project")
    for number in range(3):
        commit(folder, {"a": str(number)})
    assert ask(copy(folder, tmp_path / "machine"), "rev-list --count HEAD") == "3"


def test_shallow_clone_stays_shallow(project, tmp_path, monkeypatch):
    monkeypatch.setattr(history, "WHOLE", 0)
    git(tmp_path, "clone", "-q", "--depth=2", f"file://{project}", "shallow")
    git(tmp_path / "shallow", "remote", "remove", "origin")
    made = copy(tmp_path / "shallow", tmp_path / "machine")
    assert answers(made) == answers(tmp_path / "shallow")


@pytest.mark.parametrize("whole", [history.WHOLE, 0])
def test_too_large_history_is_refused(project, monkeypatch, tmp_path, whole):
    commit(project, {"huge": os.urandom(200_000)})
    monkeypatch.setattr(history, "WHOLE", whole)
    monkeypatch.setattr(history, "LIMIT", 100_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with pytest.raises(UsageError, match=r"the history of .*/project has 0 MiB, more than 0 MiB"):
        copy(project, tmp_path / "machine")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_digest_follows_what_git_says(project):
    seen = [scan(project, git=True).digest()]
    without = scan(project).digest()

    def same():
        seen.append(scan(project, git=True).digest())
        return seen[-1] == seen[-2]

    os.utime(project / "a", (1, 1))
    git(project, "status")  # which refreshes the index
    assert same()
    git(project, "commit", "-qm", "empty", "--allow-empty")
    assert not same()
    git(project, "tag", "v3")
    assert not same()
    git(project, "branch", "-m", "renamed")
    assert not same()
    git(project, "update-index", "--chmod=+x", "a")
    assert not same()
    assert scan(project).digest() == without


def test_caches_and_converted_files_are_not_changes(project, tmp_path):
    for name, value in {"clean": "tr a-z A-Z", "smudge": "cat", "required": "true"}.items():
        git(project, "config", f"filter.upper.{name}", value)
    git(project, "config", "core.autocrlf", "true")
    commit(project, {".gitattributes": "*.up filter=upper\n", "x.up": "text", "crlf.txt": "1\r\n2\r\n"})
    (project / "__pycache__").mkdir()
    (project / "__pycache__" / "x.pyc").touch()
    git(project, "add", "-f", "__pycache__")
    git(project, "commit", "-qm", "a cache")
    later = time.time() + 10  # as usual: else git compares contents
    os.utime(project / ".git" / "index", (later, later))
    assert git(project, "status", "--porcelain") == ""
    made = copy(project, tmp_path / "machine")
    assert not (made / "__pycache__").exists()
    assert git(made, "status", "--porcelain") == ""
    (made / "a").write_text("changed\n")
    assert git(made, "status", "--porcelain") == "M a"


def test_submodule_has_no_repository_of_its_own(project, tmp_path):
    git(tmp_path, "init", "-q", "outer")
    commit(tmp_path / "outer", {"x": "x"})
    git(tmp_path / "outer", "submodule", "--quiet", "add", str(project), "inner")
    git(tmp_path / "outer", "commit", "-qm", "submodule")
    made = copy(tmp_path / "outer", tmp_path / "machine")
    assert (made / "inner" / "a").read_text() == "a\n"
    assert not (made / "inner" / ".git").exists()
    assert git(made, "status", "--porcelain") == ""
    assert git(made, "submodule", "status").startswith("-")


def test_nothing_else_of_the_repository_is_there(project, tmp_path):
    git(project, "remote", "add", "origin", "https://user:hunter2@example.invalid/x")
    git(project, "config", "user.email", "hunter2@example.invalid")
    git(project, "config", "alias.x", "!hunter2")
    git(project, "config", "core.filemode", "false")
    git(project, "notes", "add", "-m", "hunter2")
    git(project, "checkout", "-qb", "private")
    private = commit(project, {"hunter2": "hunter2"}, "hunter2")
    git(project, "tag", "private-tag")
    git(project, "checkout", "-q", "main")
    (project / "a").write_text("stashed hunter2\n")
    git(project, "stash")
    dangling = blob(project, b"dangling hunter2")
    (project / ".git" / "hooks").mkdir(exist_ok=True)
    (project / ".git" / "hooks" / "post-checkout").write_text("#!/bin/sh\necho hunter2\n")
    (project / ".git" / "hooks" / "post-checkout").chmod(0o755)
    (project / ".git" / "description").write_text("hunter2")
    (project / ".git" / "COMMIT_EDITMSG").write_text("hunter2")
    made = copy(project, tmp_path / "machine")
    names = {str(path.relative_to(made / ".git")) for path in (made / ".git").rglob("*") if path.is_file()}
    names = {Path(name).suffix if name.startswith("objects/pack/") else name for name in names}
    assert names == {"HEAD", "config", "index", "packed-refs", ".idx", ".pack"}
    assert not any(b"hunter2" in path.read_bytes() for path in (made / ".git").rglob("*") if path.is_file())
    for missing in (private, dangling, git(project, "rev-parse", "refs/stash")):
        with pytest.raises(RuntimeError, match="failed"):
            git(made, "cat-file", "-e", missing)
    assert git(made, "for-each-ref", "--format=%(refname)").splitlines() == [
        "refs/heads/main", "refs/tags/nightly", "refs/tags/v0.1", "refs/tags/v1.0",
    ]  # fmt: skip
    config = git(made, "config", "--list", "--local").splitlines()
    assert sorted(line.partition("=")[0] for line in config) == [
        "core.bare", "core.checkstat", "core.filemode", "core.filemode", "core.logallrefupdates",
        "core.repositoryformatversion", "core.trustctime",
    ] or sorted({line.partition("=")[0] for line in config}) == [
        "core.bare", "core.checkstat", "core.filemode", "core.logallrefupdates",
        "core.repositoryformatversion", "core.trustctime",
    ]  # fmt: skip
    assert "core.filemode=false" in config


def test_names_of_untracked_folders_stay_behind(project, tmp_path):
    """git's cache in the index lists them, and where the work tree is."""
    (project / "hunter2").mkdir()
    (project / "hunter2" / "x.log").touch()
    git(project, "update-index", "--untracked-cache")
    git(project, "status")
    git(project, "update-index", "--split-index")
    assert any(b"hunter2" in path.read_bytes() for path in (project / ".git").glob("*index*"))
    made = copy(project, tmp_path / "machine")
    assert [path.name for path in (made / ".git").glob("*index*")] == ["index"]
    assert b"hunter2" not in (made / ".git" / "index").read_bytes()
    assert str(project).encode() not in (made / ".git" / "index").read_bytes()
    assert answers(made) == answers(project)


# Attacks


def test_history_of_another_repository_is_not_lent(project, tmp_path):
    """An archive's ``.git`` that leads to a private repository of the user, by alternates or by links."""
    private = repository(tmp_path / "private")
    secret = commit(private, {"secret": "hunter2"})
    (project / ".git" / "objects" / "info").mkdir(exist_ok=True)
    (project / ".git" / "objects" / "info" / "alternates").write_text(f"{private}/.git/objects\n")
    (project / ".git" / "refs" / "heads" / "main").write_text(secret + "\n")
    with pytest.raises(UsageError, match="borrows objects"):
        scan(project, git=True)
    (project / ".git" / "objects" / "info" / "alternates").unlink()
    for path in (private / ".git" / "objects").glob("??"):
        if not (project / ".git" / "objects" / path.name).exists():
            (project / ".git" / "objects" / path.name).symlink_to(path)
    with pytest.raises(UsageError, match="is a link, which git does not make"):
        scan(project, git=True)


@pytest.mark.parametrize(
    "name",
    thorough_but(
        ["refs/heads/main", "refs/tags/v9", "index", "info", "packed-refs", "HEAD"], "refs/tags/v9", "index"
    ),
)
def test_links_in_a_repository_are_refused(project, tmp_path, name):
    private = repository(tmp_path / "private")
    commit(private, {"secret": "hunter2"})
    git(private, "pack-refs", "--all")
    target = private / ".git" / ("packed-refs" if name.startswith("refs") else name)
    path = project / ".git" / name
    if path.is_dir():
        path.rename(path.with_name("moved"))
    path.unlink(missing_ok=True)
    (private / ".git" / "info").mkdir(exist_ok=True)
    (private / ".git" / "info" / "exclude").write_text("hunter2\n")
    path.symlink_to(target)
    with pytest.raises(UsageError):
        copy(project, tmp_path / "machine")


def test_partial_clone_is_refused_and_fetches_nothing(project, tmp_path):
    git(project, "config", "uploadpack.allowFilter", "true")
    git(tmp_path, "clone", "-q", "--filter=blob:none", "--no-checkout", f"file://{project}", "partial")
    mark = tmp_path / "mark"
    git(tmp_path / "partial", "config", "remote.origin.uploadpack", f"touch {mark}; false")
    with pytest.raises(UsageError, match="cannot be copied") as caught:
        copy(tmp_path / "partial", tmp_path / "machine")
    assert "a partial clone needs" in caught.value.resolution
    assert not mark.exists()


def test_names_in_a_hostile_index_lead_nowhere(project, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("hunter2")
    (project / "link").symlink_to(tmp_path / "outside")
    git(project, "update-index", "--add", "--cacheinfo", f"100644,{blob(project, b'x')},link/secret")
    made = copy(project, tmp_path / "machine")
    assert not any(
        b"hunter2" in path.read_bytes()
        for path in made.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode) and "outside" not in str(path.resolve())
    )


def test_folder_without_repository_has_no_history(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "a").touch()
    assert scan(tmp_path / "project", git=True).history is None


def test_part_of_a_workspace_has_no_deleted_files(project, tmp_path):
    whole = scan(project, git=True)
    part = whole.part([entry for entry in whole.entries if entry.path == "a"], history=True)
    assert part.history.missing == (".gitignore", "b", "c", "side", "sub/run")
    assert part.digest() != whole.digest()
    with tempfile.TemporaryFile() as archive:
        part.write_tar(archive)
        archive.seek(0)
        unpack(StreamReader(lambda: archive.read(65536)), str(tmp_path / "machine"))
    assert sorted(path.name for path in (tmp_path / "machine").iterdir()) == [".git", "a"]
    assert git(tmp_path / "machine", "status", "--porcelain") == ""
    assert whole.part(whole.entries, history=False).history is None
