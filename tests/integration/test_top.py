"""``pytest-microvm top`` beside real machines."""

import json
import os
import pty
import subprocess
import sys

import pytest

from pytest_microvm.cli import main
from pytest_microvm.cli.top import look
from support import guards


@pytest.fixture
def busy(host):
    with host.start(image="base", cpus=1, timeout=120) as machine, machine.popen("while :; do :; done"):
        yield machine


def test_json(busy, capsys):
    assert main(["top", "--json"]) == 0
    found = {line["id"]: line for line in json.loads(capsys.readouterr().out)}
    line = found[busy.id]
    assert (line["image"], line["cpus"], line["memory"]) == ("base", 1, 256 * 1024**2)
    assert line["owner"] == os.getpid()
    assert line["cpu_seconds"] > 0
    assert line["peak_memory_bytes"] >= line["memory_bytes"] > 1024**2
    assert line["cpu_percent"] is None


def test_second_look_measures_cpu_percent(host, busy):
    before = {}
    look(host.budget, before)
    busy.run(["sleep", "1"])
    (line,) = [line for line in look(host.budget, before) if line.id == busy.id]
    assert 10 < line.cpu_percent < 400


def test_once(busy, capsys):
    assert main(["top", "--once"]) == 0
    shown = capsys.readouterr().out
    assert busy.id in shown
    assert "vCPUs" in shown.splitlines()[0]


def test_a_machine_that_ended_is_not_shown(host, capsys):
    machine = host.start(image="base", timeout=120)
    machine.close()
    assert main(["top", "--json"]) == 0
    assert machine.id not in capsys.readouterr().out


def test_on_a_terminal_until_ctrl_c(busy):
    ours, theirs = pty.openpty()
    program = "from pytest_microvm.cli import main; import sys; sys.exit(main(['top', '--interval', '0.1']))"
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=environment) as process:
        os.close(theirs)
        shown = b""
        while busy.id.encode() not in shown:
            shown += os.read(ours, 65536)
        process.send_signal(2)
        assert process.wait(guards.MACHINE) == 130
    os.close(ours)
