"""``pytest-microvm run``: streams, exit statuses, Ctrl-C, terminals, what comes back and what is recorded."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess

import pytest

from support import guards
from support.commands import MICROVM

RUN = [*MICROVM, "run", "--image", "base"]


def run(*arguments, **options):
    return subprocess.run(
        [*RUN, *arguments], capture_output=True, text=True, timeout=guards.MACHINE, check=False, **options
    )


def test_streams_and_exit_status():
    done = run("--env", "GREETING=hello", "--workdir", "/tmp", "--user", "nobody", "--quiet", "--",
               "sh", "-c", "cat; echo $GREETING $PWD $(id -un); echo oops >&2; exit 7",
               input="from stdin\n")  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (7, "from stdin\nhello /tmp nobody\n", "oops\n")


@pytest.mark.parametrize(
    ("options", "command", "status", "said"),
    [
        ([], ["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM, ""),
        ([], ["no-such-program"], 127, "no such program"),
        ([], ["/etc/hostname"], 126, "Permission denied"),
        (["--timeout", "1"], ["sleep", "600"], 124, "timeout: limit 1 s"),
        (["--output", "10K"], ["sh", "-c", "while :; do echo y; done"], 124, "output: limit 10 KiB"),
        ([], ["sh", "-c", "echo b > /proc/sysrq-trigger; sleep 600"], 125, "ended"),
        (["--fail-on-denied"], ["sh", "-c", "getent hosts example.com; true"], 77, "denied DNS"),
        (["--memory", "1M"], ["true"], 4, "at least 128M to boot"),
        (["--secret", "A=hunter22", "--quiet"], ["true"], 4, "invalid source of a value"),
    ],
)  # fmt: skip
def test_exit_statuses(options, command, status, said):
    done = run(*options, "--", *command)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter22" not in done.stderr


def test_network_all_warns_even_when_quiet():
    done = run("--quiet", "--network", "all", "--", "true")
    assert (done.returncode, done.stdout) == (0, "")
    assert "WARNING: network = all" in done.stderr


def test_infra_has_a_status_of_its_own(tmp_path):
    done = run("--", "true", env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 75, done.stderr
    assert "qemu-system" in done.stderr


def test_what_it_prints_cannot_act_unless_it_is_wanted_raw():
    script = r"printf '\033]0;title\007\n::set-output name=x::y\n'"
    safe, raw = run("--quiet", "--", "sh", "-c", script), run("--quiet", "--raw", "--", "sh", "-c", script)
    assert "\033" not in safe.stdout
    assert not re.search("^::", safe.stdout, re.MULTILINE)
    assert raw.stdout == "\033]0;title\007\n::set-output name=x::y\n"


def test_run_pushes_pulls_mounts_and_records_events(tmp_path):
    (tmp_path / "in.txt").write_text("content\n")
    done = run(
        "--push", f"{tmp_path}/in.txt:/code/in.txt", "--pull", f"/code/out.txt:{tmp_path}/back.txt",
        "--mount", f"{tmp_path}/shared:/shared", "--record", f"{tmp_path}/record", "--network", "deny:all",
        "--", "sh", "-c", "tr a-z A-Z < /code/in.txt | tee /code/out.txt > /shared/new; exit 3",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "back.txt").read_text() == "CONTENT\n"
    assert (tmp_path / "shared/new").read_text() == "CONTENT\n"
    assert "copied back: 1 created" in done.stderr
    machine = json.loads((tmp_path / "record/machine.json").read_text())
    assert machine["usage"]["cpu_seconds"] > 0
    events = [json.loads(line) for line in (tmp_path / "record/events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events if event["kind"] in ("push", "mount", "command", "pull")] == [
        "mount", "push", "command", "pull",
    ]  # fmt: skip


def test_ctrl_c_reaches_the_command():
    script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    with subprocess.Popen(
        [*RUN, "--quiet", "--", "sh", "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "caught\n"
        assert process.wait(guards.MACHINE) == 9


def test_a_second_ctrl_c_ends_the_wait():
    script = "trap 'echo caught' INT; echo ready; while :; do sleep 0.1; done"
    with subprocess.Popen(
        [*RUN, "--quiet", "--", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "caught\n"
        process.send_signal(signal.SIGINT)
        _out, errors = process.communicate(timeout=guards.MACHINE)
    assert process.returncode == 130
    assert "interrupted" in errors


def test_a_terminal_when_there_is_one():
    master, slave = pty.openpty()
    process = subprocess.Popen([*RUN, "--quiet", "--", "sh"], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    said = b""

    def until(text):
        nonlocal said
        while text not in said:
            assert select.select([master], [], [], guards.MACHINE)[0], said
            said += os.read(master, 4096)

    try:
        until(b"#")
        # A loop that starts no program: dash loses an interrupt between a fork and its exec.
        os.write(master, b"trap 'echo interrupted; exit 5' INT; tty; echo waiting; while :; do :; done\n")
        until(b"\nwaiting\r\n")
        assert b"\n/dev/pts/" in said
        os.write(master, b"\x03")
        until(b"interrupted\r\n")
        assert process.wait(guards.MACHINE) == 5
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_a_kept_machine_can_be_entered():
    done = run("--keep", "--", "sh", "-c", "echo left > /root/note")
    kept = re.search(r"pytest-microvm shell (vm-[0-9a-f]{8})", done.stderr)
    assert kept, done.stderr
    try:
        shown = subprocess.run(
            [*MICROVM, "shell", kept[1], "--", "cat", "/root/note"],
            capture_output=True, text=True, timeout=guards.MACHINE, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert shown.stdout == "left\n"
    finally:
        subprocess.run([*MICROVM, "rm", kept[1]], check=True, timeout=guards.MACHINE, capture_output=True)


def test_a_secret_is_given_and_not_shown(tmp_path):
    (tmp_path / "key").write_text("correct-horse-battery\n")
    done = run(
        "--secret", f"KEY=file:{tmp_path}/key", "--record", f"{tmp_path}/record", "--",
        "sh", "-c", 'echo "it is $KEY" | tee /dev/console; printf %s "$KEY" | base64',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "it is ***\n***\n"
    refused = run("--keep", "--secret", f"KEY=file:{tmp_path}/key", "--", "true")
    assert refused.returncode == 4
    assert "exclude each other" in refused.stderr
    recorded = "".join(path.read_text() for path in (tmp_path / "record").iterdir())
    assert "it is ***" in recorded
    assert recorded.count("correct-horse-battery") == 0
