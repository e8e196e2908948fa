"""Branches and commits of real repositories, in every state that they come in."""

import os
from pathlib import Path

import pytest

from pytest_microvm.ci.definition.task import WORKTREE, Source
from pytest_microvm.ci.sources.repository import CodeRepository, read_definition
from pytest_microvm.cli import main
from pytest_microvm.errors import UsageError
from pytest_microvm.git.commands import GitError
from support.repositories import commit, copied, filled, git, repository
from support.tiers import thorough_but


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A repository with main and two branches that go on from it."""
    place = tmp_path_factory.mktemp("made")
    folder = repository(place / "project")
    commit(folder, {"a": "main"})
    for name in ("feature/one", "feature/two"):
        git(folder, "switch", "-q", "-c", name, "main")
        commit(folder, {"a": name})
    git(folder, "switch", "-q", "main")
    return place


@pytest.fixture
def project(made, tmp_path):
    copied(made, tmp_path)
    return tmp_path / "project"


@pytest.fixture
def clone(project, tmp_path):
    git(tmp_path, "clone", "-q", "--template=", str(project), "clone")
    return tmp_path / "clone"


def tip(folder, name="HEAD"):
    return git(folder, "rev-parse", name)


def names(sources):
    return [source.branch for source in sources]


# Branches


def test_branches(project):
    sources = CodeRepository(project)
    assert sources.branches(["feature/*", "main"]) == [
        Source("main", tip(project), default=True),
        Source("feature/one", tip(project, "feature/one")),
        Source("feature/two", tip(project, "feature/two")),
    ]
    assert names(sources.branches(["*/two"])) == ["feature/two"]
    assert names(sources.branches()) == ["main", "feature/one", "feature/two"]


def test_a_glob_that_matches_nothing(project):
    with pytest.raises(UsageError, match=r"no branch matches 'Feature/.'") as caught:
        CodeRepository(project).branches(["main", "Feature/*"])
    assert "feature/one, feature/two, main" in caught.value.details


def test_branches_of_origin(clone, project):
    """A local branch goes before origin's of the same name."""
    commit(clone, {"a": "local"})
    sources = CodeRepository(clone)
    assert sources.branches(["*"]) == [
        Source("main", tip(clone), default=True),
        Source("feature/one", tip(project, "feature/one")),
        Source("feature/two", tip(project, "feature/two")),
    ]
    assert sources.ref("origin/main") == Source("refs/remotes/origin/main", tip(project))
    assert sources.ref("origin/feature/one") == Source("feature/one", tip(project, "feature/one"))


def test_changed_since(project):
    sources = CodeRepository(project)
    assert names(sources.changed_since("main")) == ["feature/one", "feature/two"]
    assert names(sources.changed_since("feature/one")) == ["feature/two"]
    git(project, "merge", "-q", "feature/one")
    assert names(sources.changed_since("main")) == ["feature/two"]
    with pytest.raises(UsageError, match="no commit"):
        sources.changed_since("nothing")


def test_strange_names_of_branches(project):
    for name in ("$(touch mark)", "a'b", 'a"b', "ünï", "x;y", "-dash"):
        git(project, "update-ref", f"refs/heads/{name.replace(' ', '_')}", "HEAD")
    found = names(CodeRepository(project).branches())
    assert {"$(touch_mark)", "a'b", 'a"b', "ünï", "x;y", "-dash"} < set(found)


def test_another_name_of_a_branch_is_not_one_more(project):
    git(project, "symbolic-ref", "refs/heads/alias", "refs/heads/main")
    sources = CodeRepository(project)
    assert names(sources.branches()) == ["main", "feature/one", "feature/two"]
    assert sources.ref("alias").commit == tip(project)


# The default branch


def test_the_default_branch(project, clone, tmp_path):
    assert CodeRepository(project).default_branch == "main"
    git(project, "branch", "-q", "-m", "main", "trunk")
    git(project, "switch", "-q", "trunk")
    with pytest.raises(UsageError, match="which branch is the default one") as caught:
        _ = CodeRepository(project).default_branch
    assert "feature/one" in caught.value.details
    assert "set-head" in caught.value.resolution
    assert {source.default for source in CodeRepository(project).branches()} == {False}
    git(project, "branch", "master")
    assert CodeRepository(project).default_branch == "master"
    git(clone, "branch", "-q", "-m", "main", "other")
    git(clone, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/feature/two")
    assert CodeRepository(clone).default_branch == "feature/two"


def test_the_only_branch_is_the_default_one(tmp_path):
    folder = repository(tmp_path / "project")
    commit(folder, {})
    git(folder, "branch", "-q", "-m", "main", "only")
    assert CodeRepository(folder).default_branch == "only"
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{folder}", "clone")
    git(tmp_path / "clone", "symbolic-ref", "--delete", "refs/remotes/origin/HEAD")
    with pytest.raises(UsageError, match="which branch is the default one"):  # it may be a stranger's
        _ = CodeRepository(tmp_path / "clone").default_branch


# Refs


def test_refs(project):
    head = tip(project)
    sources = CodeRepository(project)
    for name in ("main", "heads/main", "refs/heads/main", "HEAD", "@"):
        assert sources.ref(name) == Source("main", head, default=True)
    for name in (head, head[:8], "main~0", "main^{}"):
        assert sources.ref(name) == Source(head, head)
    other = tip(project, "feature/one")
    git(project, "update-ref", "refs/pull/7/head", other)
    assert sources.ref("refs/pull/7/head") == sources.ref("pull/7/head") == Source("refs/pull/7/head", other)


def test_a_tag_is_not_taken_for_a_branch(project):
    """A branch may have secrets that a tag of its name, or one that looks like it, may not."""
    other = tip(project, "feature/one")
    git(project, "tag", "main", other)
    git(project, "tag", "-a", "-m", "x", "release-1", other)
    sources = CodeRepository(project)
    assert sources.ref("main") == Source("main", tip(project, "refs/heads/main"), default=True)
    assert sources.ref("refs/tags/main") == Source("refs/tags/main", other)
    assert sources.ref("release-1") == Source("refs/tags/release-1", other)
    assert names(sources.changed_since("main")) == ["feature/one", "feature/two"]


ELSE = ["refs/heads/main", "refs/tags/v1", "refs/pull/7/head", "HEAD", WORKTREE, "origin/main", "a" * 40]


@pytest.mark.parametrize("name", thorough_but(ELSE, "refs/heads/main", "HEAD", "a" * 40))
@pytest.mark.parametrize("prefix", ["refs/heads/", "refs/remotes/origin/"])
def test_a_branch_that_calls_itself_like_something_else(project, prefix, name):
    """Neither is it taken for that, nor do globs for that match it."""
    main, evil = tip(project, "main"), commit(project, {"a": "evil"})
    git(project, "reset", "-q", "--hard", "HEAD~1")
    for ref in ("refs/tags/v1", "refs/pull/7/head", "refs/remotes/origin/main"):
        git(project, "update-ref", ref, main)
    git(project, "update-ref", f"{prefix}{name}", evil)
    sources = CodeRepository(project)
    found = [source for source in sources.branches() if source.commit == evil]
    if f"{prefix}{name}" == "refs/remotes/origin/HEAD":
        assert found == []
    elif name == "origin/main":
        assert found == [Source("origin/main", evil)]
    else:
        assert found == [Source(f"refs/heads/{name}", evil)] == sources.branches([f"refs/heads/{name}"])
    assert sources.default == Source("main", main, default=True)
    if f"{prefix}{name}" == "refs/heads/origin/main":  # git, too, takes that first
        assert sources.ref(name) == Source(name, evil)
    elif name not in ("a" * 40, WORKTREE):
        assert sources.ref(name).commit == main


def test_a_branch_is_not_taken_for_the_commit_it_is_called_like(project):
    main = tip(project)
    git(project, "update-ref", f"refs/heads/{main}", "feature/one")
    sources = CodeRepository(project)
    assert sources.ref(main) == Source(main, main)
    assert names(sources.branches())[-1] == f"refs/heads/{main}"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-h",
        "--all",
        "--output=x",
        "nothing",
        "HEAD:a",
        "HEAD^{tree}",
        "main..feature/one",
        "a\nb",
        "x" * 501,
        "^main",
    ],
)
def test_what_is_no_ref(project, name):
    with pytest.raises(UsageError, match=r"no commit|cannot be a ref"):
        CodeRepository(project).ref(name)


# States of repositories


def test_no_repository(tmp_path):
    with pytest.raises(UsageError, match="no git repository"):
        CodeRepository(tmp_path)
    with pytest.raises(UsageError, match="no directory"):
        CodeRepository(tmp_path / "nothing")


def test_no_commit(tmp_path):
    sources = CodeRepository(repository(tmp_path / "project"))
    assert sources.branches([]) == []
    with pytest.raises(UsageError, match="no branch matches"):
        sources.branches(["main"])
    with pytest.raises(UsageError, match="default"):
        _ = sources.default_branch
    with pytest.raises(UsageError, match="no commit"):
        sources.ref("HEAD")
    (sources.folder / "a").write_text("a")
    assert filled(sources.tree(sources.worktree()))[0] == {"a": b"a"}


def test_below_the_top(project):
    (project / "folder").mkdir()
    assert CodeRepository(project / "folder").folder == project
    assert CodeRepository(project / "folder").identity == CodeRepository(project).identity


def test_a_relative_folder(project, monkeypatch):
    monkeypatch.chdir(project)
    assert CodeRepository(Path()).folder == project


def test_a_bare_repository(project, tmp_path):
    git(tmp_path, "clone", "-q", "--bare", str(project), "bare.git")
    bare = tmp_path / "bare.git"
    git(bare, "symbolic-ref", "HEAD", "refs/heads/feature/one")
    sources = CodeRepository(bare)
    assert sources.folder == bare
    assert sources.default_branch == "feature/one"
    assert filled(sources.tree(sources.ref("feature/two")))[0] == {"a": b"feature/two"}
    assert sources.identity != CodeRepository(project).identity
    with pytest.raises(UsageError, match="bare"):
        sources.worktree()


def test_a_linked_work_tree(project, tmp_path):
    git(project, "worktree", "add", "-q", str(tmp_path / "linked"), "feature/one")
    (tmp_path / "linked" / "new").write_text("new")
    sources = CodeRepository(tmp_path / "linked")
    assert sources.folder == tmp_path / "linked"
    assert sources.identity == CodeRepository(project).identity
    assert sources.ref("HEAD").branch == "feature/one"
    assert filled(sources.tree(sources.ref("main")))[0] == {"a": b"main"}
    assert filled(sources.tree(sources.worktree()))[0] == {"a": b"feature/one", "new": b"new"}


def test_a_detached_head(project):
    git(project, "checkout", "-q", "--detach", "feature/one")
    sources = CodeRepository(project)
    assert sources.ref("HEAD") == Source("HEAD", tip(project))
    assert sources.default_branch == "main"
    assert names(sources.branches()) == ["main", "feature/one", "feature/two"]


def test_a_shallow_clone(project, tmp_path):
    commit(project, {"b": "b"})
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{project}", "shallow")
    sources = CodeRepository(tmp_path / "shallow")
    assert filled(sources.tree(sources.ref("main")))[0] == {"a": b"main", "b": b"b"}
    with (tmp_path / "bundle").open("wb") as file, pytest.raises(UsageError, match="shallow") as caught:
        sources.bundle(sources.ref("main"), file)
    assert "fetch-depth: 0" in caught.value.resolution


def test_another_hash(tmp_path):
    folder = repository(tmp_path / "project", "--object-format=sha256")
    commit(folder, {"a": "a", "folder/b": "b"})
    sources = CodeRepository(folder)
    source = sources.ref("HEAD")
    assert len(source.commit) == 64
    assert filled(sources.tree(source))[0] == {"a": b"a", "folder/b": b"b"}
    assert sources.tree(source).digest() == sources.worktree().commit
    cloned = bundled(sources, source, tmp_path)
    assert tip(cloned) == source.commit


def test_clone_that_borrows_objects_is_used_once_it_has_its_own(project, tmp_path):
    borrower = tmp_path / "borrower"
    git(tmp_path, "clone", "-q", "--shared", str(project), "borrower")
    with pytest.raises(UsageError, match="borrows objects") as caught:
        CodeRepository(borrower)
    assert "git repack -a -d" in caught.value.resolution
    git(borrower, "repack", "-q", "-a", "-d")
    (borrower / ".git" / "objects" / "info" / "alternates").unlink()
    sources = CodeRepository(borrower)
    assert filled(sources.tree(sources.ref("feature/one")))[0] == {"a": b"feature/one"}


def test_objects_in_packs(project):
    git(project, "gc", "-q")
    git(project, "pack-refs", "--all")
    sources = CodeRepository(project)
    assert filled(sources.tree(sources.ref("feature/one")))[0] == {"a": b"feature/one"}


def test_replaced_objects_are_not_replaced(project):
    """git replace is of this computer alone; a machine gets what the commit says."""
    git(project, "replace", tip(project, "main"), tip(project, "feature/one"))
    sources = CodeRepository(project)
    assert filled(sources.tree(sources.ref("main")))[0] == {"a": b"main"}


def test_many_branches(project):
    """git's answer is longer than what is kept of others."""
    names = sorted(f"refs/heads/{'x' * 200}{number}" for number in range(6000))
    head = tip(project)
    lines = ["# pack-refs with: peeled fully-peeled sorted ", *(f"{head} {name}" for name in names), ""]
    (project / ".git" / "packed-refs").write_text("\n".join(lines))
    assert len(CodeRepository(project).branches()) == 6003


# Bundles


def bundled(sources, source, folder):
    with (folder / "bundle").open("wb") as file:
        sources.bundle(source, file)
    git(folder, "clone", "-q", "bundle", "cloned")
    return folder / "cloned"


def test_a_bundle_is_a_branch_with_its_history(project, tmp_path):
    git(project, "tag", "v1", "main")
    git(project, "tag", "-a", "-m", "x", "v2", "feature/one")
    git(project, "tag", "-a", "-m", "x", "secret", "feature/two")
    secret = tip(project, "feature/two")
    sources = CodeRepository(project)
    cloned = bundled(sources, sources.ref("feature/one"), tmp_path)
    assert git(cloned, "symbolic-ref", "HEAD") == "refs/heads/feature/one"
    assert (cloned / "a").read_text() == "feature/one"
    assert git(cloned, "tag").split() == ["v1", "v2"]
    assert git(cloned, "describe") == "v2"
    objects = git(cloned, "cat-file", "--batch-check", "--batch-all-objects").split()
    assert tip(project, "feature/one") in objects
    assert secret not in objects
    assert tip(project, "secret") not in objects


def test_bundle_of_a_ref_that_is_no_branch_has_its_commit(project, tmp_path):
    git(project, "update-ref", "refs/pull/7/head", "feature/one")
    git(project, "checkout", "-q", "--detach", "feature/one")
    for number, name in enumerate(("refs/pull/7/head", tip(project, "feature/one"), "HEAD")):
        (tmp_path / str(number)).mkdir()
        sources = CodeRepository(project)
        assert tip(bundled(sources, sources.ref(name), tmp_path / str(number))) == tip(project, "feature/one")


def test_a_bundle_for_a_work_tree(project, tmp_path):
    (project / "a").write_text("not committed")
    sources = CodeRepository(project)
    cloned = bundled(sources, sources.worktree(), tmp_path)
    assert (cloned / "a").read_text() == "main"
    assert git(cloned, "symbolic-ref", "HEAD") == "refs/heads/main"


# Single files


def test_reading_a_file(project):
    head = commit(project, {"folder/b": "b" * 10})
    (project / "link").symlink_to("/etc/passwd")
    linked = commit(project, {})
    sources = CodeRepository(project)
    (project / "folder" / "b").write_text("changed")
    assert sources.read(head, "folder/b", 10) == b"b" * 10
    assert sources.read(WORKTREE, "folder/b", 10) == b"changed"
    for where in (linked, WORKTREE):
        for nothing in ("folder", "link", "nothing", "/etc/passwd", "../project/a", "", "a\nb"):
            assert sources.read(where, nothing, 10_000) is None
    for where in (head, WORKTREE):
        with pytest.raises(UsageError, match="more than 5"):
            sources.read(where, "folder/b", 5)
    with pytest.raises(UsageError, match="name of a commit"):
        sources.read("main", "a", 10)


def test_exporting_a_folder(project, tmp_path):
    (project / "microvm" / "kits" / "web").mkdir(parents=True)
    (project / "microvm" / "kits" / "web" / "link").symlink_to("/etc/passwd")
    (project / "microvm" / "kits" / "web" / "start").write_text("#!/bin/sh\n")
    (project / "microvm" / "kits" / "web" / "start").chmod(0o755)
    commit(project, {"microvm/kits/web/kit.toml": 'parent = "base"\n', "microvm/kitsch": "x"})
    sources = CodeRepository(project)
    assert sources.export("main", "microvm/kits", tmp_path / "out")
    files = {
        str(path.relative_to(tmp_path / "out")): path
        for path in (tmp_path / "out").rglob("*")
        if not path.is_dir()
    }
    assert set(files) == {"microvm/kits/web/kit.toml", "microvm/kits/web/start"}
    assert files["microvm/kits/web/kit.toml"].read_text() == 'parent = "base"\n'
    assert os.access(files["microvm/kits/web/start"], os.X_OK)
    assert not sources.export("feature/one", "microvm/kits", tmp_path / "none")


# The definition

JOBS = '[ci.jobs.{0}]\nsteps = ["true"]\n'
PYPROJECT_JOBS = '[tool.pytest-microvm.ci.jobs.{0}]\nsteps = ["true"]\n'


def keys(definition):
    return [job.key for job in definition.jobs]


def test_the_definition_comes_from_the_default_branch(project):
    commit(project, {"pyproject.toml": PYPROJECT_JOBS.format("trusted")})
    git(project, "switch", "-q", "-c", "evil")
    commit(project, {"pyproject.toml": PYPROJECT_JOBS.format("evil"), "microvm.toml": JOBS.format("worse")})
    sources = CodeRepository(project)
    definition = read_definition(sources)
    assert keys(definition) == ["trusted"]
    assert definition.where == f"main:pyproject.toml ({tip(project, 'main')[:7]})"
    assert keys(read_definition(sources, "evil")) == ["worse"]
    assert read_definition(sources, tip(project, "evil")).where.startswith("commit:microvm.toml (")
    assert keys(read_definition(sources, WORKTREE)) == ["worse"]
    (project / "microvm.toml").unlink()
    assert keys(read_definition(sources, WORKTREE)) == ["evil"]
    assert read_definition(sources, WORKTREE).where == "pyproject.toml"


def test_no_definition(project):
    sources = CodeRepository(project)
    with pytest.raises(UsageError, match="no jobs are defined") as caught:
        read_definition(sources)
    assert "worktree" in caught.value.resolution
    commit(project, {"pyproject.toml": "[project]\n", "microvm.toml": ""})
    with pytest.raises(UsageError, match="no jobs are defined"):
        read_definition(sources, "main")


def test_a_definition_that_is_wrong(project):
    commit(project, {"microvm.toml": "[ci.jobs.a]\nstep = 1\n"})
    with pytest.raises(UsageError, match=r"main:microvm.toml \([0-9a-f]{7}\): ci.jobs.a.step: unknown key"):
        read_definition(CodeRepository(project))
    (project / "microvm.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"microvm\.toml is not UTF-8"):
        read_definition(CodeRepository(project), WORKTREE)


def test_error_that_quotes_a_definition_commands_nothing(project, capsys):
    text = r"[ci.jobs.a]" + "\n" + r'"\n::error::forged\n\u001b]0;forged\u0007" = 1'
    commit(project, {"microvm.toml": text})
    assert main(["ci", "run", "--dry-run", "-C", str(project)]) == 4
    said = capsys.readouterr().err
    assert "forged: unknown key" in said.replace(r"\x07", "")
    assert "\x1b" not in said
    assert "\n::" not in said


def test_a_branch_whose_objects_are_gone(project):
    name = tip(project, "feature/one^{tree}")
    (project / ".git" / "objects" / name[:2] / name[2:]).unlink()
    sources = CodeRepository(project)
    with pytest.raises(GitError):
        sources.tree(sources.ref("feature/one")).digest()
    assert sources.tree(sources.ref("main")).digest()


OWN_KIT = 'parent = "base"\nsetup = ["true"]\nnetwork = ["pip"]\n'


def test_a_kit_of_the_project_is_asked_for(project):
    """Its setup runs on this computer; whose kit it is, and what is in it, is what is trusted."""
    jobs = '[ci.jobs.a]\nsteps = ["x"]\nimage = "${matrix.kit}"\nmatrix = { kit = ["web", "base", "none"] }\n'
    jobs += '[ci.jobs.b]\nsteps = ["x"]\nimage = "microvm/kits/web"\nnetwork = []\n'
    commit(project, {"microvm.toml": jobs, "microvm/kits/web/kit.toml": OWN_KIT})
    asked = read_definition(CodeRepository(project)).asked
    assert set(asked) == {"ci.image.web", "ci.image.microvm/kits/web", "ci.jobs.a.network"}
    assert asked["ci.jobs.a.network"] == ["pip"]
    assert asked == read_definition(CodeRepository(project), WORKTREE).asked
    (project / "microvm" / "kits" / "web" / "kit.toml").write_text(OWN_KIT.replace("true", "false"))
    assert asked == read_definition(CodeRepository(project)).asked
    changed = read_definition(CodeRepository(project), WORKTREE).asked
    assert changed["ci.image.web"] != asked["ci.image.web"]
    git(project, "switch", "-q", "-c", "evil")
    commit(project, {})
    assert asked == read_definition(CodeRepository(project)).asked
    assert changed == read_definition(CodeRepository(project), "evil").asked
