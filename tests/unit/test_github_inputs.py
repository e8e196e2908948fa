"""The action's inputs: what they become, what is refused, and the command they lead to."""

import subprocess
import sys
from pathlib import Path

import pytest

from pytest_microvm.ci.github.inputs import read_inputs, saved_inputs
from pytest_microvm.ci.github.run import checked_out, run_command
from pytest_microvm.errors import UsageError


def read(folder, **given):
    variables = {f"INPUT_{name.upper()}": value for name, value in given.items()}
    return read_inputs({"INPUT_WORKING_DIRECTORY": str(folder), **variables}, folder / "own")


def test_defaults(tmp_path):
    inputs = read(tmp_path)
    assert (inputs.mode, inputs.junit_profile, inputs.trust) == ("pytest", "github", False)
    assert inputs.output == tmp_path / "own" / "results"  # not in what machines get a copy of
    assert inputs.project == tmp_path


def test_they_are_the_same_in_the_next_step(tmp_path):
    inputs = read(tmp_path, mode="ci", args="--job 'a b'", branches="main\nfix/*", output="out")
    inputs.save(tmp_path)
    assert saved_inputs(tmp_path) == inputs
    assert inputs.branches == ("main", "fix/*")
    assert inputs.args == ("--job", "a b")
    assert inputs.output == tmp_path / "out"


def test_without_a_plan(tmp_path):
    with pytest.raises(UsageError, match="no folder of the action"):
        saved_inputs(tmp_path)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"mode": "tox"}, "mode: 'tox' is not allowed"),
        ({"trust": "yes"}, "trust: 'yes' is not allowed"),
        ({"require_accel": "fast"}, "require-accel: 'fast'"),
        ({"junit_profile": "xml"}, "junit-profile: 'xml'"),
        ({"args": "'"}, "No closing quotation"),
        ({"args": "-x --junitxml=a"}, "--junitxml is set by the action"),
        ({"args": "--microvm-image base"}, "--microvm-image is set by the action"),
        ({"mode": "ci", "args": "--output here"}, "--output is set by the action"),
        ({"mode": "ci", "image": "base"}, "image is for mode: pytest"),
        ({"branches": "main"}, "branches is for mode: ci"),
        ({"definition_from": "main"}, "definition-from is for mode: ci"),
        ({"cache_key": "a,b"}, "cache-key: 'a,b' is not allowed"),
        ({"working_directory": "/nowhere"}, "/nowhere is no folder"),
    ],
)
def test_what_is_refused(tmp_path, given, told):
    with pytest.raises(UsageError) as caught:
        read(tmp_path, **given)
    assert told in str(caught.value)
    assert caught.value.resolution


def test_the_command_of_a_suite(tmp_path):
    inputs = read(tmp_path, args="-k 'a or b'", image="base", require_accel="tcg", junit_profile="jenkins")
    results = tmp_path / "own" / "results"
    words = run_command(inputs, {})
    assert words[:3] == [sys.executable, "-I", "-c"]
    assert words[4:] == [
        "test", f"--junitxml={results}/junit.xml", "--microvm-junit-profile=jenkins",
        f"--microvm-artifacts={results}/machines", f"--microvm-reports={results}/project",
        "--microvm-python=image", "--microvm-image=base", "--microvm-require-accel=tcg", "-k", "a or b",
    ]  # fmt: skip


def test_the_command_of_branches(tmp_path):
    inputs = read(tmp_path, mode="ci", branches="main fix/*", definition_from="main", output="out")
    words = run_command(inputs, {"GITHUB_REF": "refs/heads/main"})
    assert words[words.index("ci") :] == [
        "ci", "run", f"--output={tmp_path}/out", "--junit-profile=github", "--branch=main", "--branch=fix/*",
        "--definition-from=main",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ref", "named"),
    [
        ("refs/heads/main", "refs/heads/main"),
        ("refs/tags/v1", "refs/tags/v1"),
        ("refs/pull/7/merge", "refs/remotes/pull/7/merge"),
        ("", "HEAD"),
    ],
)
def test_a_pull_request_is_not_called_as_its_branch(tmp_path, ref, named):
    variables = {"GITHUB_REF": ref, "GITHUB_HEAD_REF": "main"}
    assert checked_out(variables) == named
    assert f"--ref={named}" in run_command(read(tmp_path, mode="ci"), variables)


@pytest.mark.parametrize("mode", ["pytest", "ci"])
def test_nothing_of_the_project_is_imported_on_this_computer(tmp_path, mode):
    """Python looks first in the folder it starts in, which is the project's."""
    made = tmp_path / "made"
    for name in ("pytest.py", "pytest_microvm.py"):
        (tmp_path / name).write_text(f"open({str(made)!r}, 'w')")
    command = run_command(read(tmp_path, mode=mode), {})

    def start(argv):
        subprocess.run([*argv, "--version"], cwd=tmp_path, capture_output=True, check=False)

    start(command)
    assert not made.exists()
    start([word for word in command if word != "-I"])
    assert made.exists()


def test_the_folder_of_a_job_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    inputs = read_inputs({"INPUT_WORKING_DIRECTORY": "sub"}, Path("own").absolute())
    assert inputs.project == tmp_path / "sub"
