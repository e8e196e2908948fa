"""Faults of one machine, injected while it boots, wakes up, works, is frozen or moves files."""

import os
import signal
import threading
from pathlib import Path

import pytest

from pytest_microvm.errors import (
    BootError,
    MachineCrashed,
    MachineError,
    QuotaExceeded,
    TransferError,
)
from pytest_microvm.host.host import guest_code
from pytest_microvm.hypervisors.qemu.hypervisor import Qemu
from pytest_microvm.hypervisors.qemu.process import QemuProcess
from pytest_microvm.hypervisors.qemu.qmp import Qmp
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.templates import chain
from pytest_microvm.templates.chain import TemplateStep

SPEC = MachineSpec(image="base", timeout=120)
pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def vm(host):
    with host.start(SPEC) as machine:
        yield machine


def works(host):
    """The next machine is unaffected."""
    with host.start(SPEC) as machine:
        assert machine.run(["echo", "fine"]).stdout == "fine\n"
    return True


class KilledAtBoot(Qemu):
    """QEMU that is killed during its first boot."""

    boots = 0

    def start(self, launch, accelerator):
        process = super().start(launch, accelerator)
        KilledAtBoot.boots += 1
        if KilledAtBoot.boots == 1:
            os.kill(process.pid, signal.SIGKILL)
        return process


def test_killed_while_booting(host):
    """The boot is tried again, which is said, and comes up."""
    base, said = host.base(SPEC), []
    code = guest_code() + bytes(512)  # padding: the same machine under a key of its own
    hypervisor = KilledAtBoot(base.image.architecture, host.cache)
    chained = chain.Chain(hypervisor, host.templates, code, said.append)
    KilledAtBoot.boots = 0
    with chained.ensure(base) as template:
        assert template.meta["kind"] == "boot"
    host.templates.remove(template.key)
    assert said[:2] == ["booting base", "booting base again"]
    assert set(said[2:]) <= {"booting base again"}  # the kernel may hang, too
    assert works(host)


def test_killed_while_restoring(host, monkeypatch):
    """Another machine takes its place; it says so, and the third failure is an error."""
    original, kills = QemuProcess.load, []
    said = []
    monkeypatch.setattr(host._starter, "_say", said.append)

    def killed(self, *arguments):
        if kills:
            kills.pop()
            os.kill(self.pid, signal.SIGKILL)
        return original(self, *arguments)

    monkeypatch.setattr(QemuProcess, "load", killed)
    kills += [1, 1]
    with host.start(SPEC) as machine:
        assert machine.run(["true"]).returncode == 0
    assert [line.partition(";")[2] for line in said] == [
        " starting another machine (1 of 2)",
        " starting another machine (2 of 2)",
    ]
    assert all(line.startswith("infra: QEMU did not start") for line in said)
    kills += [1, 1, 1]
    with pytest.raises(BootError, match="QEMU did not start"):
        host.start(SPEC)
    assert works(host)


def test_killed_during_a_checkpoint(host, monkeypatch):
    """Nothing half is published; the next one that needs the template makes it."""
    original = Qmp.execute
    worked = []

    def killed(self, command, *arguments, **options):
        if command == "migrate" and not worked:
            worked.append(command)
            self.victim()
        return original(self, command, *arguments, **options)

    def work(instance):
        instance.vmm.qmp.victim = lambda: os.kill(instance.vmm.pid, signal.SIGKILL)
        return {}

    monkeypatch.setattr(Qmp, "execute", killed)
    monkeypatch.setattr(Qmp, "victim", lambda _self: None, raising=False)
    base = host.base(SPEC)
    step = TemplateStep("workspace", ("killed during a checkpoint", str(os.getpid())), work, "killed")
    chained = host._chain(base)
    with pytest.raises(MachineError):
        chained.ensure(base, [step])
    assert host.templates.open(chained.key(base, [step])) is None
    with chained.ensure(base, [step]) as template:
        assert template.meta["kind"] == "workspace"
    host.templates.remove(template.key)
    assert works(host)


def test_killed_while_it_waits_in_the_pool(host):
    """Nobody is handed a dead machine."""
    first = host.start(SPEC, pool=2)
    host.wait_ready()
    (pool,) = host._starter._pools.values()
    victims = [machine.instance.vmm for machine in pool._ready]
    assert victims
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)
        victim._process.wait(60)
    with host.start(SPEC, pool=2) as machine:
        assert machine.instance.vmm not in victims
        assert machine.run(["true"]).returncode == 0
    first.close()
    pool.close()
    host._starter._pools.clear()


def test_the_agent_is_broken(vm, host):
    """Root in the guest can write into PID 1's memory: its end is the machine's."""
    command = (
        "grep r-xp /proc/1/maps | while read -r range rest; do "
        "begin=$((0x${range%-*} / 4096)) end=$((0x${range#*-} / 4096)); "
        "dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$begin count=$((end - begin)) conv=notrunc 2>/dev/null; "
        "done; echo; sleep 100"  # what is printed wakes it up
    )
    with pytest.raises(MachineCrashed, match="the guest's kernel panicked") as caught:
        vm.run(command)
    assert "Attempted to kill init" in caught.value.details
    assert works(host)


def test_an_agent_that_never_answers(host):
    """Whatever waits for it ends with the machine's timeout."""
    calls = {
        "run": lambda vm: vm.run(["true"]),
        "stat": lambda vm: vm.path("/etc").stat(),
        "push": lambda vm: vm.push(__file__, "/file"),
        "pull": lambda vm: vm.pull("/etc/hostname", "/nonexistent"),
    }
    for name, call in calls.items():
        with host.start(SPEC, timeout=1.5) as machine:
            machine.instance.vmm.qmp.execute("stop")
            with pytest.raises(QuotaExceeded, match=r"timeout: limit 1.5 s") as caught:
                call(machine)
            assert "during: " in caught.value.details, name
    assert works(host)


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_the_machine_ends_half_way_through_a_transfer(host, tmp_path, direction):
    source, target = tmp_path / "large", tmp_path / "received"
    with source.open("wb") as file:
        file.truncate(512 * 1024**2)
    with host.start(SPEC) as machine:
        if direction == "pull":
            machine.run("truncate -s 512M /large", check=True)
        link = machine.client.link()
        begin = link.bytes_sent + link.bytes_received

        def kill_when_it_moves():
            while link.bytes_sent + link.bytes_received < begin + 8 * 1024**2:
                if over.wait(0.005):
                    return
            os.kill(machine.instance.vmm.pid, signal.SIGKILL)

        over = threading.Event()
        killer = threading.Thread(target=kill_when_it_moves)
        killer.start()
        try:
            move = {"push": (source, "/large"), "pull": ("/large", target)}[direction]
            with pytest.raises((MachineCrashed, TransferError), match="ended"):
                getattr(machine, direction)(*move)
        finally:
            over.set()
            killer.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]
    assert works(host)


def test_a_killed_machine_says_what_was_asked_last(vm):
    vm.run(["echo", "one"])
    with vm.popen("sleep 600") as process:
        os.kill(vm.instance.vmm.pid, signal.SIGKILL)
        with pytest.raises(MachineCrashed, match="QEMU was killed by signal 9"):
            process.wait()
    assert list(vm.last_commands) == ["echo one", "sleep 600"]
    kinds = [event.kind for event in vm.instance.events.list()]
    assert kinds[:3] == ["started", "command", "command"]
    assert kinds[-1] == "crashed"


def test_two_at_once_end_without_each_other(host):
    with host.start(SPEC) as one, host.start(SPEC) as other:
        os.kill(one.instance.vmm.pid, signal.SIGKILL)
        with pytest.raises(MachineCrashed):
            one.run(["true"])
        assert other.run(["echo", "fine"]).stdout == "fine\n"


def test_a_machine_that_is_closed_is_gone_at_once(host):
    machine = host.start(SPEC)
    pid = machine.instance.vmm.pid
    assert Path(f"/proc/{pid}").exists()
    machine.close()
    assert not Path(f"/proc/{pid}").exists()
