"""The history of runs: real files of SQLite, processes that write at once, damage, other versions."""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from pytest_microvm.ci.results import history as module
from pytest_microvm.ci.results.history import CaseResult, History
from pytest_microvm.ci.results.result import Counts, RunResult, StepResult, TaskResult
from pytest_microvm.cli import ci_history
from pytest_microvm.errors import HostError, UsageError

HOSTILE = "\x1b[2J::error::x\n##[group]\ud800\u202e[red]"


def task(name: str = "main.test", **changes) -> TaskResult:
    values = {"branch": "main", "commit": "a" * 40, "job": "test", "verdict": "passed", **changes}
    return TaskResult(name, **values)


def run(name: str, *tasks: TaskResult, ago: float = 0.0, **changes) -> RunResult:
    values = {"repository": "/code", "definition": "main:pyproject.toml", "seconds": 2.5, **changes}
    return RunResult(name, started=time.time() - ago, tasks=tasks or (task(),), **values)


@pytest.fixture
def told():
    return []


@pytest.fixture
def history(tmp_path, told):
    return History(tmp_path, told.append)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ci" / "history.sqlite3"


def test_a_run_comes_back_as_it_was(history):
    full = task(
        verdict="failed",
        reason="step 'unit' ended with 1",
        attempts=2,
        phases={"run": 1.5},
        steps=(StepResult("unit", 1, 1.5),),
        tests=Counts(3, 1, 0, 2, 1),
        artifacts=("dist/a.whl",),
        machine={"image": "base", "peak_memory_bytes": 5},
        denied=("evil.example:443",),
        worker="host-2",
        lost_workers=1,
    )
    stored = run("r1", full, task("main.lint", job="lint"), interrupted=True)
    cases = [
        CaseResult("main.test", "tests.test_a.test_one", "failed", 0.25),
        CaseResult("main.lint", "x", "passed"),
    ]
    history.add(stored, cases)
    assert history.run("r1") == stored
    assert history.cases("r1") == cases


def test_runs_come_the_newest_first_by_branch_and_up_to_a_limit(history):
    for number in range(4):
        branch = "main" if number % 2 else "feature/a"
        history.add(run(f"r{number}", task(branch=branch), task("x", branch="x"), ago=100 - number))
    assert [found.id for found in history.runs(3)] == ["r3", "r2", "r1"]
    found = history.runs(10, ["feature/*"])
    assert [(one.id, [of.branch for of in one.tasks]) for one in found] == [
        ("r2", ["feature/a"]),
        ("r0", ["feature/a"]),
    ]


def test_a_run_is_found_by_the_beginning_of_its_id(history):
    for name in ("20260101-ab", "20260101-abc", "20260202-x"):
        history.add(run(name, ago=0 if name.endswith("x") else 50))
    assert history.run("202602").id == "20260202-x"
    assert history.run("20260101-ab").id == "20260101-ab"
    assert history.run("last").id == "20260202-x"
    for prefix, words in (("2026", "more than one"), ("3", "no run"), ("", "''"), ("%", "no run")):
        with pytest.raises(UsageError, match=words):
            history.run(prefix)


def test_a_run_that_is_added_again_is_replaced(history):
    history.add(run("r", task(verdict="failed")), [CaseResult("main.test", "a", "failed")])
    history.add(run("r"), [CaseResult("main.test", "a", "passed")])
    assert [one.tasks[0].verdict for one in history.runs(5)] == ["passed"]
    assert history.cases("r") == [CaseResult("main.test", "a", "passed")]


def outcomes(history, commit: str, *words: str, name: str = "test_it", **changes) -> None:
    for number, word in enumerate(words):
        known = run(f"{commit}-{name}-{number}-{changes}", task(commit=commit, **changes))
        history.add(known, [CaseResult("main.test", name, word)])


def test_flaky_tests_mix_outcomes_in_one_commit_worst_first(history):
    outcomes(history, "a" * 40, "passed", "failed", "passed", name="across")
    outcomes(history, "a" * 40, "passed", "error", name="worst")
    outcomes(history, "b" * 40, "flaky", name="worst")
    outcomes(history, "a" * 40, "flaky", "passed", name="in one run")
    outcomes(history, "a" * 40, "failed", "failed", name="broken")
    outcomes(history, "a" * 40, "passed", "skipped", name="sound")
    outcomes(history, "a" * 40, "failed", name="repaired")
    outcomes(history, "b" * 40, "passed", name="repaired")
    outcomes(history, "a" * 40, "failed", name="of two jobs", job="lint")
    outcomes(history, "a" * 40, "passed", name="of two jobs")
    found = [(one.name, one.commits, one.passed, one.failed, one.flaky) for one in history.flaky()]
    assert found == [("worst", 2, 1, 1, 1), ("across", 1, 2, 1, 0), ("in one run", 1, 1, 0, 1)]


def test_flaky_tests_before_the_given_days_are_left_out(history):
    old = run("old", ago=10 * 86400)
    history.add(old, [CaseResult("main.test", "a", "flaky")])
    assert [one.name for one in history.flaky()] == ["a"]
    assert history.flaky(days=5) == []


def test_what_is_too_old_or_too_much_goes(history, monkeypatch, file):
    monkeypatch.setattr(module, "KEPT_RUNS", 3)
    monkeypatch.setattr(module, "KEPT_CASES", 5)
    history.add(run("ancient", ago=91 * 86400))
    for number in range(5):
        cases = [CaseResult("main.test", f"t{n}", "passed") for n in range(2)]
        history.add(run(f"r{number}", ago=100 - number), cases)
    assert [one.id for one in history.runs(10)] == ["r4", "r3", "r2"]
    assert [len(history.cases(f"r{number}")) for number in (4, 3, 2)] == [2, 2, 0]
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("SELECT COUNT(*) FROM tasks").fetchone() == (3,)
        assert database.execute("SELECT COUNT(*) FROM cases").fetchone() == (4,)


def test_one_run_cannot_fill_the_history(history, monkeypatch):
    monkeypatch.setattr(module, "_CASES_OF_A_RUN", 10)
    cases = (CaseResult("main.test", "x" * 5000 + str(number), "passed") for number in range(1000))
    history.add(run("r"), cases)
    assert len(history.cases("r")) == 10
    assert {len(case.name) for case in history.cases("r")} == {1000}


WRITER = """
import sys, time
from pathlib import Path
from pytest_microvm.ci.results.history import CaseResult, History
from pytest_microvm.ci.results.result import RunResult, TaskResult
who = sys.argv[2]
history = History(Path(sys.argv[1]))
task = TaskResult("t", "main", "a" * 40, "test", "passed")
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    run = RunResult(f"{who}-{number}", "/code", "main", time.time(), 1.0, (task,))
    history.add(run, [CaseResult("t", f"test_{n}", "passed") for n in range(50)])
"""


def test_processes_may_write_at_once_from_the_first_moment(tmp_path, history):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, who],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for who in "abc"
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        with writer:
            writer.communicate()
        assert writer.returncode == 0
    assert len(history.runs(100)) == 60
    assert all(len(history.cases(f"{who}-19")) == 50 for who in "abc")


@pytest.mark.parametrize("how", ["no database", "a page overwritten", "cut"])
def test_a_damaged_file_is_put_aside_and_no_run_is_lost(history, file, told, how):
    for number in range(30):
        history.add(run(f"old{number}"), [CaseResult("main.test", "x" * 200, "passed")] * 20)
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(file.read_bytes())
    if how == "no database":
        data = bytearray(b"this is no database" * 1000)
    elif how == "a page overwritten":
        data[4096:] = b"\xa5" * (len(data) - 4096)
    else:
        del data[len(data) // 2 :]
    file.write_bytes(data)
    history.add(run("new"), [CaseResult("main.test", "a", "passed")])
    assert [one.id for one in history.runs(100)] == ["new"]
    assert len(told) == 1
    (aside,) = file.parent.glob("history.damaged-*.sqlite3")
    assert str(aside) in told[0]
    assert aside.read_bytes() == data


def test_a_newer_version_is_refused_and_left_alone(history, file, told):
    history.add(run("r"))
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(HostError, match=r"newer version.*format 99"):
        history.add(run("s"))
    with pytest.raises(HostError, match="upgrade pytest-microvm"):
        history.runs(1)
    assert told == []
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("SELECT id FROM runs").fetchall() == [("r",)]


def test_what_an_older_version_did_not_know_has_its_default(history, file):
    history.add(run("r", task(worker="host")))
    with closing(sqlite3.connect(file)) as database:
        database.execute("UPDATE tasks SET data = json_remove(data, '$.lost_workers', '$.worker')")
        database.commit()
    assert history.run("r").tasks == (task(),)


def test_a_place_that_cannot_be_used_is_explained(tmp_path):
    (tmp_path / "ci").write_text("a file where the folder should be")
    with pytest.raises(HostError, match="history of runs cannot be used"):
        History(tmp_path).add(run("r"))


def command(monkeypatch, cache, *words: str) -> int:
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(cache))
    parser = argparse.ArgumentParser()
    ci_history.add_parsers(parser.add_subparsers())
    arguments = parser.parse_args(words)
    return arguments.run(arguments)


def test_the_commands_list_and_show_runs(history, tmp_path, monkeypatch, capsys):
    bad = task(verdict="failed", tests=Counts(3, 1), reason="1 test failed", denied=("evil.example",))
    history.add(run("2026-ab", bad), [CaseResult("main.test", "tests.test_a", "failed", 0.5)])
    assert command(monkeypatch, tmp_path, "history") == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["RUN", "BEGAN", "TOOK", "OUTCOME", "JOBS", "BRANCHES", "REPOSITORY"]
    assert line.split()[0] == "2026-ab"
    assert line.endswith("2.5 s  failed   1 failed  main      /code")
    assert command(monkeypatch, tmp_path, "show", "last") == 0
    out = capsys.readouterr().out
    assert "run 2026-ab: failed, 1 failed, 2.5 s" in out
    assert "failed   main    aaaaaaaaaa  test  4, 1 failed  0.0 s  1 test failed" in out
    assert "main / test:\n  failed  tests.test_a  0.50 s\n  denied  evil.example" in out


def test_the_commands_speak_json(history, tmp_path, monkeypatch, capsys):
    history.add(run("r1"), [CaseResult("main.test", "t", "flaky")])
    command(monkeypatch, tmp_path, "history", "--json")
    assert [(one["id"], one["exit_code"]) for one in json.loads(capsys.readouterr().out)] == [("r1", 0)]
    command(monkeypatch, tmp_path, "history", "--flaky", "--json")
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["t"]
    command(monkeypatch, tmp_path, "show", "r", "--json")
    assert json.loads(capsys.readouterr().out)["cases"][0]["outcome"] == "flaky"


def test_the_commands_say_when_there_is_nothing(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, tmp_path, "history") == 0
    assert command(monkeypatch, tmp_path, "history", "--flaky") == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "no runs yet" in told.err


@pytest.mark.parametrize("terminal", [False, True])
def test_hostile_names_change_nothing_on_the_screen(history, tmp_path, monkeypatch, capsys, terminal):
    hostile = task(branch=HOSTILE, job=HOSTILE, reason=HOSTILE, verdict="failed", denied=(HOSTILE,))
    history.add(run("r", hostile), [CaseResult("main.test", HOSTILE, "flaky")])
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    for words in (["history"], ["history", "--flaky"], ["show", "last"], ["history", "--json"]):
        command(monkeypatch, tmp_path, *words)
        out = capsys.readouterr().out
        assert "[red]" in "".join(out.split())
        assert "\x1b[2J" not in out
        assert "\u202e" not in out
        assert not any(line.lstrip().startswith("::") for line in out.splitlines())
