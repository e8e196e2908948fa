"""Machines that end by themselves, and owners that end before their machines."""

import os
import select
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_microvm.errors import BootError, MachineCrashed, ProtocolViolation
from pytest_microvm.hypervisors.qemu.hypervisor import Qemu
from pytest_microvm.machine import instance
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.templates import chain

SPEC = MachineSpec(image="base", timeout=120)


@pytest.fixture
def vm(host):
    with host.start(SPEC) as machine:
        yield machine


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo o > /proc/sysrq-trigger; sleep 600", "the guest powered itself off"),
        ("echo b > /proc/sysrq-trigger; sleep 600", "the guest rebooted itself"),
        ("echo c > /proc/sysrq-trigger; sleep 600", "the guest's kernel panicked"),
    ],
    ids=["power-off", "reboot", "panic"],
)
def test_the_guest_ends(vm, command, reason):
    vm.run("echo 'a word on the console' > /dev/console")
    with pytest.raises(MachineCrashed, match=f"machine {vm.id} ended: {reason}") as caught:
        vm.run(command)
    word = (
        "Kernel panic - not syncing: sysrq" if reason.endswith("kernel panicked") else "a word on the console"
    )
    assert word in caught.value.details
    assert not vm.instance.vmm.alive
    with pytest.raises(MachineCrashed, match=f"machine {vm.id} ended"):
        vm.run(["true"])


def test_the_agent_is_killed(vm):
    """PID 1 ignores signals it has no handler for, SIGKILL too."""
    assert vm.run(["kill", "-KILL", "1"]).returncode == 0
    assert vm.run(["kill", "-TERM", "1"]).returncode == 0
    assert vm.run(["echo", "alive"]).stdout == "alive\n"


def test_the_vmm_is_killed(vm):
    with vm.popen(["sleep", "600"]) as process:
        os.kill(vm.instance.vmm.pid, signal.SIGKILL)
        with pytest.raises(MachineCrashed, match="QEMU was killed by signal 9"):
            process.wait()


def test_the_guest_breaks_the_protocol(vm):
    """Root in a guest can write to the port itself: the machine is ended, the host is not harmed."""
    port = vm.run("grep -l '^agent$' /sys/class/virtio-ports/*/name").stdout.split("/")[4]
    written = vm.run(
        f"printf 'garbage from a hostile guest' > /dev/{port}"
    )  # one writer at a time, says virtio
    if written.returncode != 0:
        assert "busy" in written.stderr
        assert vm.run(["echo", "unharmed"]).stdout == "unharmed\n"
    else:  # pragma: no cover - kernels that let two in
        with pytest.raises((ProtocolViolation, MachineCrashed)):
            vm.run(["true"])


class Broken(Qemu):
    """QEMU whose guests never start the agent: their first program ends at once."""

    def start(self, launch, accelerator):
        return super().start(replace(launch, words=("rdinit=/bin/busybox", "loglevel=7")), accelerator)


def test_a_boot_that_fails_is_tried_again_and_shows_the_console(host, monkeypatch):
    monkeypatch.setattr(instance, "BOOT_TIMEOUT", 20.0)
    base = host.base(SPEC)
    said = []
    hypervisor = Broken(base.image.architecture, host.cache)
    broken = chain.Chain(hypervisor, host.templates, b"", said.append)
    with pytest.raises(BootError, match="ended while it booted: the guest's kernel panicked") as caught:
        broken.ensure(base)
    assert said == ["booting base", "booting base again", "booting base again"]
    assert "Kernel panic" in caught.value.details
    assert host.templates.open(broken.key(base)) is None


class Silent(Qemu):
    """QEMU whose guests hang at boot without a word: they are stopped at once."""

    def start(self, launch, accelerator):
        process = super().start(launch, accelerator)
        process.qmp.execute("stop")
        return process


def test_a_boot_that_hangs_is_given_up(host, monkeypatch):
    monkeypatch.setattr(instance, "BOOT_TIMEOUT", 1.0)
    base = host.base(SPEC)
    hanging = chain.Chain(
        Silent(base.image.architecture, host.cache), host.templates, b"hanging", lambda _line: None
    )
    with pytest.raises(BootError, match="no hello from the machine within 1 s"):
        hanging.ensure(base)
    assert not [path for path in host.templates.folder.glob(".building-*") if str(os.getpid()) in path.name]


OWNER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from pytest_microvm.host.host import Host
    machine = Host(cache=Path(sys.argv[1])).start(image="base")
    print(machine.id, machine.instance.vmm.pid, flush=True)
    sys.stdin.read()
    {end}
""")


def owner_of_a_machine(host, end=""):
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(end=end), str(host.cache)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    name, pid = process.stdout.readline().split()
    return process, name, int(pid)


def wait_gone(pid):
    """Wait for the end of a process that is not a child of ours."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 60)[0], f"process {pid} still runs"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("end", ["kill", "return", "os._exit"])
def test_a_machine_ends_with_its_owner(host, end):
    process, name, pid = owner_of_a_machine(host, "import os; os._exit(3)" if end == "os._exit" else "")
    with process:
        assert Path(f"/proc/{pid}").exists()
        assert name in [record.id for record in host.budget.records()]
        if end == "kill":
            process.kill()
        else:
            process.stdin.close()
        process.wait(60)
        wait_gone(pid)
    assert name not in [record.id for record in host.budget.records()]


def test_a_fork_of_the_owner_does_not_end_its_machines(host, vm):
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        host.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert vm.run(["echo", "alive"]).stdout == "alive\n"
    host.start(SPEC).close()
