"""A run that is ended: Ctrl-C and SIGTERM at any moment, SIGKILL; and what the next run finds."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support import guards
from support.processes import children
from support.projects import new_project

SUITE = """
    import time, pytest

    @pytest.mark.parametrize("number", range(40))
    def test_something(number):
        time.sleep(0.2)
"""
FIXTURES = """
    import pytest

    @pytest.mark.microvm(image="base")
    @pytest.mark.parametrize("number", range(40))
    def test_something(microvm, number):
        microvm.run(["sleep", "0.2"])
"""
_SEED = 20261121  # the moments are random, but the same in every run


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Make the templates once, so that the moments fall into all phases of a run."""
    project = new_project(tmp_path_factory.mktemp("ends"))
    project.write("test_suite.py", SUITE)
    project.write("test_fixtures.py", FIXTURES)
    project.run("--microvm", "-q", "test_suite.py", "-k", "3]")
    project.run("-q", "test_fixtures.py", "-k", "[3]")
    return project


def wait_gone(pids, seconds):
    """Return the processes that are still there after ``seconds``."""
    left = []
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([descriptor], [], [], seconds)[0]:
                left.append(pid)
        finally:
            os.close(descriptor)
    return left


def thorough(value):
    return pytest.param(value, marks=pytest.mark.thorough)


def moments(count):
    return [round(random.Random(f"{_SEED} {number}").uniform(0.2, 6.0), 2) for number in range(count)]  # noqa: S311


@pytest.mark.parametrize("number", [0, 1, *map(thorough, (2, 3, 4))])
@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_at_a_random_moment(warm, way, number):
    """pytest ends as interrupted, or by the signal while Python still starts; its machines are gone."""
    moment = moments(10)[number if way == signal.SIGINT else number + 5]
    target = ["--microvm", "test_suite.py"] if number % 2 == 0 else ["test_fixtures.py"]
    with warm.start("-q", *target) as process:
        threading.Event().wait(moment)
        below = children(process.pid)
        process.send_signal(way)
        output, _none = process.communicate(timeout=guards.SUITE)
    early = {-way, -signal.SIGINT, 1}  # pytest was not there yet to be told
    assert process.returncode in {2, *early}, output
    assert wait_gone(below, 2) == []
    if process.returncode == 2:
        assert "KeyboardInterrupt" in output or "no tests ran" in output
        warm.assert_nothing_left(process.pid)


INTERRUPTED = """
    import signal

    from {module} import {name}

    microvm_host_only = True
    real = {name}.{method}

    def interrupted(self, *arguments, **options):
        {name}.{method} = real
        if {after}:
            real(self, *arguments, **options)
        signal.raise_signal(signal.SIGTERM)

    def pytest_microvm_started(config, facts, nodeid):
        {name}.{method} = interrupted
"""


@pytest.mark.parametrize(
    ("moment", "after"),
    [
        ("pytest_microvm.machine.instance.Instance.close", False),
        ("pytest_microvm.machine.instance.Instance.adopt", True),
        ("pytest_microvm.templates.budget.HostBudget.take", True),
        ("pytest_microvm.templates.budget.HostBudget.started", True),
        ("pytest_microvm.templates.budget.HostBudget.release", False),
    ],
)
@pytest.mark.parametrize(
    "target", [["--microvm", "test_suite.py"], ["test_fixtures.py"]], ids=["suite", "fixture"]
)
def test_interrupted_at_the_worst_moment(warm, target, moment, after):
    """Between two steps that belong together: the end of the run makes up for the second."""
    module, name, method = moment.rsplit(".", 2)
    text = INTERRUPTED.format(module=module, name=name, method=method, after=after)
    variables = warm.plug_in("worst_moment", text)
    output = warm.run("-p", "worst_moment", "--microvm-pool=0", "-q", *target, status=2, env=variables)
    assert "KeyboardInterrupt: SIGTERM" in output


@pytest.mark.parametrize(
    "target", [["--microvm", "test_suite.py"], ["test_fixtures.py"]], ids=["suite", "fixture"]
)
def test_killed(warm, target):
    """Nobody tidies up: the kernel ends the machines, and the next run removes the rest."""
    with warm.start("-q", *target) as process:
        while not [record for record in records(warm) if record["pid"]]:
            assert process.poll() is None
        below = children(process.pid)
        assert below
        os.kill(process.pid, signal.SIGKILL)
        process.wait(guards.SUITE)
    assert wait_gone(below, 2) == []
    warm.run("-q", "test_fixtures.py", "-k", "[3]")
    warm.assert_nothing_left(process.pid)


def records(project):
    found = []
    for path in project.runtime.glob("pytest-microvm/machines/*.json"):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return found


def test_workers_share_a_budget_for_two(warm):
    """Four workers, places for two machines: the others wait, it is said, and nobody waits for ever."""
    output = warm.run(
        "--microvm", "-n", "4", "-v", "test_suite.py", "-k", "1",
        env={"PYTEST_MICROVM_BUDGET": "cpus=2,memory=64G"},
    )  # fmt: skip
    assert "13 passed" in output
    assert "in 13 machines" in output


def test_suite_reports_that_it_waits_for_the_host_budget(warm):
    """Another run has all there is."""
    code = (
        "import sys; from pytest_microvm import MicroVM\n"
        "with MicroVM.start(image='base') as vm: print('up', flush=True); sys.stdin.read()"
    )
    variables = {
        **os.environ,
        "XDG_RUNTIME_DIR": os.fspath(warm.runtime),
        "PYTEST_MICROVM_BUDGET": "cpus=1,memory=64G",
    }
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=variables,
    ) as other:
        assert other.stdout.readline() == "up\n"
        with warm.start(
            "test_fixtures.py", "-k", "[3]", env={"PYTEST_MICROVM_BUDGET": "cpus=1,memory=64G"}
        ) as process:
            said = ""
            while "waiting: the host budget (1 vCPUs, 64G) is in use by other machines" not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            other.stdin.close()
            output, _none = process.communicate(timeout=guards.SUITE)
        assert process.returncode == 0, said + output
    assert "1 passed" in output
    assert Path(f"/proc/{other.pid}").exists() is False
