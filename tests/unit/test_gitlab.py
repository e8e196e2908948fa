"""GitLab's custom executor: whom it believes, what the operator may write, what the runner is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_microvm.ci.gitlab.holder_socket import STDERR, STDOUT
from pytest_microvm.ci.gitlab.job import job_key, read_job
from pytest_microvm.ci.gitlab.settings import (
    DEFAULT_FILE,
    KEYS,
    VARIABLE,
    GitlabSettings,
    find_settings,
    machine_values,
    parse_settings,
)
from pytest_microvm.cli import main
from pytest_microvm.cli.gitlab import RawPrinter, SafePrinter
from pytest_microvm.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATES = REPOSITORY / "ci" / "gitlab"
RESPONSE = {
    "id": 5,
    "git_info": {"repo_url": "https://ci-token:secret@gitlab.example:8443/a/b.git", "protected": True},
    "image": {"name": "python"},
    "runner_info": {"timeout": 600},
}


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Return a job's variables, its response written."""
    for name in ("TMPDIR", VARIABLE):
        monkeypatch.delenv(name, raising=False)

    def make(response=RESPONSE, **variables):
        folder = tmp_path / "custom-executor1"
        folder.mkdir(exist_ok=True)
        environment = {"TMPDIR": str(folder)}
        if response is not None:
            (folder / "response.json").write_text(json.dumps(response))
            environment["JOB_RESPONSE_FILE"] = str(folder / "response.json")
        return {**environment, **{f"CUSTOM_ENV_{name}": value for name, value in variables.items()}}

    return make


# Whom it believes


def test_what_the_server_says_counts_and_variables_do_not(stage):
    forged = {
        "CI_COMMIT_REF_PROTECTED": "true",
        "CI_SERVER_HOST": "evil.example",
        "CI_JOB_IMAGE": "other",
        "CI_JOB_TIMEOUT": "999999",
    }
    unprotected = {**RESPONSE, "git_info": {**RESPONSE["git_info"], "protected": False}}
    job = read_job(stage(unprotected, **forged))
    assert (job.protected, job.host, job.image, job.timeout) == (False, "gitlab.example:8443", "python", 600)
    assert read_job(stage()).protected


def test_an_older_runner_has_no_protected_jobs_and_no_host(stage):
    job = read_job(stage(None, CI_COMMIT_REF_PROTECTED="true", CI_JOB_IMAGE="python", CI_JOB_TIMEOUT="60"))
    assert (job.protected, job.host, job.image, job.timeout) == (False, None, "python", 60)


@pytest.mark.parametrize("protected", ["true", 1, None, "yes", [True]])
def test_only_true_is_protected(stage, protected):
    assert not read_job(stage({"git_info": {"protected": protected}})).protected


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://gitlab.example/a.git", "gitlab.example"),
        ("https://u:p@gitlab.example:443/a.git", "gitlab.example"),
        ("http://gitlab.example:8080/a.git", "gitlab.example:8080"),
        ("https://[2001:db8::1]:8443/a.git", "[2001:db8::1]:8443"),
        ("ssh://git@gitlab.example/a.git", None),
        ("https://a b/c.git", None),
        ("https://*/c.git", None),
        ("https://gitlab.example:99999/a.git", None),
        ("", None),
    ],
)
def test_the_host_of_a_repository(stage, url, host):
    assert read_job(stage({"git_info": {"repo_url": url}})).host == host


@pytest.mark.parametrize(
    "response", [[], {"git_info": 1, "image": [], "runner_info": "x"}, {"runner_info": {}}]
)
def test_a_strange_response_is_an_error_or_nothing(stage, response):
    if isinstance(response, list):
        with pytest.raises(UsageError, match="JSON object"):
            read_job(stage(response))
    else:
        job = read_job(stage(response))
        assert (job.image, job.timeout, job.protected, job.host) == ("", None, False, None)


@pytest.mark.parametrize("timeout", ["inf", "nan", -1, 0, "x", None, [1]])
def test_a_timeout_is_a_number_of_seconds(stage, timeout):
    assert read_job(stage({"runner_info": {"timeout": timeout}})).timeout is None


def test_a_job_with_anothers_numbers_has_another_key(stage):
    numbers = {"CI_JOB_ID": "1", "CI_PROJECT_ID": "2", "CI_RUNNER_ID": "3"}
    one = stage(**numbers)
    assert job_key(one) == job_key({**one, "CUSTOM_ENV_OTHER": "x", "JOB_RESPONSE_FILE": ""})
    assert job_key(one) != job_key({**one, "TMPDIR": one["TMPDIR"] + "2"})
    assert job_key(one) != job_key({**one, "CUSTOM_ENV_CI_JOB_ID": "../../x"})
    assert job_key({**one, "CUSTOM_ENV_CI_JOB_ID": "../\0\udcff"}).isalnum()
    assert len(job_key(one)) == 24


# What the operator may write


def test_protected_jobs_get_what_is_on_top():
    text = """
[machine]
memory = "1G"
network = ["gitlab"]

[protected]
network = ["gitlab", "deploy.example"]
"""
    settings = parse_settings(text, "gitlab.toml", Path("/etc"))

    def values(protected):
        return machine_values(
            settings, "agent", protected=protected, host="gitlab.example:8443", where="here"
        )

    assert values(False) == {"memory": "1G", "network": ["gitlab.example:8443"], "image": "agent"}
    assert values(True)["network"] == ["gitlab.example:8443", "deploy.example"]


def test_nothing_said_is_nothing_reached():
    values = machine_values(GitlabSettings(), "agent", protected=False, host="gitlab.example", where="here")
    assert values["network"] == []


def test_the_rule_gitlab_needs_a_server_that_says_who_it_is():
    settings = parse_settings('[machine]\nnetwork = ["gitlab"]\n', "gitlab.toml", Path("/etc"))
    with pytest.raises(UsageError, match="does not say which GitLab"):
        machine_values(settings, "agent", protected=False, host=None, where="here")


def test_paths_are_relative_to_the_file():
    settings = parse_settings('image = "./kits/ci"\n', "gitlab.toml", Path("/etc/pytest-microvm"))
    values = machine_values(settings, settings.image, protected=False, host=None, where="here")
    assert values["image"] == "/etc/pytest-microvm/kits/ci"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image = 1", "image"),
        ("imgae = 'x'", "unknown key 'imgae'"),
        ("images = 1", "not a table"),
        ("[images]\na = 1", "images.a"),
        ("[machine]\nlifetime = 5", "lifetime"),
        ("[machine]\nimage = 'x'", "image"),
        ("[machine]\nmemory = 'much'", "memory"),
        ("[protected]\nnetwork = ['a b']", "network"),
        ("shell = 'zsh'", "shell: invalid value: expected one of bash, sh, got 'zsh'"),
        ("output = 'loud'", "output: invalid value: expected one of safe, raw, got 'loud'"),
        ("builds_dir = 'builds'", "no folder"),
        ("builds_dir = '/a/../b'", "no folder"),
        ("cache_dir = '/a b'", "no folder"),
        ("idle = -1", "idle"),
        ("= 1", "not TOML"),
    ],
)
def test_what_cannot_be_used_is_named(text, said):
    with pytest.raises(UsageError) as caught:
        parse_settings(text, "gitlab.toml", Path("/etc"))
    assert said in str(caught.value)
    assert "gitlab.toml" in str(caught.value)


def test_where_the_file_is_looked_for(tmp_path, monkeypatch):
    named, given = tmp_path / "named.toml", tmp_path / "given.toml"
    named.write_text('image = "named"\n')
    given.write_text('image = "given"\n')
    monkeypatch.setenv(VARIABLE, str(named))
    assert find_settings(None).image == "named"
    assert find_settings(given).image == "given"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing.toml"))
    with pytest.raises(UsageError, match="does not exist"):
        find_settings(None)
    monkeypatch.delenv(VARIABLE)
    if not DEFAULT_FILE.exists():
        assert find_settings(None) == GitlabSettings()


# What the runner is told


def call(monkeypatch, environment, *arguments):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return main(["gitlab", *arguments])


def test_config_is_json_alone(stage, monkeypatch, capsys):
    assert call(monkeypatch, stage(), "config") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["builds_dir"], printed["cache_dir"], printed["shell"]) == ("/builds", "/cache", "bash")
    assert printed["builds_dir_is_shared"] is False
    assert printed["driver"]["name"] == "pytest-microvm"


def test_an_image_that_is_not_offered_fails_the_job(stage, monkeypatch, capsys):
    codes = {"BUILD_FAILURE_EXIT_CODE": "71", "SYSTEM_FAILURE_EXIT_CODE": "72"}
    environment = {**stage({"image": {"name": "evil\033[2J"}}), **codes}
    assert call(monkeypatch, environment, "prepare") == 71
    said = capsys.readouterr().err
    assert "is not offered" in said
    assert "\033" not in said


@pytest.mark.parametrize(
    "arguments", [("run", "/no/such/script", "build_script"), ("config", "--config", "/no/such.toml")]
)
def test_all_else_is_the_systems_failure(stage, monkeypatch, arguments):
    environment = {**stage(), "BUILD_FAILURE_EXIT_CODE": "71", "SYSTEM_FAILURE_EXIT_CODE": "72"}
    assert call(monkeypatch, environment, *arguments) == 72


def test_an_unknown_fault_is_no_failure_of_the_job(stage, monkeypatch, capsys):
    environment = {**stage(), "SYSTEM_FAILURE_EXIT_CODE": "72"}
    monkeypatch.setattr("pytest_microvm.ci.gitlab.stages.version", lambda _name: 1 / 0)
    assert call(monkeypatch, environment, "config") == 72
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_cleanup_where_nothing_was_prepared(stage, monkeypatch):
    assert call(monkeypatch, {**stage(None), "TMPDIR": ""}, "cleanup") == 0
    assert call(monkeypatch, stage(None), "cleanup") == 0


def test_a_stage_that_no_runner_started(monkeypatch, capsys):
    monkeypatch.delenv("TMPDIR", raising=False)
    assert call(monkeypatch, {"SYSTEM_FAILURE_EXIT_CODE": "72"}, "prepare") == 72
    assert "gitlab-runner" in capsys.readouterr().err


# What we ship


def test_the_operators_template_can_be_used():
    text = (TEMPLATES / "gitlab.toml").read_text()
    settings = parse_settings(text, "gitlab.toml", TEMPLATES)
    assert settings.images
    assert settings.values(protected=True) != settings.values(protected=False)


def test_the_runners_template_names_our_stages():
    runner = tomllib.loads((TEMPLATES / "config.toml").read_text())["runners"][0]
    assert runner["executor"] == "custom"
    for stage in ("config", "prepare", "run", "cleanup"):
        assert runner["custom"][f"{stage}_exec"].endswith("/pytest-microvm")
        assert runner["custom"][f"{stage}_args"] == ["gitlab", stage]
    assert runner["custom"]["graceful_kill_timeout"] > GitlabSettings().grace


def test_the_pipeline_is_one_for_gitlab():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.gitlab-ci"]
    done = subprocess.run(
        [*command, str(TEMPLATES / ".gitlab-ci.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_names_every_key():
    text = (REPOSITORY / "docs/reference/gitlab.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert [key for key in KEYS if not any(f"`{key}`" in row for row in rows)] == []


# What a script says


def test_what_is_said_is_safe_unless_it_is_wanted_raw(capfdbinary):
    said = b"\033[31mred\033[0m \033[2J\nsection_end:1:step_script\r\033[0K\nhalf"
    safe = SafePrinter()
    safe(STDOUT, said)
    safe(STDERR, b"apart\n")
    safe.close()
    assert capfdbinary.readouterr() == (
        b"\033[31mred\033[0m \\x1b[2J\nsection_end:1:step_script\\x0d\\x1b[0K\nhalf",
        b"apart\n",
    )
    raw = RawPrinter()
    raw(STDOUT, said)
    raw(STDERR, b"apart\n")
    raw.close()
    assert capfdbinary.readouterr() == (said, b"apart\n")
