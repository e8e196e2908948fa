"""``pytest-microvm ci run`` with real machines: grants, order, what comes back, whose templates, an end."""

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from junitparser import JUnitXml

from support import guards
from support.commands import MICROVM
from support.repositories import git, lfs_pointer, store_lfs_object

DEFINITION = """
[ci.defaults]
image = "base"
memory = "192M"
retries = 1

[ci.jobs.build]
steps = ["mkdir -p dist/deep; echo built > dist/deep/it.whl", "ln -s /etc/passwd dist/link"]
artifacts = ["dist/**"]

[ci.jobs.check]
needs = ["build"]
matrix = { level = ["low", "high"] }
env = { NAME = "level ${matrix.level}" }
steps = [
  'echo "$NAME is $MATRIX_LEVEL"',
  { name = "fails", run = 'test "$MATRIX_LEVEL" = low' },
  { name = "after success", run = "echo not for the high" },
  { name = "after failure", run = "echo for the high", when = "failure" },
  { name = "always", run = "echo for both", when = "always" },
]

[ci.jobs.after]
needs = ["check"]
steps = ["true"]

[ci.jobs.dies]
allow_failure = true
steps = ["mkdir out; echo kept > out/kept.txt", "echo c > /proc/sysrq-trigger; sleep 60"]
artifacts = ["out/*"]

[ci.jobs.floods]
allow_failure = true
output = "1M"
steps = [
  "mkdir out; truncate -s 8G out/large; ln -s /dev/zero out/link; mkfifo out/pipe; echo small > out/small",
  "yes",
]
artifacts = ["out/*", "[z-a]"]

[ci.jobs.secret]
steps = ['echo "it is ${TOKEN:-nothing}"; test -n "${TOKEN:-}" && echo it is there || echo it is not']
secrets = { TOKEN = { env = "CI_TEST_TOKEN" } }

[ci.jobs.history]
image = "agent"
git = true
steps = [
  "git log --oneline; git branch --show-current; git status --porcelain; git remote",
  "cat large.bin; git describe --always --dirty",
]

[ci.jobs.prepared]
prepare = ["cat lock > /made; echo once >> /made; test ! -e other"]
prepare_inputs = ["lock"]
steps = ["cat /made; cat other"]
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ci") / "project"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    (folder / "microvm.toml").write_text(DEFINITION)
    (folder / "lock").write_text("locked\n")
    (folder / "other").write_text("other of main\n")
    name, pointer = lfs_pointer(b"large\n")
    (folder / ".gitattributes").write_text("*.bin filter=lfs\n")
    (folder / "large.bin").write_text(pointer)
    store_lfs_object(folder, name, b"large\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "first")
    git(folder, "checkout", "--quiet", "-b", "feature/x")
    (folder / "other").write_text("other of feature\n")
    git(folder, "commit", "--quiet", "--all", "-m", "second")
    git(folder, "checkout", "--quiet", "-b", "no-image", "main")
    (folder / "microvm.toml").write_text('[ci.jobs.test]\nimage = "nowhere"\nsteps = ["true"]\n')
    git(folder, "commit", "--quiet", "--all", "-m", "third")
    git(folder, "checkout", "--quiet", "main")
    return folder


def environment(**more):
    return {**os.environ, "PYTEST_MICROVM_TRUST": "1", "CI_TEST_TOKEN": "hush-hush", "CI": "true", **more}


def command(folder, *options):
    return [*MICROVM, "ci", "run", "-C", str(folder), *options]


def run(folder, output, *options, expect=0, **env):
    done = subprocess.run(
        command(folder, "--output", str(output), *options), env=environment(**env), cwd=output.parent,
        capture_output=True, text=True, timeout=guards.SUITE, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    results = output / "results.json"
    tasks = json.loads(results.read_text())["tasks"] if results.exists() else []
    return done, {(task["branch"], task["job"]): task for task in tasks}


@pytest.fixture(scope="module")
def done(repository, tmp_path_factory):
    """One run of everything, for two branches."""
    output = tmp_path_factory.mktemp("done") / "results"
    return (*run(repository, output, "--branch", "main", "--branch", "f*", expect=1), output)


def log(done, title):
    _process, tasks, output = done
    return (output / tasks[title]["id"] / "log.txt").read_text()


def test_each_job_has_its_verdict(done):
    _process, tasks, _output = done
    verdicts = {title: task["verdict"] for title, task in tasks.items()}
    wanted = {
        "build": "passed", "check (level=low)": "passed", "check (level=high)": "failed", "after": "skipped",
        "dies": "crashed", "floods": "quota", "secret": "passed", "history": "passed", "prepared": "passed",
    }  # fmt: skip
    assert verdicts == {
        (branch, job): verdict for branch in ("main", "feature/x") for job, verdict in wanted.items()
    }
    assert tasks["main", "after"]["reason"] == "it needs check (level=high)"
    assert tasks["main", "check (level=high)"]["reason"] == "step 'fails' ended with status 1"


def test_steps_run_when_they_are_meant_to(done):
    _process, tasks, _output = done
    low = [step["status"] for step in tasks["main", "check (level=low)"]["steps"]]
    high = [step["status"] for step in tasks["main", "check (level=high)"]["steps"]]
    assert low == [0, 0, 0, None, 0]
    assert high == [0, 1, None, 0, 0]
    assert "level high is high\n" in log(done, ("main", "check (level=high)"))


def test_files_come_back_as_far_as_they_got(done):
    _process, tasks, output = done
    build = tasks["main", "build"]
    assert build["artifacts"] == ["main.build/artifacts/dist/deep/it.whl"]  # a link is no file
    assert (output / build["artifacts"][0]).read_text() == "built\n"
    dead = tasks["main", "dies"]
    assert (output / dead["id"] / "artifacts/out/kept.txt").read_text() == "kept\n"  # of the step before
    assert "panic" in (output / dead["id"] / "console.txt").read_text().lower()
    assert dead["attempts"] == 1  # what died while it worked is not tried again
    assert all((output / task["id"] / "junit.xml").exists() for task in tasks.values())


def test_what_a_job_gives_back_has_bounds(done):
    _process, tasks, output = done
    task = tasks["main", "floods"]
    assert task["reason"].startswith("output: limit 1 MiB")
    assert task["artifacts"] == [f"{task['id']}/artifacts/out/small"]
    folder = output / task["id"]
    assert [path.name for path in (folder / "artifacts/out").iterdir()] == ["small"]
    assert "not taken back: out/large: it has 8589934592 bytes" in log(done, ("main", "floods"))
    assert "'[z-a]' is no glob" in log(done, ("main", "floods"))
    assert (folder / "log.txt").stat().st_size < 8 * 2**20


def test_a_branch_has_what_its_definition_grants_it(done):
    assert "it is ***" in log(done, ("main", "secret"))
    assert "it is there" in log(done, ("main", "secret"))
    assert "it is nothing\nit is not" in log(done, ("feature/x", "secret"))
    process, _tasks, output = done
    said = process.stdout + process.stderr
    files = [path.read_bytes() for path in output.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not any(b"hush-hush" in content for content in [said.encode(), *files])


def test_every_step_is_in_the_merged_report(done):
    _process, tasks, output = done
    suites = {suite.name: list(suite) for suite in JUnitXml.fromfile(str(output / "junit.xml"))}
    assert set(suites) == {f"{branch} / {job}" for branch, job in tasks}
    assert [case.name for case in suites["main / check (level=low)"]][1:] == [
        "fails", "after success", "after failure", "always",
    ]  # fmt: skip
    names = [(suite, case.classname, case.name) for suite, cases in suites.items() for case in cases]
    assert len(set(names)) == len(names)


def test_history_is_there_if_it_was_asked_for(done, repository):
    for branch in ("main", "feature/x"):
        wanted = git(repository, "log", "--oneline", branch)
        lines = log(done, (branch, "history")).splitlines()
        assert lines[1:-3] == [*wanted.splitlines(), branch]
        assert lines[-2:] == ["large", wanted.split()[0]]  # a large file is no change


def test_task_record_has_phases_and_machine_usage(done):
    _process, tasks, _output = done
    task = tasks["main", "build"]
    assert set(task["phases"]) == {"queue", "prepare", "restore", "sync", "run", "collect"}
    assert task["seconds"] >= task["phases"]["run"] > 0
    assert task["machine"]["image"] == "base"
    assert task["machine"]["peak_memory_bytes"] > 2**20


def test_no_branch_gives_another_one_its_template(repository, done, tmp_path):
    """Main's is everybody's; a branch's own is its own, even if another one wants the same."""
    assert "preparing" in done[0].stdout
    assert log(done, ("main", "prepared")).endswith("locked\nonce\nother of main\n")
    assert "once\nother of feature" in log(done, ("feature/x", "prepared"))
    git(repository, "checkout", "--quiet", "-B", "one", "main")
    (repository / "lock").write_text("poison\n")
    git(repository, "commit", "--quiet", "--all", "-m", "a lock of its own")
    git(repository, "branch", "--force", "two")
    made = []
    for branch in ("feature/x", "one", "one", "two"):
        process, tasks = run(repository, tmp_path / "out", "--branch", branch, "--job", "prepared")
        assert tasks[branch, "prepared"]["verdict"] == "passed"
        made.append("preparing: cat lock" in process.stdout)
    assert made == [False, True, False, True]
    git(repository, "checkout", "--quiet", "-B", "three", "main")
    (repository / "microvm.toml").write_text(DEFINITION.replace("once", "twice"))
    git(repository, "commit", "--quiet", "--all", "-m", "another definition")
    options = ("--branch", "three", "--branch", "feature/x", "--job", "prepared")
    process, _tasks = run(repository, tmp_path / "out", *options, "--definition-from", "three")
    assert process.stdout.count("preparing: cat lock") == 1  # the same inputs as main: one for both
    git(repository, "checkout", "--quiet", "main")
    git(repository, "merge", "--quiet", "two")  # the default branch makes its own, and then gives it to all
    try:
        process, _tasks = run(repository, tmp_path / "out", "--branch", "main", "--job", "prepared")
        assert "preparing: cat lock" in process.stdout
        process, _tasks = run(repository, tmp_path / "out", "--branch", "two", "--job", "prepared")
        assert "preparing: cat lock" not in process.stdout
    finally:
        git(repository, "reset", "--quiet", "--hard", "HEAD~1")


def test_the_work_tree_is_run_as_it_is(repository, tmp_path):
    (repository / "new").write_text("not committed")
    (repository / "microvm.toml").write_text(
        '[ci.jobs.look]\nimage = "base"\nsteps = ["cat new; test ! -e .git"]\n'
    )
    try:
        options = ("--worktree", "--definition-from", "worktree")
        _process, tasks = run(repository, tmp_path / "out", *options)
    finally:
        git(repository, "checkout", "--quiet", "--", "microvm.toml")
        (repository / "new").unlink()
    assert tasks["worktree", "look"]["verdict"] == "passed"
    assert "not committed" in (tmp_path / "out/worktree.look/log.txt").read_text()


def test_a_machine_that_never_begins_is_infra(repository, tmp_path):
    process, tasks = run(
        repository, tmp_path / "out", "--branch", "main", "--job", "build", expect=75,
        PYTEST_MICROVM_BUDGET="cpus=0.1",
    )  # fmt: skip
    task = tasks["main", "build"]
    assert (task["verdict"], task["attempts"]) == ("infra", 2)
    assert "trying again (1 of 1)" in process.stdout
    [suite] = JUnitXml.fromfile(str(tmp_path / "out/junit.xml"))
    assert suite.errors == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_run_gives_back_what_there_is(repository, tmp_path, number):
    (repository / "microvm.toml").write_text(
        '[ci.defaults]\nimage = "base"\n'
        '[ci.jobs.long]\nartifacts = ["out/*"]\n'
        'steps = ["mkdir out; echo x > out/x; echo waiting; sleep 900"]\n'
        '[ci.jobs.later]\nneeds = ["long"]\nsteps = ["true"]\n'
    )
    options = ("--output", "out", "--worktree", "--definition-from", "worktree")
    try:
        with subprocess.Popen(
            command(repository, *options), env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, text=True
        ) as process:
            guard = threading.Timer(guards.SUITE, process.kill)
            guard.start()
            said = []
            for line in process.stdout:
                said.append(line)
                if line.strip().endswith("] waiting"):
                    process.send_signal(number)
            assert process.wait(guards.SUITE) == 130, "".join(said)
            guard.cancel()
    finally:
        git(repository, "checkout", "--quiet", "--", "microvm.toml")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["interrupted"]
    assert [task["verdict"] for task in results["tasks"]] == ["cancelled", "cancelled"]
    assert (tmp_path / "out/worktree.long/artifacts/out/x").read_text() == "x\n"
    assert "waiting" in (tmp_path / "out/worktree.long/log.txt").read_text()
    owned = [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_machine_of(path, process.pid)]
    assert owned == []


def is_machine_of(path, owner):
    try:
        return f"PPid:\t{owner}\n" in path.with_name("status").read_text()
    except OSError:
        return False


def test_the_plan_is_printed_and_nothing_runs(repository, tmp_path):
    process, tasks = run(repository, tmp_path / "out", "--dry-run", "--branch", "main")
    assert "main / secret (" in process.stdout
    assert "secret TOKEN" in process.stdout
    assert not tasks
    assert not (tmp_path / "out").exists()


def test_definition_without_trust_is_refused(repository, tmp_path):
    process, _tasks = run(
        repository, tmp_path / "out", "--branch", "main", expect=4, PYTEST_MICROVM_TRUST="0"
    )
    assert "ci.jobs.secret.secrets" in process.stderr
    assert "pytest-microvm trust" in process.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--branch", "nope"], "no branch matches 'nope'"),
        (["--job", "nope"], "there is no job 'nope'"),
        (["--definition-from", "no-image"], "there is no kit 'nowhere'"),
        (["--jobs", "0"], "invalid --jobs: expected 1 or more machines, got 0"),
        (["--ref", "--upload-pack=x"], "expected one argument"),
        (["--ref=--upload-pack=x"], "cannot be a ref"),
        (["--junit-profile", "nope"], "generic"),
        (["--output", "."], "not empty"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(repository, tmp_path, options, said):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".gitignore").write_text("*")
    done = subprocess.run(
        command(repository, *options), env=environment(), cwd=tmp_path, capture_output=True, text=True,
        timeout=guards.SUITE, check=False,
    )  # fmt: skip
    assert done.returncode in (2, 4), done.stdout + done.stderr
    assert said in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", "precious"]
