"""``pytest-microvm python``: bytes both ways, ends that are seen, and plain pytest-xdist over it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from support import guards
from support.commands import MICROVM, PYTEST

PYTHON = [*MICROVM, "python", "--quiet"]
BUSY = "import socket, time\nprint(socket.gethostname())\nwhile True: time.sleep(60)"


def running():
    done = subprocess.run([*MICROVM, "ps", "--json"], capture_output=True, check=True, timeout=guards.MACHINE)
    return {machine["id"] for machine in json.loads(done.stdout) if machine["state"] == "running"}


def vmm_of(process):
    """Return the id of the VMM below ``process``: its only child that runs on."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        children += (task / "children").read_text().split()
    return int(children[0])


def test_every_byte_and_the_exit_status():
    data = bytes(range(256)) * 4096
    code = "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer); sys.exit(7)"
    done = subprocess.run(
        [*PYTHON, "-u", "-c", code], input=data, capture_output=True, timeout=guards.MACHINE, check=False
    )
    assert (done.returncode, done.stderr) == (7, b"")
    assert done.stdout == data


def test_stderr_is_apart_and_cannot_act():
    code = r"import sys; sys.stdout.write('\033[2J'); sys.stderr.write('\033]0;title\007 seen\n')"
    done = subprocess.run([*PYTHON, "-c", code], capture_output=True, timeout=guards.MACHINE, check=False)
    assert done.stdout == b"\033[2J"
    assert b"\033" not in done.stderr
    assert b"seen" in done.stderr


@pytest.mark.parametrize("how", ["killed", "left"])
def test_the_machine_ends_with_its_client(how):
    with subprocess.Popen(
        [*PYTHON, "-u", "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            machine = process.stdout.readline().decode().strip()
            assert machine in running()
            vmm = os.pidfd_open(vmm_of(process))
            if how == "killed":
                process.send_signal(signal.SIGKILL)
            else:
                process.stdin.close()
                process.stdout.close()
            assert select.select([vmm], [], [], guards.MACHINE)[0], "its VMM still runs"
            os.close(vmm)
            assert process.wait(guards.MACHINE) == (-signal.SIGKILL if how == "killed" else 130)
        finally:
            process.kill()
    assert machine not in running()


def test_one_worker_one_machine_with_plain_xdist(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    host_file = tmp_path / "on-the-host"
    host_file.write_text("secret")
    (project / "helper.py").write_text("VALUE = 42\n")
    (project / "pyproject.toml").write_text("[tool.pytest.ini_options]\npythonpath = ['.']\n")
    (project / "test_where.py").write_text(f"""
import socket
from pathlib import Path

import pytest

import helper


@pytest.mark.parametrize("number", range(4))
def test_where(number, tmp_path, record_property, worker_id):
    record_property("machine", socket.gethostname())
    record_property("worker", worker_id)
    (tmp_path / "file").write_text("written")
    assert helper.VALUE == 42
    assert Path(__file__) == Path({str(project / "test_where.py")!r})
    assert not Path({str(host_file)!r}).exists()
    assert number != 3
""")
    tx = f"2*popen//python={MICROVM[0]} python --quiet --xdist --workspace {project}"
    report = tmp_path / "report.xml"
    # No plug-in of ours: what talks to the machines is pytest-xdist alone.
    command = [
        *(*PYTEST, "-p", "no:microvm"),
        *("--dist", "each", "--tx", tx, "--junitxml", str(report)),
    ]
    done = subprocess.run(
        command, cwd=project, capture_output=True, text=True, timeout=guards.MACHINE, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 6 passed" in done.stdout
    text = report.read_text()
    machines = {part.split('"')[0] for part in text.split('name="machine" value="')[1:]}
    workers = {part.split('"')[0] for part in text.split('name="worker" value="')[1:]}
    assert workers == {"gw0", "gw1"}
    assert len(machines) == 2
    assert all(name.startswith("vm-") for name in machines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-c"], "needs a value"),
        (["--workspace", "/"], "not a project's directory"),
        (["--cpus", "x"], "cpus"),
    ],
)
def test_bad_input(arguments, said):
    done = subprocess.run(
        [*PYTHON, *arguments], capture_output=True, text=True, timeout=guards.MACHINE, check=False
    )
    assert done.returncode == 4, done.stderr
    assert said in done.stderr
