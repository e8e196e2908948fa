"""A task's JUnit and a run's: safe, complete, and as red as the verdicts."""

import os
from dataclasses import replace

import junitparser
import pytest

from pytest_microvm.ci.results import job_junit
from pytest_microvm.ci.results.job_junit import own_suites, write_job_junit
from pytest_microvm.ci.results.merged_junit import write_merged_junit
from pytest_microvm.ci.results.result import Counts, RunResult, StepResult, TaskResult
from pytest_microvm.errors import UsageError
from pytest_microvm.reports.checking import check_report
from pytest_microvm.reports.profiles import PROFILES
from pytest_microvm.reports.reading import read_report

TESTS = """<testsuite name="s"><testcase classname="c" name="good" time="1"/>
<testcase classname="c" name="bad"><failure message="m">text</failure></testcase>
<testcase classname="c" name="flaky"><error/></testcase><testcase classname="c" name="flaky"/>
<testcase classname="c" name="skip"><skipped/></testcase></testsuite>"""
PASSED = '<testsuite name="s"><testcase classname="c" name="n"/></testsuite>'


class World:
    """An output folder, as `ci run` fills it."""

    def __init__(self, output):
        self.output = output
        self.tasks = []

    def task(self, verdict="passed", name="unit", branch="main", reports=None, steps=(), **more):
        result = TaskResult(f"{branch}.{name}", branch, "c" * 40, name, verdict, steps=tuple(steps), **more)
        folder = self.output / result.id
        folder.mkdir(parents=True)
        for path, content in (reports or {}).items():
            place = folder / "junit" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content)
        self.tasks.append(result)
        return result

    def evidence(self, task, **files):
        for name, text in files.items():
            (self.output / task.id / f"{name}.txt").write_text(text)

    def artifact(self, task, name):
        path = self.output / task.id / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        return replace(task, artifacts=(*task.artifacts, f"{task.id}/artifacts/{name}"))

    def job(self, task, profile="generic"):
        """Write a task's file; return what was counted, and its tests by name."""
        counts = write_job_junit(self.output / task.id, task, profile=profile, output=self.output)
        (suite,) = read_report(self.output / task.id / "junit.xml", ours=True).suites
        return counts, suite, {case.name: case for case in suite.cases}

    def merged(self, profile="generic"):
        run = RunResult("r", "/r", "main:pyproject.toml", 1.7e9, 3.0, tuple(self.tasks))
        write_merged_junit(self.output, run, profile=profile)
        return junitparser.JUnitXml.fromfile(str(self.output / "junit.xml"))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "microvm-ci")


# A job


def test_the_tests_of_a_branch(world):
    task = world.task("failed", reports={"r.xml": TESTS})
    counts, suite, cases = world.job(task)
    assert counts == Counts(passed=2, failed=1, skipped=1, flaky=1)
    assert list(cases) == ["good", "bad", "flaky", "skip"]
    assert cases["bad"].problems[0].text == "text"
    assert suite.name == "main / unit"


def test_what_is_known_of_the_task(world):
    task = world.task(
        "failed",
        reports={"r.xml": TESTS},
        reason="it failed",
        allow_failure=True,
        attempts=2,
        started=1_700_000_000.0,
        phases={"run": 1.5},
        machine={"image": "python", "image_digest": "d" * 64, "accelerator": "tcg"},
        worker="host-1",
    )
    _, suite, _ = world.job(task)
    told = {name.removeprefix("microvm."): value for name, value in suite.properties}
    assert told == {
        "junit_profile": "generic", "branch": "main", "commit": "c" * 40, "job": "unit", "verdict": "failed",
        "reason": "it failed", "allow_failure": "true", "attempts": "2", "image": "python",
        "image_digest": "d" * 64, "accelerator": "tcg", "run_seconds": "1.500",
    }  # fmt: skip
    assert (suite.timestamp, suite.hostname) == ("2023-11-14T22:13:20+00:00", "host-1")


def test_several_files_of_the_same_tests(world):
    task = world.task(reports={"a/r.xml": PASSED, "b/r.xml": PASSED, "b/more.txt": PASSED})
    counts, _, cases = world.job(task)
    assert counts.total == 3
    assert {name: dict(case.properties)["microvm.report"] for name, case in cases.items()} == {
        "n": "a/r.xml", "n (2)": "b/more.txt", "n (3)": "b/r.xml",
    }  # fmt: skip


def test_no_tests_of_its_own_are_its_steps(world):
    steps = [StepResult("build", 0, 1.5), StepResult("test", 3, 2.0), StepResult("publish", None)]
    task = world.task("failed", steps=steps, reason="test: exit status 3")
    world.evidence(task, log="$ make\n\x1b[31mboo", console="kernel")
    counts, suite, cases = world.job(task)
    assert counts is None
    assert {name: case.outcome for name, case in cases.items()} == {
        "build": "passed", "test": "failed", "publish": "skipped",
    }  # fmt: skip
    problem = cases["test"].problems[0]
    assert (problem.message, problem.text) == ("exit status 3", "$ make\nboo")
    assert cases["test"].claims == ("log.txt", "console.txt")
    assert suite.cases[0].classname == "unit"


def test_a_step_ended_by_a_signal_and_one_that_did_not_end(world):
    task = world.task("quota", steps=[StepResult("a", -9, 1), StepResult("b", None, 3)], reason="memory")
    _, _, cases = world.job(task)
    assert cases["a"].problems[0].message == "signal 9 ended it"
    assert cases["b"].problems[0] == replace(
        cases["b"].problems[0], kind="error", message="it did not run to its end"
    )


def test_the_end_of_a_long_log(world):
    task = world.task("failed", steps=[StepResult("a", 1)])
    world.evidence(task, log="x" * 200_000 + "END")
    text = world.job(task)[2]["a"].problems[0].text
    assert text.startswith("[... 134,467 bytes left out]")
    assert text.endswith("END")


@pytest.mark.parametrize("verdict", ["infra", "quota", "crashed", "failed"])
@pytest.mark.parametrize("reports", [{"r.xml": PASSED}, None], ids=["tests", "none"])
def test_no_file_is_greener_than_the_verdict(world, verdict, reports):
    task = world.task(verdict, reports=reports, reason="because")
    world.evidence(task, console="kernel")
    counts, _, cases = world.job(task)
    job = cases["job"]
    assert job.outcome == ("failed" if verdict == "failed" else "error")
    assert (job.classname, job.problems[0].message) == ("unit", f"{verdict}: because")
    assert job.claims == ("console.txt",)
    assert counts == (Counts(passed=1) if reports else None)  # it is no test of the branch


def test_tests_that_failed_say_enough(world):
    assert "job" not in world.job(world.task("failed", reports={"r.xml": TESTS}))[2]


@pytest.mark.parametrize("verdict", ["skipped", "cancelled"])
def test_what_did_not_run_is_skipped(world, verdict):
    _, _, cases = world.job(world.task(verdict, reason="needs build"))
    assert [(case.name, case.outcome, case.problems[0].message) for case in cases.values()] == [
        ("job", "skipped", f"{verdict}: needs build")
    ]


def test_a_report_that_cannot_be_read_is_an_error(world):
    counts, _, cases = world.job(world.task("failed", reports={"r.xml": "<testsuite>", "s.xml": PASSED}))
    assert counts == Counts(passed=1, errors=1)
    assert cases["could not be read"].classname == "r.xml"


def test_an_unknown_profile(world):
    with pytest.raises(UsageError, match="--junit-profile: 'x'"):
        world.job(world.task(), "x")


# What a branch puts there


def test_links_and_other_things_are_no_reports(world, tmp_path):
    (tmp_path / "secret.xml").write_text(PASSED)
    task = world.task(reports={"r.xml": PASSED})
    taken = world.output / task.id / "junit"
    (taken / "link.xml").symlink_to(tmp_path / "secret.xml")
    (taken / "folder").symlink_to(tmp_path)
    os.mkfifo(taken / "fifo.xml")
    assert world.job(task)[0].total == 1


@pytest.mark.parametrize(
    ("name", "value", "left"), [("_MOST_FILES", 3, 2), ("_MOST_BYTES", 300, 1), ("CASE_LIMIT", 3, 2)]
)
def test_junit_files_beyond_the_limits_are_counted_as_left_out(world, monkeypatch, name, value, left):
    monkeypatch.setattr(job_junit, name, value)
    task = world.task(reports={f"{number}.xml": PASSED for number in range(5)})
    *_, last = own_suites(world.output / task.id)
    assert last.cases[0].problems[0].message.startswith(f"{left} files of JUnit were left out")


def test_files_of_a_test(world):
    claims = [
        "shots/a.png",
        "/workspace/shots/a.png",
        "../../x/log.txt",
        "/etc/shadow",
        "missing.png",
        "link.png",
    ]
    tags = "\n".join(f"[[ATTACHMENT|{claim}]]" for claim in claims)
    report = PASSED.replace("/></", f"><system-out>{tags}</system-out></testcase></")
    task = world.artifact(world.task(reports={"r.xml": report}), "shots/a.png")
    task = replace(task, artifacts=(*task.artifacts, f"{task.id}/artifacts/link.png"))
    (world.output / task.id / "artifacts" / "link.png").symlink_to("/etc/passwd")
    _, _, cases = world.job(task)
    assert cases["n"].claims == ("artifacts/shots/a.png",) * 2


# A run


def test_a_suite_for_each_branch_and_job(world):
    for branch in ("main", "feature/x"):
        world.task(branch=branch, reports={"r.xml": PASSED})
        world.task("skipped", "deploy", branch)
    root = world.merged()
    assert [(suite.name, suite.tests, suite.skipped) for suite in root] == [
        ("main / unit", 1, 0), ("main / deploy", 1, 1),
        ("feature/x / unit", 1, 0), ("feature/x / deploy", 1, 1),
    ]  # fmt: skip
    assert root.tests == 4


@pytest.mark.parametrize("profile", PROFILES)
def test_every_test_of_a_run_for_every_reader(world, profile):
    world.task("failed", reports={"r.xml": TESTS, "s.xml": PASSED})
    world.task("failed", branch="other", reports={"r.xml": TESTS})
    world.task("infra", "lint", "other", reason="no machine")
    root = world.merged(profile)
    assert (root.tests, root.failures, root.errors) == (4 + 1 + 4 + 1, 2, 1)
    assert check_report(world.output / "junit.xml") == []


def test_class_names_of_one_branch_do_not_have_its_name(world):
    world.task(reports={"r.xml": PASSED})
    world.task("infra", "lint", reason="r")
    names = [case.classname for suite in world.merged("gitlab") for case in suite]
    assert names == ["unit.c", "lint"]


def test_class_names_of_several_branches_have_their_names(world):
    for branch in ("main", "other"):
        world.task("infra", branch=branch, reports={"r.xml": PASSED})
    names = [case.classname for suite in world.merged("gitlab") for case in suite]
    assert names == ["main / unit.c", "main / unit", "other / unit.c", "other / unit"]


def test_a_task_without_a_folder(world):
    world.tasks.append(TaskResult("x", "main", "c" * 40, "unit", "cancelled", "the run ended"))
    world.output.mkdir()
    assert world.merged().tests == 1
