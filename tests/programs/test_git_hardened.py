"""Repositories of strangers: what a clone or an archive brings along never acts when we look at it."""

import hashlib
import io
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest

from pytest_microvm.ci.sources.repository import CodeRepository, read_definition
from pytest_microvm.cli import main
from pytest_microvm.errors import MicroVMError, UsageError
from pytest_microvm.git.commands import GitError
from pytest_microvm.git.commands import git as our_git
from pytest_microvm.git.repository import checkout_at, find_checkout
from pytest_microvm.mounts.git_clone import Clone
from pytest_microvm.network.policy.presets import read_preset
from pytest_microvm.settings.mounts import Mount
from pytest_microvm.suite.plan import workspace_of
from pytest_microvm.suite.workspace import scan
from support.repositories import blob, commit, filled, git, repository
from support.strange_repositories import clone_with_embedded, set_promisor
from support.tiers import thorough_but

MACHINE = SimpleNamespace(client=SimpleNamespace(id="x"))
OURS = '[ci.jobs.ours]\nsteps = ["true"]\n'


@pytest.fixture(autouse=True)
def _user(tmp_path, monkeypatch):
    """Give the user a home without configuration, far from what is tested."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    for name in ("XDG_CONFIG_HOME", "GIT_CONFIG_GLOBAL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(tmp_path):
    """Return a repository with one commit, and a work tree as it was unpacked from an archive."""
    folder = repository(tmp_path / "project")
    commit(folder, {"a": "a", "microvm.toml": OURS, ".gitattributes": "*.x filter=x diff=x\n", "b.x": "b"})
    return folder


@pytest.fixture
def trap(tmp_path):
    """Return a program that leaves a mark, and the mark."""
    mark, program = tmp_path / "mark", tmp_path / "trap"
    program.write_text(f"#!/bin/sh\necho sprung >>{mark}\nexit 1\n")
    program.chmod(0o755)
    return program, mark


def plain(folder, *arguments):
    """Run git as a user would, whatever comes of it; return what it printed."""
    done = subprocess.run(
        ["git", "-C", folder, *arguments], capture_output=True, check=False, timeout=60, text=True
    )
    return done.stdout


def springs(mark):
    """Whether a trap has sprung; it is set again."""
    sprung = mark.exists()
    mark.unlink(missing_ok=True)
    return sprung


def paths(folder):
    return [entry.path for entry in scan(folder).entries]


def use_all(folder, tmp_path):
    """Do everything with a repository that the host does, as far as it can be done."""
    with suppress(MicroVMError):
        scan(folder).digest()
    with suppress(MicroVMError):
        scan(folder, git=True).write_tar(io.BytesIO())
    with suppress(MicroVMError):
        read_preset("git", folder)
    with suppress(MicroVMError):
        Clone(MACHINE, Mount(folder, PurePosixPath("/r"), "rw", "git"))._make_clone(tmp_path / "handed")
    with suppress(MicroVMError):
        sources = CodeRepository(folder)
        read_definition(sources)
        sources.branches()
        sources.changed_since("main")
        source = sources.ref("HEAD")
        sources.worktree()
        filled(sources.tree(source))
        with (tmp_path / "bundle").open("wb") as file:
            sources.bundle(source, file)


# A folder of a clone that is a repository


@pytest.fixture
def clone(tmp_path, trap):
    """Return an ordinary clone of a repository in which the folder sub is a repository, too."""
    return clone_with_embedded(tmp_path, trap[0], {"microvm.toml": OURS})


def test_embedded_repository_springs_when_git_finds_it(clone, trap):
    """The control: git itself takes the folder for a repository, fetches by a program, and lists the link."""
    listed = plain(clone / "sub", "ls-files", "-co", "--exclude-standard").splitlines()
    assert springs(trap[1])
    assert "link/secret.txt" in listed
    assert (clone / "sub" / "link" / "secret.txt").read_text() == "secret"


def test_embedded_repository_is_part_of_the_clone(clone, trap, tmp_path):
    found = paths(clone / "sub")
    assert not springs(trap[1])
    assert "link" in found
    assert "HEAD" in found
    assert "link/secret.txt" not in found
    assert find_checkout(clone / "sub").top == clone
    use_all(clone / "sub", tmp_path)
    assert not springs(trap[1])


def test_embedded_repository_defines_no_jobs(clone):
    sources = CodeRepository(clone / "sub", bare=False)
    assert sources.folder == clone
    assert [job.name for job in read_definition(sources).jobs] == ["ours"]
    with pytest.raises(UsageError, match="bare repository in the work tree"):
        CodeRepository(clone / "sub")


def test_embedded_repository_is_not_the_workspace(clone, tmp_path):
    (tmp_path / "spelled").symlink_to(clone)
    for folder in (clone, tmp_path / "spelled"):
        assert workspace_of(SimpleNamespace(rootpath=folder / "sub", args_source=None)) == folder
    assert workspace_of(SimpleNamespace(rootpath=tmp_path, args_source=None)) == tmp_path


def test_embedded_repository_is_not_what_ci_runs(clone, trap, monkeypatch, capsys):
    monkeypatch.chdir(clone / "sub")
    assert main(["ci", "run", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "ours" in shown
    assert "theirs" not in shown
    assert main(["ci", "run", "--dry-run", "-C", "."]) == 4
    assert "bare repository in the work tree" in capsys.readouterr().err
    assert not springs(trap[1])


def test_embedded_repository_gives_no_network_rule(clone):
    assert [str(rule.target) for rule in read_preset("git", clone / "sub").rules] == ["ours.example"]


def test_bare_repository_is_taken_only_where_it_is_named(clone, tmp_path):
    git(tmp_path, "clone", "-q", "--bare", str(clone), "bare.git")
    assert CodeRepository(tmp_path / "bare.git").folder == tmp_path / "bare.git"
    with pytest.raises(UsageError, match="no git repository"):
        CodeRepository(tmp_path / "bare.git", bare=False)
    assert find_checkout(tmp_path / "bare.git") is None
    with pytest.raises(GitError):
        our_git("-C", tmp_path / "bare.git", "rev-parse", "--git-dir")


# An archive's .git: programs


def settings(trap, project):
    hooks = project / ".git" / "hooks"
    hooks.mkdir()
    (hooks / "post-index-change").write_text(trap.read_text())
    (hooks / "post-index-change").chmod(0o755)
    (project.parent / "included").write_text(f"[core]\n\tfsmonitor = {trap}\n")
    return {
        "fsmonitor": ({"core.fsmonitor": trap}, ["status"]),
        "hooks": ({}, ["update-index", "--refresh"]),
        "ssh": ({"core.sshCommand": trap, "remote.origin.url": "ssh://x.invalid/x"}, ["fetch"]),
        "external diff": ({"diff.external": trap}, ["diff"]),
        "text of a diff": ({"diff.x.textconv": trap}, ["diff"]),
        "clean filter": ({"filter.x.clean": trap}, ["diff"]),
        "process filter": ({"filter.x.process": trap}, ["diff"]),
        "smudge filter": ({"filter.x.smudge": trap}, ["checkout", "-f", "HEAD", "--", "b.x"]),
        "signature": ({"gpg.program": trap, "commit.gpgSign": "true"}, ["commit", "-qam", "x"]),
        "include": ({"include.path": project.parent / "included"}, ["status"]),
        "include if": ({"includeIf.gitdir:**.path": project.parent / "included"}, ["status"]),
        "upload": (
            {"remote.origin.url": str(project), "remote.origin.uploadpack": trap},
            ["fetch", "origin"],
        ),
    }


NAMES = [
    "fsmonitor", "hooks", "ssh", "external diff", "text of a diff", "clean filter", "process filter",
    "smudge filter", "signature", "include", "include if", "upload",
]  # fmt: skip


@pytest.mark.parametrize("name", thorough_but(NAMES, "fsmonitor", "hooks", "ssh", "clean filter", "include"))
def test_program_of_an_archives_configuration_is_not_run(project, trap, tmp_path, name):
    values, springing = settings(trap[0], project)[name]
    for key, value in values.items():
        git(project, "config", key, str(value))
    if name != "hooks":
        shutil.rmtree(project / ".git" / "hooks")
    (project / "b.x").write_text("changed")
    plain(project, "-c", "user.name=x", "-c", "user.email=x@x.invalid", *springing)
    assert springs(trap[1]), "the trap is none"
    (project / "b.x").write_text("changed again")
    use_all(project, tmp_path)
    assert not springs(trap[1])
    assert "b.x" in paths(project)
    assert filled(CodeRepository(project).tree(CodeRepository(project).ref("HEAD")))[0]["b.x"]


def test_all_names_are_tried(project, trap):
    assert [*settings(trap[0], project)] == NAMES


def test_partial_clone_fetches_nothing(project, trap, tmp_path):
    commit(project, {"big": "big"})
    missing = git(project, "rev-parse", "HEAD:big")
    set_promisor(project, trap[0])
    (project / ".git" / "objects" / missing[:2] / missing[2:]).unlink()
    plain(project, "cat-file", "-p", missing)
    assert springs(trap[1]), "the trap is none"
    use_all(project, tmp_path)
    assert not springs(trap[1])


def test_handing_over_a_partial_clone_runs_nothing(project, trap, tmp_path, monkeypatch):
    """git at the other end of a local fetch obeys the repository's configuration: it never sees it."""
    commit(project, {"big": "big"})
    missing = git(project, "rev-parse", "HEAD:big")
    set_promisor(project, trap[0])
    git(project, "config", "remote.origin.url", str(project))
    git(project, "config", "remote.origin.uploadpack", str(trap[0]))
    (project / ".git" / "objects" / missing[:2] / missing[2:]).unlink()
    git(tmp_path, "init", "--quiet", "--bare", "control")
    monkeypatch.setenv("GIT_NO_LAZY_FETCH", "0")  # else newer releases do not fetch for others
    plain(tmp_path / "control", "fetch", "--quiet", str(project), "HEAD:x")
    assert springs(trap[1]), "the trap is none"
    with pytest.raises(GitError):
        Clone(MACHINE, Mount(project, PurePosixPath("/r"), "ro", "git"))._make_clone(tmp_path / "handed")
    assert not springs(trap[1])


# What the environment says


def test_environment_of_a_hook_changes_nothing(project, trap, tmp_path, monkeypatch):
    """As git sets it for a hook that starts us, or a shell for another repository."""
    other = repository(tmp_path / "other")
    commit(other, {"other": "other"})
    before, head = paths(project), CodeRepository(project).ref("HEAD")
    for name, value in {
        "GIT_DIR": other / ".git", "GIT_WORK_TREE": other, "GIT_INDEX_FILE": other / ".git" / "index",
        "GIT_OBJECT_DIRECTORY": other / ".git" / "objects", "GIT_COMMON_DIR": other / ".git",
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": other / ".git" / "objects", "GIT_NAMESPACE": "x",
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.fsmonitor", "GIT_CONFIG_VALUE_0": trap[0],
        "GIT_EXTERNAL_DIFF": trap[0], "GIT_SSH_COMMAND": trap[0], "GIT_TRACE": tmp_path / "trace",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    assert paths(project) == before
    assert CodeRepository(project).ref("HEAD") == head
    assert not springs(trap[1])
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("folder", ["", ".", "tools"])
def test_program_of_the_project_is_not_git(project, trap, monkeypatch, folder):
    place = project / folder
    place.mkdir(exist_ok=True)
    shutil.copy(trap[0], place / "git")
    monkeypatch.chdir(project)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{path}")
    subprocess.run(["git", "version"], check=False, capture_output=True)
    assert springs(trap[1]), "the trap is none"
    monkeypatch.setenv("PATH", path)
    expected = paths(project)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{path}")
    assert paths(project) == expected
    assert not springs(trap[1])


# An archive's .git: what it says about files


def test_configured_work_tree_outside_is_not_listed(project, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    git(project, "config", "core.worktree", str(outside))
    assert "secret.txt" in plain(project, "ls-files", "-o")
    assert paths(project) == [".gitattributes", "a", "b.x", "microvm.toml"]
    assert CodeRepository(project).folder == project
    sources = CodeRepository(project)
    assert filled(sources.tree(sources.worktree()))[0]["a"] == b"a"


def test_work_tree_in_a_configuration_of_its_own_is_not_listed(project, tmp_path):
    (tmp_path / "outside").mkdir()
    git(project, "config", "extensions.worktreeConfig", "true")
    (project / ".git" / "config.worktree").write_text(f"[core]\n\tworktree = {tmp_path / 'outside'}\n")
    assert plain(project, "rev-parse", "--show-toplevel").strip() == str(tmp_path / "outside")
    assert "a" in paths(project)


def test_excludes_file_of_the_configuration_is_not_applied(project, tmp_path):
    (tmp_path / "everything").write_text("*\n")
    git(project, "config", "core.excludesFile", str(tmp_path / "everything"))
    (project / "new").write_text("new")
    assert "new" not in plain(project, "ls-files", "-o", "--exclude-standard")
    assert "new" in paths(project)


def test_attributes_of_another_file_change_nothing(project, tmp_path):
    (tmp_path / "attributes").write_text("* text eol=crlf\n")
    git(project, "config", "core.attributesFile", str(tmp_path / "attributes"))
    assert filled(CodeRepository(project).tree(CodeRepository(project).ref("HEAD")))[0]["a"] == b"a"


def test_grafts_change_nothing(project):
    first, second = git(project, "rev-parse", "HEAD"), commit(project, {"a": "second"})
    (project / ".git" / "info").mkdir()
    (project / ".git" / "info" / "grafts").write_text(f"{second}\n")
    assert plain(project, "rev-list", "--count", "HEAD").strip() == "1"
    git(project, "branch", "old", first)
    git(project, "branch", "new", second)
    assert {one.branch for one in CodeRepository(project).changed_since("old")} == {"main", "new"}
    assert checkout_at(project).repository.git("rev-list", "--count", "HEAD").strip() == "2"


@pytest.mark.parametrize("way", ["ci", "mount"])
def test_repository_that_borrows_anothers_objects_is_refused(project, tmp_path, way):
    """It needs the name of a commit; such names get about, in version numbers for one."""
    private = repository(tmp_path / "private")
    secret = commit(private, {"secret": "the user's"})
    objects = project / ".git" / "objects"
    (objects / "info").mkdir(exist_ok=True)
    (objects / "info" / "alternates").write_text(f"{private}/.git/objects\n")
    (project / ".git" / "refs" / "heads" / "main").write_text(f"{secret}\n")
    assert plain(project, "show", "main:secret") == "the user's"  # the control
    mount = Mount(project, PurePosixPath("/r"), "rw", "git")
    read = {"ci": lambda: CodeRepository(project), "mount": lambda: Clone(MACHINE, mount)}
    with pytest.raises(UsageError, match="borrows objects of another repository"):
        read[way]()
    assert {*paths(project)} == {"a", "b.x", "microvm.toml", ".gitattributes"}  # to list files is harmless


def test_index_that_names_what_is_not_there(project, tmp_path):
    """Names of an index lead nowhere: not upwards, not behind links, not into the repository."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (project / "link").symlink_to(outside)
    index = project / ".git" / "index"
    for name in ("link/secret.txt", "XX/outside/secret.txt", "XXXX/config"):
        git(project, "update-index", "--add", "--cacheinfo", f"100644,{blob(project, b'x')},{name}")
    data = index.read_bytes().replace(b"XX/outside", b"../outside").replace(b"XXXX/config", b".git/config")
    index.write_bytes(data[:-20] + hashlib.sha1(data[:-20]).digest())  # noqa: S324 - git's own
    listed = plain(project, "ls-files").splitlines()
    assert {"link/secret.txt", "../outside/secret.txt", ".git/config"} <= set(listed)
    assert paths(project) == [".gitattributes", "a", "b.x", "link", "microvm.toml"]


@pytest.mark.parametrize(
    "part", ["HEAD", "config", "refs", "objects", "index", "packed-refs", "info/exclude", "shallow"]
)
def test_part_of_a_repository_that_is_a_link_is_refused(project, tmp_path, part):
    git(project, "pack-refs", "--all")
    (project / ".git" / "info").mkdir()
    for name in ("info/exclude", "shallow"):
        (project / ".git" / name).touch()
    shutil.move(project / ".git" / part, tmp_path / "part")
    (project / ".git" / part).symlink_to(tmp_path / "part")
    with pytest.raises(UsageError, match="link"):
        scan(project)


def test_git_folder_that_is_a_link_is_refused(project, tmp_path):
    shutil.move(project / ".git", tmp_path / "elsewhere")
    (project / ".git").symlink_to(tmp_path / "elsewhere")
    assert plain(project, "rev-parse", "HEAD")
    for use in (scan, CodeRepository):
        with pytest.raises(UsageError, match="it is a link"):
            use(project)


@pytest.mark.parametrize("how", ["gitfile", "commondir", "worktree"])
def test_git_pointer_to_another_repository_is_refused(project, tmp_path, how):
    """An archive cannot say that a repository of this computer is its own."""
    private = repository(tmp_path / "private")
    commit(private, {"secret": "secret"})
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    if how == "gitfile":
        (stranger / ".git").write_text(f"gitdir: {private}/.git\n")
    elif how == "commondir":
        shutil.copytree(project / ".git", stranger / ".git")
        (stranger / ".git" / "commondir").write_text(f"{private}/.git\n")
    else:
        git(private, "worktree", "add", "-q", str(tmp_path / "linked"))
        (stranger / ".git").write_text(f"gitdir: {private}/.git/worktrees/linked\n")
    assert "secret" in plain(stranger, "ls-tree", "--name-only", "HEAD:") + plain(
        stranger, "show", "--name-only", "main"
    )
    for use in (scan, CodeRepository):
        with pytest.raises(UsageError, match="is not used"):
            use(stranger)


def test_folder_whose_name_would_be_two_lends_no_objects(tmp_path):
    """Git's list of places to borrow from has one in each line."""
    private = repository(tmp_path / "private")
    secret = commit(private, {"secret": "secret"})
    folder = repository(tmp_path / f"x\n{private}".rstrip("/"))
    commit(folder, {"a": "a"})
    with pytest.raises(GitError, match="such a name"):
        filled(CodeRepository(folder)._tree(secret))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_repository_that_another_user_put_above(tmp_path, monkeypatch):
    """As somebody may do in /tmp: it is not the project's."""
    above = repository(tmp_path / "above")
    (above / "project").mkdir()
    os.chown(above / ".git", 1000, 1000)
    with pytest.raises(UsageError, match="belongs to another user"):
        find_checkout(above / "project")
    os.chown(above / "project", 1000, 1000)  # who works in that user's folder has chosen it
    assert find_checkout(above / "project").top == above


def test_repository_that_git_cannot_read_is_an_error(project):
    (project / ".git" / "index").write_bytes(b"no index")
    (project / "secret.log").write_text("ignored, or not")
    with pytest.raises(UsageError, match="cannot tell which files are ignored"):
        scan(project)


# Honest repositories


def ignoring(text, place):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)


@pytest.mark.parametrize("how", ["by default", "XDG", "named", "tilde", "included", "variable"])
def test_files_that_the_user_ignores_everywhere_stay_here(project, tmp_path, monkeypatch, how):
    home = tmp_path / "home"
    (project / "notes.mine").write_text("mine")
    assert "notes.mine" in paths(project)
    if how == "by default":
        ignoring("*.mine\n", home / ".config" / "git" / "ignore")
    elif how == "XDG":
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
        ignoring("*.mine\n", tmp_path / "xdg" / "git" / "ignore")
    else:
        ignoring("*.mine\n", home / "ignored")
        value = "~/ignored" if how == "tilde" else str(home / "ignored")
        text = f"[core]\n\texcludesFile = {value}\n"
        if how == "variable":
            monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "configuration"))
            (tmp_path / "configuration").write_text(text)
        elif how == "included":
            (home / "more").write_text(text)
            (home / ".gitconfig").write_text("[include]\n\tpath = more\n")
        else:
            (home / ".gitconfig").write_text(text)
    assert "notes.mine" not in plain(project, "ls-files", "-o", "--exclude-standard")
    assert "notes.mine" not in paths(project)


def test_files_that_this_clone_alone_ignores_stay_here(project):
    (project / ".git" / "info").mkdir()
    (project / ".git" / "info" / "exclude").write_text("*.mine\n")
    (project / "notes.mine").write_text("mine")
    assert "notes.mine" not in paths(project)


def test_below_the_top_the_rules_of_the_top_count(project):
    commit(project, {".gitignore": "*.log\n", "sub/b": "b"})
    (project / "sub" / "x.log").write_text("x")
    assert paths(project / "sub") == ["b"]


def test_linked_work_tree_is_listed_by_its_own_index(project, tmp_path):
    git(project, "branch", "other")
    git(project, "worktree", "add", "-q", str(tmp_path / "linked"), "other")
    commit(tmp_path / "linked", {"c": "c", ".gitignore": "*.log\n"})
    (tmp_path / "linked" / "x.log").write_text("x")
    assert paths(tmp_path / "linked") == [".gitattributes", ".gitignore", "a", "b.x", "c", "microvm.toml"]
    assert CodeRepository(tmp_path / "linked").ref("HEAD").branch == "other"


def test_work_tree_linked_to_a_bare_repository(project, tmp_path):
    git(tmp_path, "clone", "-q", "--bare", str(project), "bare.git")
    git(tmp_path / "bare.git", "worktree", "add", "-q", str(tmp_path / "linked"), "main")
    assert "a" in paths(tmp_path / "linked")
    assert CodeRepository(tmp_path / "linked").identity == CodeRepository(tmp_path / "bare.git").identity


def test_submodule_is_listed_by_its_own_rules(project, tmp_path):
    module = repository(tmp_path / "module")
    commit(module, {"m": "m", ".gitignore": "*.log\n"})
    git(project, "submodule", "add", "-q", str(module), "lib/module")
    git(project, "commit", "-qm", "module")
    assert (project / "lib" / "module" / ".git").is_file()
    (project / "lib" / "module" / "x.log").write_text("x")
    (project / "lib" / "module" / "new").write_text("new")
    expected = ["lib/module/.gitignore", "lib/module/m", "lib/module/new"]
    assert [path for path in paths(project) if path.startswith("lib")] == expected
    assert paths(project / "lib" / "module") == [".gitignore", "m", "new"]
    assert CodeRepository(project / "lib" / "module").folder == project / "lib" / "module"
    git(
        project / "lib" / "module", "sparse-checkout", "init", "--cone"
    )  # its work tree is said elsewhere now
    assert paths(project / "lib" / "module") == [".gitignore", "m", "new"]


def test_submodule_that_was_not_fetched_is_an_empty_folder(project, tmp_path):
    module = repository(tmp_path / "module")
    commit(module, {"m": "m"})
    git(project, "submodule", "add", "-q", str(module), "lib")
    git(project, "commit", "-qm", "module")
    git(tmp_path, "clone", "-q", str(project), "cloned")
    assert "lib" in paths(tmp_path / "cloned")


def test_submodule_whose_repository_is_gone_is_copied_whole(project):
    """A copy of a submodule's folder, say, with what it says about its repository."""
    for number, text in enumerate(["gitdir: ../.git/modules/gone\n", "gitdir: /\n", "nonsense", ""]):
        folder = project / f"vendored{number}"
        folder.mkdir()
        (folder / ".git").write_text(text)
        (folder / "v").write_text("v")
        assert [path for path in paths(project) if path.startswith(folder.name)] == [f"{folder.name}/v"]


def test_separate_git_dir_is_refused_until_its_worktree_is_set(tmp_path):
    """After ``git init --separate-git-dir``; the error tells what makes it known."""
    folder = repository(tmp_path / "project", f"--separate-git-dir={tmp_path / 'kept'}")
    commit(folder, {"a": "a"})
    with pytest.raises(UsageError, match="is not its repository") as caught:
        scan(folder)
    assert f"git -C {folder} config core.worktree {folder}" in caught.value.resolution
    git(folder, "config", "core.worktree", str(folder))
    assert paths(folder) == ["a"]


@pytest.mark.parametrize("index", ["split", "sparse", "untracked cache", "version 4"])
def test_other_kinds_of_index(project, index):
    commit(project, {"one/a": "a", "two/b": "b", "two/deep/c": "c"})
    if index == "split":
        git(project, "update-index", "--split-index")
        commit(project, {"three": "3"})
    elif index == "sparse":
        git(project, "sparse-checkout", "init", "--cone", "--sparse-index")
        git(project, "sparse-checkout", "set", "one")
    elif index == "untracked cache":
        git(project, "config", "core.untrackedCache", "true")
        git(project, "update-index", "--untracked-cache")
        git(project, "status")
    else:
        git(project, "update-index", "--index-version", "4")
    (project / "one" / "new").write_text("new")
    found = (path.relative_to(project) for path in project.rglob("*") if path.is_file())
    expected = {str(path) for path in found if ".git" not in path.parts}
    assert {*paths(project)} == expected


@pytest.mark.parametrize("kind", ["plain", "linked", "bare", "shallow", "detached", "packed", "submodule"])
def test_every_kind_of_repository_is_cloned_and_gets_a_branch(project, tmp_path, kind):
    source = tmp_path / "source"
    commit(project, {"c": "c"})
    if kind == "linked":
        git(project, "worktree", "add", "-q", "-b", "side", str(source))
        commit(source, {"w": "w"})
    elif kind in ("bare", "shallow"):
        how = ["--bare"] if kind == "bare" else ["--depth=1"]
        git(tmp_path, "clone", "-q", *how, f"file://{project}", "source")
    elif kind == "submodule":
        outer = repository(tmp_path / "outer")
        git(outer, "submodule", "add", "-q", str(project), "lib")
        source = outer / "lib"
    else:
        source = project
        git(source, *{"detached": ["checkout", "-q", "--detach", "HEAD~1"]}.get(kind, ["gc", "-q"]))
    clone = Clone(MACHINE, Mount(source, PurePosixPath("/r"), "rw", "git"))
    clone._make_clone(tmp_path / "made")
    head = git(source, "rev-parse", "HEAD")
    assert git(tmp_path / "made", "rev-parse", "HEAD") == head
    assert git(tmp_path / "made", "symbolic-ref", "-q", "HEAD") if kind != "detached" else True
    git(tmp_path / "made", "fsck", "--strict")
    assert clone._named(head) == "microvm/x"
    assert git(source, "rev-parse", "refs/heads/microvm/x") == head
    assert git(source, "rev-parse", "HEAD") == head
    git(source, "fsck", "--strict")
