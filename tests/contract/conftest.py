"""Two machines behind one contract: a real VM, and the same agent as a process of this computer."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_microvm.machine.instance import Instance, MachineFacts, Usage
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.settings.spec import Limits
from support.local import agent

AGENT = Path(agent.__file__)


class LocalVmm:
    """A process with the agent in it (a :class:`pytest_microvm.machine.instance.Vmm`)."""

    def __init__(self, log):
        ours, theirs = socket.socketpair()
        console, other = socket.socketpair()
        network, self._unused = socket.socketpair()
        self.sockets = {"agent": ours, "console": console, "network": network}
        with theirs, other, log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(AGENT), str(theirs.fileno())], pass_fds=[theirs.fileno()], stderr=stderr
            )

    @property
    def pid(self):
        return self._process.pid

    @property
    def alive(self):
        return self._process.poll() is None

    def kill(self):
        self._unused.close()
        self._process.kill()
        self._process.wait()

    def usage(self):
        return Usage()

    def ceiling_hit(self):
        return None

    def cpu_limit_hit(self):
        return False

    not_enforced = ()

    def end_reason(self):
        return f"the agent's process ended with status {self._process.wait()}"


def local_machine(folder):
    limits = Limits(1, 0, 2**40, timeout=120)
    machine = MicroVM(
        Instance(LocalVmm(folder / "agent.log")), MachineFacts("local", "none", "", "none", "", 0.0, limits)
    )
    machine.instance.watch(limits)
    return machine


@pytest.fixture(scope="module", params=["vm", "local"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def new_machine(kind, request, tmp_path_factory):
    """Start another machine; ended with the module."""
    made = []

    def make():
        if kind == "vm":
            made.append(request.getfixturevalue("host").start(image="base", timeout=120))
        else:
            made.append(local_machine(tmp_path_factory.mktemp("agent")))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


@pytest.fixture(scope="module")
def vm(new_machine):
    """One machine for all tests of the module that leave nothing behind but files in ``place``."""
    return new_machine()


@pytest.fixture
def place(vm, kind, request, tmp_path):
    """A new folder in the machine."""
    folder = (
        "/tmp/" + str(os.getpid()) + request.node.name.partition("[")[0]
        if kind == "vm"
        else tmp_path / "place"
    )
    path = vm.path(str(folder))
    path.mkdir(parents=True)
    yield path
    path.rmtree()
