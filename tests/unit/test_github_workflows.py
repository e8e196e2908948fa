"""The action and the workflows as files: their schema, what may be in a script, and their documentation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pytest_microvm.ci.definition.parsing import parse_definition

REPOSITORY = Path(__file__).resolve().parents[2]
ACTION = REPOSITORY / "github-action" / "action.yml"
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
REUSABLE = REPOSITORY / ".github" / "workflows" / "microvm.yml"
RELEASE = REPOSITORY / ".github" / "workflows" / "release.yml"
PAGE = REPOSITORY / "docs" / "reference" / "github-action.md"
PROGRAMS = Path(sys.executable).parent
# What follows its exec is for an exec that fails. The file is not touched for a comment: every image would be
# another one.
ALLOWED = {"pytest_microvm/images/init.sh": ["--exclude=SC2093"]}


def run(*command, **more):
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **more
    )


def load(path):
    return yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # noqa: S506 - all is text; `on` is no boolean


def steps(path):
    """Return the steps of an action or of all jobs of a workflow."""
    text = load(path)
    if "runs" in text:
        return text["runs"]["steps"]
    return [step for job in text["jobs"].values() for step in job.get("steps", [])]


def scripts():
    """Return every shell script of the repository."""
    listed = run("git", "-C", REPOSITORY, "ls-files", "--cached", "--others", "--exclude-standard").stdout
    for name in listed.splitlines():
        path = REPOSITORY / name
        if not path.is_file():
            continue
        with path.open("rb") as file:
            first = file.read(64).partition(b"\n")[0]
        if name.endswith(".sh") or re.match(rb"#!.*\b(ba|da)?sh$", first):
            yield name


@pytest.mark.parametrize(
    ("schema", "paths"),
    [("github-actions", [ACTION]), ("github-workflows", WORKFLOWS)],
    ids=["action", "workflows"],
)
def test_they_follow_their_schema(schema, paths):
    assert paths
    done = run(PROGRAMS / "check-jsonschema", "--builtin-schema", f"vendor.{schema}", *paths)
    assert done.returncode == 0, done.stdout


def test_the_schema_refuses_what_is_wrong(tmp_path):
    wrong = tmp_path / "action.yml"
    wrong.write_text(ACTION.read_text().replace("using: composite", "using: composed"))
    done = run(PROGRAMS / "check-jsonschema", "--builtin-schema", "vendor.github-actions", wrong)
    assert done.returncode == 1, done.stdout


def test_zizmor_finds_nothing():
    audited = [ACTION.parent, REPOSITORY / ".github"]
    done = run(PROGRAMS / "zizmor", "--offline", "--no-progress", "--persona=auditor", *audited)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("completed") == 1 + len(WORKFLOWS)


def test_zizmor_finds_an_input_in_a_script(tmp_path):
    wrong = tmp_path / "action.yml"
    wrong.write_text(ACTION.read_text().replace('exit "$EXIT_CODE"', "exit ${{ inputs.args }}"))
    done = run(PROGRAMS / "zizmor", "--offline", "--no-progress", wrong)
    assert "template-injection" in done.stdout


@pytest.mark.parametrize("path", [ACTION, *WORKFLOWS], ids=lambda path: path.name)
def test_no_expression_is_part_of_a_script(path):
    assert [step["name"] for step in steps(path) if "${{" in step.get("run", "")] == []


@pytest.mark.parametrize("path", [ACTION, *WORKFLOWS], ids=lambda path: path.name)
def test_actions_of_others_are_named_by_commit(path):
    named = re.findall(r"uses: (\S+)( # v\d+\.\d+\.\d+)?", path.read_text())
    others = [(name, version) for name, version in named if not name.startswith("$/")]
    assert [
        name for name, version in others if not re.fullmatch(r"\S+@[0-9a-f]{40}", name) or not version
    ] == []


def test_one_commit_of_each_action():
    named = {
        (name.partition("@")[0].split("/")[1], name.partition("@")[2], version)
        for path in [ACTION, *WORKFLOWS]
        for name, version in re.findall(r"uses: (\S+@\S+) # (\S+)", path.read_text())
    }
    assert len(named) == len({action for action, _commit, _version in named}) == 7


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_no_more_rights_than_it_needs(path):
    text = load(path)
    assert text["permissions"] == {} or text["permissions"] == "{}"
    assert set(text["on"]) <= {"push", "pull_request", "workflow_call", "workflow_dispatch"}
    for name, job in text["jobs"].items():
        more = {"id-token": "write", "attestations": "write"} if (path, name) == (RELEASE, "publish") else {}
        assert job["permissions"].items() <= {"contents": "read", **more}.items()
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"


def test_the_job_that_publishes_runs_no_code_of_the_repository():
    jobs = load(RELEASE)["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job["permissions"]] == ["publish"]
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    used = [step["uses"].partition("@")[0] for step in jobs["publish"]["steps"]]
    assert used == [
        "actions/download-artifact",
        "actions/attest-build-provenance",
        "pypa/gh-action-pypi-publish",
    ]
    assert load(RELEASE)["on"] == {"push": {"tags": ["v*"]}}


def test_shell_scripts():
    found = sorted(scripts())
    assert {"ci/setup.sh", "ci/packages.sh", "github-action/setup.sh", "github-action/kvm.sh"} <= set(found)
    for name in found:
        command = [PROGRAMS / "shellcheck", "-x", *ALLOWED.get(name, []), name]
        done = run(*command, cwd=REPOSITORY)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [ACTION, *WORKFLOWS], ids=lambda path: path.name)
def test_scripts_in_steps(path):
    for step in (step for step in steps(path) if "run" in step):
        done = run(PROGRAMS / "shellcheck", "--shell=bash", "-", input=step["run"])
        assert done.returncode == 0, f"{step['name']}\n{done.stdout}"


def table(entries, *, defaults):
    """Return the rows of the page's table of inputs or outputs."""
    for name, told in entries.items():
        default = f" `{told['default']}` |" if told.get("default") else " |"
        yield f"| `{name}` | {told['description']} |" + (default if defaults else "")


def test_the_page_has_every_input_and_output():
    text = load(ACTION)
    wanted = [*table(text["inputs"], defaults=True), *table(text["outputs"], defaults=False)]
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert rows == wanted


def test_every_input_is_used():
    text = ACTION.read_text()
    assert [
        name for name in load(ACTION)["inputs"] if f"inputs.{name}" not in text.partition("runs:")[2]
    ] == []


def test_the_workflow_passes_on_inputs_that_there_are():
    [call] = [step for step in steps(REUSABLE) if step["uses"] == "$/github-action"]
    assert set(call["with"]) <= set(load(ACTION)["inputs"])
    given = load(REUSABLE)["on"]["workflow_call"]["inputs"]
    used = set(re.findall(r"inputs\.([a-z-]+)", REUSABLE.read_text()))
    assert used == set(given)


HOW_TO = REPOSITORY / "docs" / "how-to" / "github.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", HOW_TO.read_text(), re.DOTALL | re.MULTILINE)


def test_examples_of_workflows(tmp_path):
    inputs = set(load(ACTION)["inputs"]) | set(load(REUSABLE)["on"]["workflow_call"]["inputs"])
    found = blocks("yaml")
    for number, text in enumerate(found):
        (tmp_path / f"{number}.yml").write_text(text)
        job = yaml.safe_load(text)["jobs"]["microvm"]
        for ours in [job, *job.get("steps", [])]:
            if "OWNER" in ours.get("uses", ""):
                assert set(ours.get("with", {})) <= inputs
    done = run(
        PROGRAMS / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *tmp_path.iterdir()
    )
    assert done.returncode == 0, done.stdout
    audited = run(PROGRAMS / "zizmor", "--offline", "--no-progress", *tmp_path.iterdir())
    assert audited.returncode == 0, audited.stdout
    assert len(found) == 4


def test_examples_of_jobs():
    [text] = blocks("toml")
    assert parse_definition(text, "microvm.toml").jobs
