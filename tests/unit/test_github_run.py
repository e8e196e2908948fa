"""The run of the action as a process: what the runner sees of it, and how it ends."""

import os
import signal
import subprocess
import sys

import pytest

from support import guards
from support.github.runner import Commands

HOSTILE = r"printf '::error::forged\n\r::notice::forged\r##[warning]forged\n::set-output name=a::b'"
PROGRAM = """
import sys
from pathlib import Path
from pytest_microvm.ci.github.inputs import read_inputs
from pytest_microvm.ci.github.run import run_guarded
inputs = read_inputs({"INPUT_WORKING_DIRECTORY": sys.argv[1], "INPUT_TRUST": sys.argv[2]}, Path(sys.argv[1]))
print("::notice::before")
code = run_guarded(["/bin/sh", "-c", sys.argv[3]], inputs, sys.stdout)
print(f"::notice::{code}", flush=True)
"""


def start(folder, script, trust="false"):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), trust, script], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "GITHUB_OUTPUT": "/github/output"},
    )  # fmt: skip


def obeyed(output):
    commands = Commands()
    for line in output.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        commands.feed(line)
    return [(command.name, command.data) for command in commands.obeyed]


def test_what_it_prints_is_no_command(tmp_path):
    with start(tmp_path, HOSTILE + "; exit 3") as process:
        output, _ = process.communicate(timeout=guards.PROCESS)
    assert b"forged" in output
    assert obeyed(output) == [("notice", "before"), ("remove-matcher", ""), ("notice", "3")]


def test_without_that_it_would_be():
    output = subprocess.run(["/bin/sh", "-c", HOSTILE], capture_output=True, check=True).stdout
    assert {name for name, _data in obeyed(output)} == {"error", "notice", "warning", "set-output"}


def test_command_does_not_get_the_github_output_file(tmp_path):
    with start(tmp_path, 'echo "file: [$GITHUB_OUTPUT]"') as process:
        output, _ = process.communicate(timeout=guards.PROCESS)
    assert b"file: []" in output


@pytest.mark.parametrize(("trust", "told"), [("true", b"[1]"), ("false", b"[]")])
def test_trust_is_for_the_run(tmp_path, monkeypatch, trust, told):
    monkeypatch.delenv("PYTEST_MICROVM_TRUST", raising=False)
    with start(tmp_path, 'echo "[$PYTEST_MICROVM_TRUST]"', trust) as process:
        output, _ = process.communicate(timeout=guards.PROCESS)
    assert told in output


def test_a_cancelled_job_waits_for_its_machines_to_be_tidied_up(tmp_path):
    """GitHub signals the step's process alone."""
    script = "trap 'echo tidied; exit 130' INT; echo begun; while :; do sleep 0.1; done"
    with start(tmp_path, script) as process:
        while b"begun" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=guards.PROCESS)
    assert b"tidied" in output
    assert output.rstrip().endswith(b"::notice::130")


def test_a_command_that_a_signal_ended(tmp_path):
    with start(tmp_path, "kill -KILL $$") as process:
        output, _ = process.communicate(timeout=guards.PROCESS)
    assert obeyed(output)[-1] == ("notice", "137")
