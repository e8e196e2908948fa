"""What a project's configuration grants counts only if its user said so, for exactly these words."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from pytest_microvm.ci.running.run import check_trust
from pytest_microvm.ci.sources.repository import CodeRepository, read_definition
from pytest_microvm.cli import main
from pytest_microvm.errors import KitError, UsageError
from pytest_microvm.git.checkout import CheckedOutRef, checked_out
from pytest_microvm.host.project_grants import asked_by, built_here
from pytest_microvm.settings import trust as project_trust
from pytest_microvm.settings.configuration import load_settings
from pytest_microvm.settings.trust import Grant
from pytest_microvm.suite.addopts import refuse_granting
from support.repositories import git, repository

ASKED = {"network": ["a.example"], "mounts": ["~/.ssh:/keys"]}


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(project_trust.VARIABLE, raising=False)


def allow(folder, asked, branch="", remote=""):
    project_trust.trust(folder, [Grant("configuration", branch, remote, asked)])


def test_empty_configuration_needs_no_trust(tmp_path):
    project_trust.check(tmp_path, {})
    project_trust.check(tmp_path, {"network": []})
    assert not (tmp_path / "state").exists()


def test_untrusted_configuration_is_refused_and_shown(tmp_path):
    with pytest.raises(UsageError, match="nobody has allowed that for a folder without") as caught:
        project_trust.check(tmp_path, ASKED)
    assert caught.value.details == 'mounts = ["~/.ssh:/keys"]\nnetwork = ["a.example"]'


def test_what_was_allowed_is_allowed_until_it_changes(tmp_path):
    allow(tmp_path, ASKED)
    project_trust.check(tmp_path, ASKED)
    project_trust.check(tmp_path, {"network": ["a.example"]})  # the rest comes from the command line, say
    for changed in ({**ASKED, "network": ["b.example"]}, {**ASKED, "secrets": {"A": {"env": "A"}}}):
        with pytest.raises(UsageError):
            project_trust.check(tmp_path, changed)


@pytest.mark.parametrize(
    ("key", "value"), [("keep_tmp", "true"), ("git", "true"), ("write_back", '["*.txt"]')]
)
def test_files_that_come_back_and_history_need_trust(tmp_path, key, value):
    (tmp_path / "pyproject.toml").write_text(f"[tool.pytest-microvm]\n{key} = {value}\n")
    assert set(asked_by(load_settings(tmp_path, {}))) == {key}
    assert asked_by(load_settings(tmp_path, {key: ["*.md"] if key == "write_back" else True})) == {}


def test_another_project_is_not_meant(tmp_path):
    allow(tmp_path, ASKED)
    with pytest.raises(UsageError):
        project_trust.check(tmp_path / "other", ASKED)


def test_it_can_be_taken_back(tmp_path):
    allow(tmp_path, ASKED)
    assert project_trust.revoke(tmp_path)
    assert not project_trust.revoke(tmp_path)
    with pytest.raises(UsageError):
        project_trust.check(tmp_path, ASKED)


def test_it_can_be_taken_back_for_a_branch(tmp_path):
    for branch in ("main", "feature/*"):
        allow(tmp_path, ASKED, branch)
    assert not project_trust.revoke(tmp_path, ["other"])
    assert project_trust.revoke(tmp_path, ["main"])
    assert [grant.branch for grant in project_trust.granted(tmp_path)] == ["feature/*"]


def test_who_starts_the_run_may_answer_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv(project_trust.VARIABLE, "1")
    project_trust.check(tmp_path, ASKED)
    monkeypatch.setenv(project_trust.VARIABLE, "yes")
    with pytest.raises(UsageError):
        project_trust.check(tmp_path, ASKED)


@pytest.mark.parametrize(
    "damaged",
    ["", "[]", "{", '{"network": 7}', '{"format": 2}', '{"format": 2, "grants": [7]}',
     '{"format": 2, "grants": [{"part": "configuration", "branch": "", "remote": "", "keys": 7}]}'],
)  # fmt: skip
def test_a_damaged_note_allows_nothing(tmp_path, damaged):
    allow(tmp_path, ASKED)
    (note,) = (tmp_path / "state").rglob("*.json")
    note.write_text(damaged)
    with pytest.raises(UsageError):
        project_trust.check(tmp_path, ASKED)


def test_a_note_without_branches_allows_nothing_and_is_named(tmp_path):
    allow(tmp_path, ASKED)
    (note,) = (tmp_path / "state").rglob("*.json")
    digests = {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for key, value in ASKED.items()
    }
    note.write_text(json.dumps({**digests, "project": str(tmp_path)}))  # as an earlier version wrote it
    with pytest.raises(UsageError) as caught:
        project_trust.check(tmp_path, ASKED)
    assert "an earlier version was told does not count any more" in caught.value.details


# Branches


@pytest.fixture
def clone(tmp_path):
    """A clone with the branch main and a commit, whose origin has both, too."""
    source = commit(repository(tmp_path / "source"))
    git(tmp_path, "clone", "-q", "--template=", str(source), "clone")
    return tmp_path / "clone"


def commit(folder):
    git(folder, "commit", "-q", "--allow-empty", "-m", "one")
    return folder


def is_allowed(folder):
    return project_trust.is_trusted(folder, ASKED, checked_out(folder))


def test_another_branch_with_the_same_words_is_asked_about(clone):
    allow(clone, ASKED, checked_out(clone).name)
    assert is_allowed(clone)
    git(clone, "checkout", "-q", "-b", "other")
    assert not is_allowed(clone)
    with pytest.raises(UsageError, match="nobody has allowed that for branch other") as caught:
        project_trust.check(clone, ASKED)
    assert "it is allowed for branch main" in caught.value.details
    git(clone, "checkout", "-q", "--detach", "main")
    assert not is_allowed(clone)
    with pytest.raises(UsageError, match=r"nobody has allowed that for commit [0-9a-f]{40}"):
        project_trust.check(clone, ASKED)
    git(clone, "checkout", "-q", "main")
    assert is_allowed(clone)


@pytest.mark.parametrize(
    ("glob", "allowed"),
    [
        ("feature/*", ["feature/a"]), ("*", ["main", "feature/a", "fix"]), ("f*", ["feature/a", "fix"]),
        ("ma?n", ["main"]),
    ],
)  # fmt: skip
def test_globs_are_those_of_ci(clone, glob, allowed):
    allow(clone, ASKED, glob)
    found = []
    for name in ("main", "feature/a", "fix"):
        git(clone, "checkout", "-q", "-B", name)
        found += [name] if is_allowed(clone) else []
    assert found == allowed


@pytest.mark.parametrize(
    ("remote", "merge", "name"),
    [
        ("https://git.example/stranger/fork.git", "refs/heads/feature/a", "feature/a"),  # gh pr checkout
        ("stranger", "refs/heads/feature/a", "feature/a"),
        ("origin", "refs/pull/7/head", "refs/pull/7/head"),
        ("origin", "refs/merge-requests/7/head", "refs/merge-requests/7/head"),
    ],
)
def test_a_strangers_branch_is_not_the_one_of_that_name(clone, remote, merge, name):
    allow(clone, ASKED, "feature/*")
    git(clone, "checkout", "-q", "-b", "feature/a")
    assert is_allowed(clone)
    git(clone, "config", "branch.feature/a.remote", remote)
    git(clone, "config", "branch.feature/a.merge", merge)
    assert checked_out(clone) == CheckedOutRef(name, remote)
    assert not is_allowed(clone)
    allow(clone, ASKED, name, remote)  # as `trust` does it for what is checked out
    assert is_allowed(clone)


@pytest.mark.parametrize(("glob", "allowed"), [("*", False), (project_trust.ANY_BRANCH, True)])
def test_no_glob_is_for_a_commit_or_a_pull_request(clone, glob, allowed):
    allow(clone, ASKED, glob)
    git(clone, "config", "branch.main.merge", "refs/pull/7/head")
    assert is_allowed(clone) == allowed
    git(clone, "config", "branch.main.merge", "refs/heads/main")
    git(clone, "config", "branch.main.remote", "stranger")
    assert is_allowed(clone) == allowed
    git(clone, "checkout", "-q", "--detach")
    assert is_allowed(clone) == allowed
    (clone / ".git").rename(clone / "git")
    assert is_allowed(clone) == allowed


def test_a_branch_that_follows_origin_or_a_local_one_is_ones_own(clone):
    allow(clone, ASKED, "main")
    assert checked_out(clone) == CheckedOutRef("main", "origin")
    assert is_allowed(clone)
    git(clone, "checkout", "-q", "--track", "-b", "local", "main")
    assert checked_out(clone) == CheckedOutRef("local")


def test_a_worktree_has_a_branch_of_its_own(clone, tmp_path):
    git(clone, "worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    assert checked_out(tmp_path / "tree") == CheckedOutRef("other")
    assert checked_out(clone).name == "main"


def test_committed_bare_repository_does_not_name_the_branch(clone, tmp_path):
    """git's discovery would believe the HEAD that a branch has committed."""
    git(tmp_path, "clone", "-q", "--bare", "--template=", str(tmp_path / "source"), str(clone / "sub"))
    git(clone, "checkout", "-q", "-b", "evil")
    assert git(clone / "sub", "rev-parse", "--abbrev-ref", "HEAD") == "main"
    assert checked_out(clone / "sub").name == "evil"


def test_a_branch_called_like_something_else_is_not_that(clone):
    name = git(clone, "rev-parse", "HEAD")
    (clone / ".git" / "HEAD").write_text(f"ref: refs/heads/{name}\n")
    assert checked_out(clone).name == f"refs/heads/{name}"
    (clone / ".git" / "HEAD").write_text("ref: refs/heads/refs/pull/7/head\n")
    assert checked_out(clone).name == "refs/heads/refs/pull/7/head"


def test_a_repository_without_commits_has_a_branch(tmp_path):
    assert checked_out(repository(tmp_path / "new")) == CheckedOutRef("main")


def test_repository_with_an_invalid_head_is_a_usage_error(clone):
    (clone / ".git" / "HEAD").write_text("nonsense\n")
    with pytest.raises(UsageError, match="cannot be told"):
        project_trust.check(clone, ASKED)


def test_the_repositorys_configuration_runs_nothing(clone, tmp_path):
    mark = tmp_path / "ran"
    git(clone, "config", "core.fsmonitor", f"touch {mark}")
    git(clone, "config", "include.path", str(tmp_path / "more"))
    (tmp_path / "more").write_text('[branch "main"]\n\tremote = elsewhere\n')
    assert checked_out(clone) == CheckedOutRef("main", "origin")
    assert not mark.exists()


# The configuration, and the command


def test_the_command_line_takes_the_configurations_place(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest-microvm]\nnetwork = ["a.example"]\nmemory = "1G"\nsecrets.A.env = "HOME"\n'
    )
    assert set(load_settings(tmp_path, {}).asked) == {"network", "secrets"}
    assert set(load_settings(tmp_path, {"network": ["b.example"], "secrets": None}).asked) == {"secrets"}


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "pyproject.toml").write_text('[tool.pytest-microvm]\nprepare_network = ["pip"]\n')
    monkeypatch.chdir(tmp_path)
    steps = [(["--show"], "not allowed"), ([], "allowed"), (["--show"], "allowed"), (["--revoke"], "nothing")]
    for words, said in steps:
        assert main(["trust", *words]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(said)


def said_by(capsys, *words):
    assert main(["trust", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_trust_command_shows_requests_and_branches_granted(clone, monkeypatch, capsys):
    kit = clone / "microvm" / "kits" / "own"
    kit.mkdir(parents=True)
    (kit / "kit.toml").write_text('parent = "base"\nsetup = ["touch /built"]\n')
    (clone / "pyproject.toml").write_text(
        '[tool.pytest-microvm]\nimage = "own"\nsecrets.K.command = "echo a \'b c\'"\n'
    )
    monkeypatch.chdir(clone)
    asked = said_by(capsys, "--show")
    assert asked[0] == f"{clone}/pyproject.toml, branch main, asks for"
    assert asked[1].startswith('  image = "own (sha256 ')
    assert asked[2:] == [
        '  secrets = {"K": {"command": "echo a \'b c\'"}}',
        f"  started on this computer, in /: {shutil.which('echo')} a 'b c'",
        "  run in a machine while the image is built: touch /built",
        "not allowed for branch main",
    ]
    assert said_by(capsys)[-1] == "allowed for branch main"
    assert is_what_is_asked_allowed(clone)
    git(clone, "checkout", "-q", "-b", "feature/a")
    assert not is_what_is_asked_allowed(clone)
    assert said_by(capsys, "--show")[-2:] == [
        "not allowed for branch feature/a", "allowed for branch main"
    ]  # fmt: skip
    assert said_by(capsys, "--branch", "feature/*")[-1] == "allowed for branch main, branch feature/*"
    assert is_what_is_asked_allowed(clone)
    shown = said_by(capsys, "--show")
    for line in (f"{clone}, branch main, may have (configuration)", f"{clone}, branch feature/*, may have"):
        assert any(each.startswith(line) for each in shown)
    said_by(capsys, "--revoke", "--branch", "feature/*")
    assert not is_what_is_asked_allowed(clone)
    assert said_by(capsys, "--any-branch")[-1] == "allowed for branch main, any branch"
    git(clone, "checkout", "-q", "--detach")
    assert is_what_is_asked_allowed(clone)


def is_what_is_asked_allowed(folder):
    return project_trust.is_trusted(folder, asked_by(load_settings(folder, {})), checked_out(folder))


JOBS = '[ci.jobs.test]\nsteps = ["true"]\nnetwork = ["a.example"]\nsecrets.K.command = "echo a"\n'


def test_jobs_are_allowed_to_the_branch_that_defines_them(clone, monkeypatch, capsys):
    (clone / "microvm.toml").write_text(JOBS)
    git(clone, "add", ".")
    git(clone, "commit", "-q", "-m", "jobs")
    git(clone, "checkout", "-q", "-b", "evil")
    monkeypatch.chdir(clone)
    code = CodeRepository(clone)
    with pytest.raises(UsageError, match="nobody has allowed that for branch main"):
        check_trust(code, read_definition(code))
    said = said_by(capsys)
    assert f"  started on this computer, in /: {shutil.which('echo')} a" in said
    assert said[-1] == "allowed for branch main"
    check_trust(code, read_definition(code))
    for other in ("evil", "worktree", code.ref("HEAD").commit):
        with pytest.raises(UsageError, match=r"nobody has allowed that for (branch evil|commit)"):
            check_trust(code, read_definition(code, other))


def test_a_jobs_command_uses_nothing_of_the_work_tree(clone):
    (clone / "token.sh").write_text("echo token")
    (clone / "microvm.toml").write_text(JOBS.replace("echo a", f"sh {clone}/token.sh"))
    code = CodeRepository(clone)
    with pytest.raises(UsageError, match="belongs to the project"):
        check_trust(code, read_definition(code, "worktree"))


def test_project_kit_needs_trust_and_a_shipped_kit_does_not(tmp_path):
    kit = tmp_path / "microvm" / "kits" / "own"
    kit.mkdir(parents=True)
    (kit / "kit.toml").write_text('parent = "base"\nnetwork = ["a.example"]\nsetup = ["true"]\n')
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[tool.pytest-microvm]\nimage = "own"\n')
    asked = asked_by(load_settings(tmp_path, {}))
    assert asked["network"] == ["a.example"]
    assert asked["image"].startswith("own (sha256 ")
    (kit / "kit.toml").write_text('parent = "base"\nnetwork = ["a.example"]\nsetup = ["false"]\n')
    assert asked_by(load_settings(tmp_path, {}))["image"] != asked["image"]
    assert asked_by(load_settings(tmp_path, {"image": "base"})) == {}
    assert asked_by(load_settings(tmp_path, {"image": "own", "network": ["b.example"]})) == {}
    pyproject.write_text('[tool.pytest-microvm]\nimage = "base"\n')
    assert asked_by(load_settings(tmp_path, {})) == {}


@pytest.mark.parametrize(
    "changed", ['setup_network = ["b.example"]', 'sdists = ["thing==2"]', 'from = "docker://b.example/app"']
)
def test_trust_covers_what_a_kit_is_built_from(tmp_path, changed):
    kit = tmp_path / "microvm" / "kits" / "own"
    kit.mkdir(parents=True)
    lines = {
        "from": 'from = "docker://a.example/app"',
        "sdists": 'sdists = ["thing==1"]',
        "setup_network": 'setup_network = ["a.example"]',
    }
    (kit / "kit.toml").write_text("\n".join(lines.values()))
    (tmp_path / "pyproject.toml").write_text('[tool.pytest-microvm]\nimage = "own"\n')
    asked = asked_by(load_settings(tmp_path, {}))
    assert asked["image"].startswith("own (from docker://a.example/app, sha256 ")
    assert built_here("own", tmp_path) == [
        "run in a machine while the image is built: pip install thing==1",
        "reached by that machine: a.example",
    ]
    lines[changed.partition(" ")[0]] = changed
    (kit / "kit.toml").write_text("\n".join(lines.values()))
    assert asked_by(load_settings(tmp_path, {}))["image"] != asked["image"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def written(project, line):
    (project / "pyproject.toml").write_text(f"[tool.pytest-microvm]\n{line}\n")
    return asked_by(load_settings(project, {}))


@pytest.mark.parametrize(
    "line",
    [
        'mounts = ["data:/data:ro"]', 'mounts = ["./x/../data/below:/data"]', 'secrets.K.file = "data/key"',
        'credentials = [{ host = "a.example", value = { file = "data/key" } }]',
    ],
)  # fmt: skip
def test_the_same_words_with_a_link_behind_them_are_asked_about(project, tmp_path, line):
    (project / "data" / "below").mkdir(parents=True)
    (project / "data" / "key").write_text("1")
    allow(project, written(project, line))
    project_trust.check(project, written(project, line))
    (project / "data").rename(tmp_path / "elsewhere")
    (project / "data").symlink_to(tmp_path / "elsewhere")  # as another branch may have it
    asked = written(project, line)
    assert str(tmp_path / "elsewhere") in "\n".join(project_trust.shown(asked))
    with pytest.raises(UsageError, match="nobody has allowed that"):
        project_trust.check(project, asked)
    allow(project, asked)
    project_trust.check(project, written(project, line))


@pytest.mark.parametrize("command", ["./token.sh", "sh token.sh now", "sh {project}/token.sh"])
@pytest.mark.parametrize("trusted", ["", "1"])
def test_a_command_that_uses_the_project_cannot_be_allowed(project, monkeypatch, command, trusted):
    monkeypatch.setenv(project_trust.VARIABLE, trusted)
    (project / "token.sh").write_text("echo 1")
    command = command.format(project=project)
    for line in (
        f'secrets.K.command = "{command}"',
        f'credentials = [{{ host = "a.example", value = {{ command = "{command}" }} }}]',
    ):
        with pytest.raises(UsageError, match=r"belongs to the project|is relative"):
            written(project, line)
    assert main(["trust", str(project)]) == 4


@pytest.mark.parametrize(
    "line",
    [
        'mounts = ["~/x:/x", "/usr:/u:ro", "missing:/m"]',
        f'secrets.K.command = "printf {"x" * 300} ~nobody"',
        "secrets.K.command = \"an unfinished 'quote\"",
        'secrets.K.file = "/etc/passwd"', 'secrets.K.env = "K"',
    ],
)  # fmt: skip
def test_what_names_nothing_of_the_project_s_is_only_words(project, line):
    assert "behind" not in written(project, line)


def test_a_project_behind_a_link(project, tmp_path):
    (tmp_path / "link").symlink_to(project)
    (project / "data").mkdir()
    assert "behind" not in written(tmp_path / "link", 'mounts = ["data:/data"]\nsecrets.K.file = "key"')


@pytest.mark.parametrize(
    "word",
    [
        "--microvm-network=pip",
        "--microvm-mount",
        "--microvm-secret=A=env:B",
        "@options.txt",
        "--microvm-image=x",
    ],
)
def test_addopts_of_the_configuration_grants_nothing(word):
    with pytest.raises(UsageError, match="only who runs it may say"):
        refuse_granting(["-q", word])


def test_other_addopts_stay():
    refuse_granting(["-q", "--microvm", "--microvm-network-bytes=1M", "--microvm-memory=1G", "-k", "a"])


# Container images


@pytest.mark.parametrize(
    "image",
    [
        "docker://registry.example/team/app:1",
        "docker://127.0.0.1:5000/a",
        "oci:build/image",
        "docker-daemon:a:1",
    ],
)
def test_container_image_of_the_configuration_is_asked_about(tmp_path, image):
    """This computer would fetch it, from a network that only it may reach, or from the user's files."""
    (tmp_path / "pyproject.toml").write_text(f'[tool.pytest-microvm]\nimage = "{image}"\n')
    asked = asked_by(load_settings(tmp_path, {}))
    assert asked == {"image": image}
    with pytest.raises(UsageError, match="asks for more than its own files"):
        project_trust.check(tmp_path, asked)
    allow(tmp_path, asked)
    project_trust.check(tmp_path, asked)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest-microvm]\nimage = "docker://other.example/app"\n')
    with pytest.raises(UsageError):
        project_trust.check(tmp_path, asked_by(load_settings(tmp_path, {})))
    assert asked_by(load_settings(tmp_path, {"image": image})) == {}  # the command line is the user's


def test_image_that_the_user_pulled_under_a_name_is_not_asked_about(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pyproject.toml").write_text('[tool.pytest-microvm]\nimage = "app"\n')
    with pytest.raises(KitError, match="there is no kit 'app'"):
        asked_by(load_settings(tmp_path, {}))
    names = tmp_path / "cache" / "images" / "names"
    names.mkdir(parents=True)
    (names / "app-alias.json").write_text("{}")
    assert asked_by(load_settings(tmp_path, {})) == {}


def test_container_images_of_jobs_are_asked_about(clone):
    (clone / "microvm.toml").write_text('[ci.jobs.test]\nimage = "docker://r.example/a"\nsteps = ["true"]\n')
    git(clone, "add", ".")
    git(clone, "commit", "-q", "-m", "jobs")
    code = CodeRepository(clone)
    definition = read_definition(code)
    assert definition.asked == {"ci.image.docker://r.example/a": "docker://r.example/a"}
    with pytest.raises(UsageError, match="nobody has allowed that for branch main"):
        check_trust(code, definition)
