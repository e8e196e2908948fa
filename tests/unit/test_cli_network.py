"""``pytest-microvm network``: says what the policy proxy would say."""

import json

import pytest

from pytest_microvm.cli import main
from support.repositories import git


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(tmp_path / "cache"))

    def call(*words):
        status = main(["network", *words])
        return status, capsys.readouterr().out

    return call


def configure(tmp_path, text):
    (tmp_path / "pyproject.toml").write_text(f"[tool.pytest-microvm]\n{text}")


def test_nothing_is_allowed_by_default(run):
    status, out = run("check", "https://files.invalid/x")
    assert status == 1
    assert "denied   files.invalid  no rule allows anything" in out


def test_the_projects_rules_and_those_for_prepare(run, tmp_path):
    configure(tmp_path, 'network = ["files.invalid"]\nprepare_network = ["index.invalid"]\n')
    assert run("check", "https://files.invalid/x")[0] == 0
    assert run("check", "https://index.invalid/x")[0] == 1
    assert run("check", "--prepare", "https://index.invalid/x")[0] == 0
    assert run("check", "--prepare", "--project", str(tmp_path), "https://files.invalid/x")[0] == 1
    status, out = run("check", "--network", "index.invalid", "https://files.invalid/x")
    assert status == 1
    assert "rules: index.invalid (--network)" in out


def test_the_rules_of_the_kit_where_the_project_says_nothing(run, tmp_path):
    kit = tmp_path / "microvm" / "kits" / "mine"
    kit.mkdir(parents=True)
    (kit / "kit.toml").write_text('suite = "bookworm"\nnetwork = ["files.invalid"]\n')
    configure(tmp_path, 'image = "mine"\n')
    assert run("check", "https://files.invalid/x")[0] == 0
    configure(tmp_path, 'image = "mine"\nnetwork = []\n')
    assert run("check", "https://files.invalid/x")[0] == 1


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (
            ["--network", "all", "http://127.1/"],
            1,
            "denied   127.0.0.1  no rule allows 127.0.0.1:80, which is",
        ),
        (["--network", "a.localhost", "https://A.localhost./"], 0, "allowed  127.0.0.1\nallowed  ::1"),
        (
            ["--network", "127.0.0.1:5432", "127.0.0.1:5432"],
            0,
            "allowed  127.0.0.1  allowed by 127.0.0.1:5432",
        ),
        (["--network", "a.invalid", "https://a.invalid/x"], 0, "a.invalid does not resolve on this computer"),
        (["--network", "all", "--method", "trace", "http://a.invalid/"], 1, "TRACE is not passed on"),
        (["--network", "all", "--method", "trace", "https://a.invalid/"], 0, "nobody looks"),
        (["--network", "a.invalid", "https://a.invalid/x"], 0, "nobody looks at methods and paths"),
        (
            ["--network", "a.invalid", "a.invalid:22"],
            1,
            "denied   a.invalid  a.invalid does not allow this port",
        ),
        (
            ["--network", "https://a.invalid/x/*", "https://a.invalid/x/y"],
            0,
            "allowed  a.invalid  allowed by",
        ),
        (
            ["--network", "https://a.invalid/x/*", "https://a.invalid/y"],
            1,
            "does not allow this port, protocol, method",
        ),
        (
            [
                "--network",
                "all",
                "--network",
                "deny:POST http://a.invalid",
                "--method",
                "post",
                "http://a.invalid",
            ],
            1,
            "denied   a.invalid  forbidden by deny:POST http://a.invalid",
        ),
    ],
)
def test_what_is_said(run, words, status, line):
    code, out = run("check", *words)
    assert code == status
    assert line in out


def test_where_the_project_lets_a_name_lead(run, tmp_path):
    configure(tmp_path, 'network = ["api.invalid"]\nhosts = { "api.invalid" = "127.0.0.1:8443" }\n')
    status, out = run("check", "https://api.invalid/")
    assert status == 0
    assert "allowed  127.0.0.1:8443" in out
    configure(
        tmp_path, 'network = ["api.invalid", "deny:127.0.0.0/8"]\nhosts = { "api.invalid" = "127.0.0.1" }\n'
    )
    status, out = run("check", "https://api.invalid/")
    assert status == 1
    assert "denied   127.0.0.1:443  127.0.0.1 is forbidden by deny:127.0.0.0/8" in out


def test_a_host_with_a_credential(run, tmp_path):
    configure(
        tmp_path,
        'network = ["api.invalid", "api.invalid:8443"]\nprepare_network = ["api.invalid"]\n'
        'credentials = [{ host = "API.invalid", value = { env = "TOKEN_THAT_IS_NOT_SET" } }]\n',
    )
    status, out = run("check", "http://api.invalid/")
    assert status == 1
    assert "denied   api.invalid  api.invalid has a credential, which goes over TLS only: use https" in out
    assert run("check", "--prepare", "http://api.invalid/")[0] == 0
    for url, looked_into in {"https://api.invalid/": True, "https://api.invalid:8443/": False}.items():
        status, out = run("check", url)
        assert status == 0
        assert ("nobody looks at methods and paths" not in out) is looked_into


def test_json(run):
    status, out = run(
        "check", "--json", "--network", "GET https://*.localhost/a/*", "https://x.localhost/a/b"
    )
    told = json.loads(out)
    assert status == 0
    assert told["url"] == "https://x.localhost/a/b"
    assert (told["allowed"], told["inspected"], told["method"]) == (True, True, "GET")
    assert told["rule"] == "GET https://*.localhost/a/*"
    assert [each["address"] for each in told["addresses"]] == ["127.0.0.1", "::1"]
    assert {each["allowed"] for each in told["addresses"]} == {True}


def test_rules_with_presets_expanded(run, tmp_path, monkeypatch):
    config = tmp_path / "gitconfig"
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    git(tmp_path, "init", "-q")
    git(tmp_path, "remote", "add", "origin", "https://me:hunter2@git.invalid:8443/a.git")
    git(tmp_path, "config", "--global", "url.https://mirror.invalid/.insteadOf", "m:", config=config)
    status, out = run("rules", "--network", "git", "--network", "deny:b.invalid")
    assert status == 0
    assert "  https://git.invalid:8443  (preset git)\n  deny:b.invalid\n  GIT_CONFIG_COUNT=1\n" in out
    assert "credential" in out
    assert "hunter2" not in out
    told = json.loads(run("rules", "--json", "--network", "git")[1])
    assert told["rules"] == [{"rule": "https://git.invalid:8443", "preset": "git"}]
    assert told["environment"]["GIT_CONFIG_VALUE_0"] == "m:"
    assert len(told["hints"]) == 1


def test_no_rules(run, tmp_path):
    configure(tmp_path, "network = []\n")
    assert run("rules") == (0, "rules: none: nothing can be reached (network)\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "ftp://a.invalid/"], "invalid scheme: expected one of http, ws, https, wss, got 'ftp'"),
        (["check", "https://me:hunter2@a.invalid/"], "invalid URL: expected one without a user name"),
        (["check", "me:hunter2@a.invalid:80"], "invalid URL: expected one without a user name"),
        (["check", "https://a b/"], "got 'https://a b/' (it is neither a host's name nor an address)"),
        (["check", "https://a.invalid:99999/"], "got 'https://a.invalid:99999/' (Port out of range"),
        (
            ["check", "--network", "a.invalid:x", "https://a.invalid/"],
            "--network: 'a.invalid:x' is not a network rule",
        ),
    ],
)
def test_bad_input(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["network", *words]) == 4
    error = capsys.readouterr().err
    assert said in error
    assert "next step: " in error
    assert "hunter2" not in error
