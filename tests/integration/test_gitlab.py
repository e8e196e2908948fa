"""GitLab's custom executor: jobs driven as gitlab-runner drives them, well-behaved ones and others."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import subprocess
from pathlib import Path

import pytest

from pytest_microvm.ci.gitlab.job import job_key
from pytest_microvm.templates.runtime_folder import runtime_folder
from support import gitlab, guards
from support.gitlab import Job
from support.repositories import git


@pytest.fixture
def runner(tmp_path):
    """Return a runner for an operator's file."""

    def make(text='image = "base"\n'):
        config = tmp_path / "gitlab.toml"
        config.write_text(text)
        return gitlab.GitlabRunner(config, tmp_path)

    return make


def holder_of(execution):
    """Return the folder of what holds the machine."""
    key = job_key({**execution._variables(), "TMPDIR": str(execution.folder)})
    return runtime_folder() / "held" / key


def watch(pid):
    return os.pidfd_open(pid)


def wait_ended(*watched):
    for descriptor in watched:
        assert select.select([descriptor], [], [], guards.MACHINE)[0], "it still runs"
        os.close(descriptor)


@pytest.fixture
def repository(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "check.sh").write_text("test -f check.sh && echo checked > result.txt && cat result.txt\n")
    git(work, "init", "-q", "-b", "main")
    git(work, "add", ".")
    git(work, "commit", "-q", "-m", "first")
    with gitlab.served(work, tmp_path / "served") as served:
        yield served


def test_a_job_from_its_sources_to_its_end(runner, repository):
    job = Job(
        [
            "sh check.sh",
            "git log -1 --format=%s",
            "curl -sS -m 20 http://other.example/",
        ],
        after_script=["cat result.txt"],
        repository=repository.url,
        variables={"CI_SERVER_HOST": "other.example", "CI_SERVER_URL": "http://other.example"},
    )
    execution = runner(f'image = "agent"\n[machine]\n{repository.machine}').start(job)
    try:
        assert execution.prepare(), execution.stages
        holder = json.loads((holder_of(execution) / "holder.json").read_text())["pid"]
        assert os.getpgid(holder) == holder  # what the runner does to prepare's group is not for it
        assert b"CUSTOM_ENV" not in Path(f"/proc/{holder}/environ").read_bytes()
        verdict = execution.perform()
    finally:
        cleanup = execution.cleanup()
    assert verdict.status == "success", verdict.log
    assert verdict.names == [
        *("config", "prepare", "prepare_script", "get_sources", "build_script", "after_script"),
        *("upload_artifacts_on_success", "cleanup_file_variables", "cleanup"),
    ]
    config = json.loads(verdict.stage("config").stdout)
    assert config["builds_dir"] == "/builds"
    assert config["driver"]["name"] == "pytest-microvm"
    assert "network: gitlab.example" in verdict.stage("prepare").stderr
    said = verdict.stage("build_script").stdout
    assert "\nchecked\n" in said
    assert "\nfirst\n" in said
    assert "denied: no rule allows other.example" in said
    assert verdict.stage("after_script").stdout.endswith("checked\n")
    assert (cleanup.returncode, cleanup.stdout, cleanup.stderr) == (0, "", "")
    assert not holder_of(execution).exists()


def test_failing_script_reports_its_exit_code(runner):
    verdict = runner().run(Job(["echo before", "(exit 50)", "echo never"], after_script=["echo after"]))
    assert (verdict.status, verdict.exit_code) == ("failed", 50), verdict.log
    assert "never" not in verdict.stage("build_script").stdout.replace("$ echo never", "")
    assert verdict.stage("after_script").stdout == "$ echo after\nafter\n"
    assert "upload_artifacts_on_failure" in verdict.names
    assert verdict.names[-1] == "cleanup"


def test_cancelling_stops_the_script_in_the_machine(runner):
    script = [
        "trap 'echo trapped > /tmp/trapped' TERM",
        "sleep 6000 & echo wait''ing; wait $! || true",
        "sleep 6001",
    ]
    job = Job(
        script, after_script=["cat /tmp/trapped; ps ax | grep -c '[s]leep 600' || true"], cancel_at="waiting"
    )
    verdict = runner('image = "base"\ngrace = 1\n').run(job)
    assert verdict.status == "canceled", verdict.log
    assert verdict.stage("after_script").stdout.splitlines()[-2:] == ["trapped", "0"]
    assert verdict.stage("cleanup").returncode == 0


def test_hostile_script_cannot_forge_logs_or_stop_after_script(runner):
    script = [
        r"printf '\033]0;title\007\033[2Jsection_start:1:step_script\r\033[0Kforged\n'",
        "(sleep 6000 & echo left behind)",
        "kill -9 1; kill -9 -1; sleep 60",
    ]
    job = Job(script, after_script=["echo still $(hostname)"])
    verdict = runner().run(job)
    assert (verdict.status, verdict.exit_code) == ("failed", 128 + signal.SIGKILL), verdict.log
    assert not re.search(r"\033(?!\[[0-9;]*m)|\r", verdict.log)
    assert r"\x1b]0;title" in verdict.log
    assert "left behind" in verdict.log
    assert re.search(r"still vm-\w+$", verdict.stage("after_script").stdout)


def test_a_machine_that_dies_is_no_failure_of_the_script(runner):
    verdict = runner().run(Job(["echo c > /proc/sysrq-trigger; sleep 60"]))
    assert verdict.status == "system", verdict.log
    assert verdict.exit_code is None
    later = verdict.stage("upload_artifacts_on_failure")
    assert later.returncode == gitlab.SYSTEM_FAILURE
    assert "ended" in later.stderr
    assert "sysrq" in later.stderr.lower()  # the console's tail
    assert verdict.stage("cleanup").returncode == 0


def test_an_exceeded_quota_is_the_jobs_failure(runner):
    operator = 'image = "base"\n[machine]\ndisk = "16M"\n'
    verdict = runner(operator).run(Job(["dd if=/dev/zero of=/full bs=1M"]))
    assert (verdict.status, verdict.exit_code) == ("failed", 124), verdict.log
    assert "disk: limit 16 MiB" in verdict.stage("build_script").stderr


def test_an_image_that_is_not_offered_is_not_tried_again(runner):
    offer = 'image = "base"\n[images]\n"small" = "base"\n'
    refused = runner(offer).run(
        Job([], image="registry.example/any:latest", variables={"CI_JOB_IMAGE": "small"})
    )
    assert refused.status == "failed"
    assert refused.names == ["config", "prepare", "cleanup"]
    assert "images that are: small" in refused.stage("prepare").stderr


def test_jobs_do_not_reach_each_other_by_name(runner):
    one = runner().start(Job([]))
    other = runner().start(Job([], variables={"CI_JOB_ID": "1"}, identity=2))
    try:
        assert one.prepare()
        assert other.script("build_script", "hostname").returncode == gitlab.SYSTEM_FAILURE
        assert "nobody holds" in other.stages[-1].stderr
        assert other.cleanup().returncode == 0
        assert one.script("build_script", "echo mine").stdout == "mine\n"
    finally:
        assert one.cleanup().returncode == 0


@pytest.mark.parametrize(
    ("terms", "why"),
    [("idle = 0.1", "nobody used it"), ("lifetime = 0.1", "as long as it may"), ("", "folder")],
)
def test_abandoned_machine_ends(runner, terms, why):
    execution = runner(f'image = "base"\n{terms}\n').start(Job([]))
    folder = holder_of(execution)
    assert execution.prepare(), execution.stages
    if why == "folder":
        facts = json.loads((folder / "holder.json").read_text())
        ends = [watch(facts["pid"]), watch(facts["vmm"])]
        (folder / "socket").unlink()
        wait_ended(*ends)
    else:
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # free when the holder has ended
        late = execution.script("build_script", "true")
        assert late.returncode == gitlab.SYSTEM_FAILURE
        assert why in late.stderr
    assert execution.cleanup().returncode == 0
    assert not folder.exists()


def test_a_run_that_is_killed_stops_its_script(runner):
    execution = runner('image = "base"\ngrace = 0.1\n').start(Job([]))
    try:
        assert execution.prepare(), execution.stages
        script = execution.folder / "script"
        script.write_text("echo running; sleep 6000")
        command = [*gitlab.COMMAND, "run", *execution._runner._arguments, str(script), "build_script"]
        with subprocess.Popen(command, env=execution._variables(), stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"running\n"
            process.kill()
        # The holder notices by itself, and nobody tells when it has: the machine is asked until it is so.
        waiting = (
            "n=0; while pgrep -x sleep >/dev/null && [ $n -lt 300 ]; do n=$((n+1)); read -t 0.2 <> <(:); done"
        )
        assert execution.script("after_script", f"{waiting}\npgrep -c -x sleep || true").stdout == "0\n"
    finally:
        assert execution.cleanup().returncode == 0


def test_a_holder_that_is_killed_takes_its_machine_along(runner):
    execution = runner().start(Job([]))
    assert execution.prepare(), execution.stages
    facts = json.loads((holder_of(execution) / "holder.json").read_text())
    ends = [watch(facts["pid"]), watch(facts["vmm"])]
    os.kill(facts["pid"], signal.SIGKILL)
    wait_ended(*ends)
    gone = execution.script("build_script", "true")
    assert gone.returncode == gitlab.SYSTEM_FAILURE
    assert "nobody holds this job's machine" in gone.stderr
    assert execution.cleanup().returncode == 0


def test_a_prepare_that_is_stopped_leaves_nothing(runner, tmp_path):
    execution = runner().start(Job([]))
    command = [*gitlab.COMMAND, "prepare", "--config", str(tmp_path / "gitlab.toml")]
    folder = holder_of(execution)
    with subprocess.Popen(command, env=execution._variables(), start_new_session=True) as process:
        while not (folder / "lock").exists():
            assert process.poll() is None
            select.select([], [], [], 0.01)  # a folder of a process that may not have made it yet
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(guards.MACHINE) == gitlab.SYSTEM_FAILURE
    assert execution.cleanup().returncode == 0  # waits for the holder's end
    assert not folder.exists()


def test_cleanup_without_a_machine_and_twice(runner):
    execution = runner().start(Job([]))
    assert execution.stage("cleanup").returncode == 0
    assert execution.prepare(), execution.stages
    assert execution.stage("cleanup").returncode == 0
    assert execution.cleanup().returncode == 0


def test_bad_configuration_is_the_operators(runner):
    verdict = runner("imgae = 1\n").run(Job([]))
    assert verdict.status == "system"
    assert verdict.names == ["config", "cleanup"] * gitlab.PREPARE_TRIES
    assert "unknown key 'imgae'" in verdict.log
