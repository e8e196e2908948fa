"""What a project's configuration grants counts only if its user said so, for exactly these words."""

from __future__ import annotations

import pytest

from pytest_microvm import project_trust
from pytest_microvm.cli import main
from pytest_microvm.config import load_settings
from pytest_microvm.errors import UsageError
from pytest_microvm.project_grants import asked_by
from pytest_microvm.remote.addopts import refuse_granting

ASKED = {"network": ["a.example"], "mounts": ["~/.ssh:/keys"]}


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(project_trust.VARIABLE, raising=False)


def test_nobody_has_to_allow_nothing(tmp_path):
    project_trust.check(tmp_path, {})
    project_trust.check(tmp_path, {"network": []})
    assert not (tmp_path / "state").exists()


def test_what_nobody_allowed_is_refused_and_shown(tmp_path):
    with pytest.raises(UsageError, match="nobody has allowed that") as caught:
        project_trust.check(tmp_path, ASKED)
    assert caught.value.details == 'mounts = ["~/.ssh:/keys"]\nnetwork = ["a.example"]'


def test_what_was_allowed_is_allowed_until_it_changes(tmp_path):
    project_trust.trust(tmp_path, ASKED)
    project_trust.check(tmp_path, ASKED)
    project_trust.check(tmp_path, {"network": ["a.example"]})  # the rest comes from the command line, say
    for changed in ({**ASKED, "network": ["b.example"]}, {**ASKED, "secrets": {"A": {"env": "A"}}}):
        with pytest.raises(UsageError):
            project_trust.check(tmp_path, changed)


def test_another_project_is_not_meant(tmp_path):
    project_trust.trust(tmp_path, ASKED)
    with pytest.raises(UsageError):
        project_trust.check(tmp_path / "other", ASKED)


def test_it_can_be_taken_back(tmp_path):
    project_trust.trust(tmp_path, ASKED)
    assert project_trust.revoke(tmp_path)
    assert not project_trust.revoke(tmp_path)
    with pytest.raises(UsageError):
        project_trust.check(tmp_path, ASKED)


def test_who_starts_the_run_may_answer_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv(project_trust.VARIABLE, "1")
    project_trust.check(tmp_path, ASKED)
    monkeypatch.setenv(project_trust.VARIABLE, "yes")
    with pytest.raises(UsageError):
        project_trust.check(tmp_path, ASKED)


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"network": 7}'])
def test_a_damaged_note_allows_nothing(tmp_path, damaged):
    project_trust.trust(tmp_path, ASKED)
    (note,) = (tmp_path / "state").rglob("*.json")
    note.write_text(damaged)
    with pytest.raises(UsageError):
        project_trust.check(tmp_path, ASKED)


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


def test_a_kit_of_the_projects_is_asked_about_and_one_that_ships_is_not(tmp_path):
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
    project_trust.trust(project, written(project, line))
    project_trust.check(project, written(project, line))
    (project / "data").rename(tmp_path / "elsewhere")
    (project / "data").symlink_to(tmp_path / "elsewhere")  # as another branch may have it
    asked = written(project, line)
    assert str(tmp_path / "elsewhere") in "\n".join(project_trust.shown(asked))
    with pytest.raises(UsageError, match="nobody has allowed that"):
        project_trust.check(project, asked)
    project_trust.trust(project, asked)
    project_trust.check(project, written(project, line))


@pytest.mark.parametrize("command", ["./token.sh", "sh token.sh now", "sh ../project/token.sh"])
def test_the_same_command_with_another_script_is_asked_about(project, command):
    line = f'secrets.K.command = "{command}"'
    (project / "token.sh").write_text("echo 1")
    project_trust.trust(project, written(project, line))
    project_trust.check(project, written(project, line))
    (project / "token.sh").write_text("curl evil.example")
    with pytest.raises(UsageError, match="nobody has allowed that"):
        project_trust.check(project, written(project, line))


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
