"""Real machines: what is in them, what is not, and what they leave behind."""

import gc
import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pytest_microvm.errors import QuotaExceeded
from pytest_microvm.hypervisors import probe
from pytest_microvm.settings.spec import MachineSpec


@pytest.fixture(scope="module")
def vm(host):
    with host.start(image="base", timeout=120) as machine:
        yield machine


def test_it_boots_and_answers(host, vm):
    assert vm.run(["hostname"]).stdout.strip() == vm.id
    assert vm.facts.image == "base"
    assert vm.facts.accelerator in ("kvm", "tcg")
    assert vm.facts.accelerator_reason
    assert 0 < vm.facts.ready_seconds < 60
    assert vm.run(["id", "-u"]).stdout == "0\n"


def test_a_root_file_system_without_python(vm, tmp_path):
    """The agent brings its own."""
    assert vm.run("command -v python3").stdout == ""
    with pytest.raises(FileNotFoundError):
        vm.run(["python3", "--version"])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("moved")
    vm.push(tmp_path / "there", "/srv/there")
    assert vm.run(["cat", "/srv/there/file"]).stdout == "moved"
    vm.pull("/srv/there", tmp_path / "back")
    assert (tmp_path / "back" / "file").read_text() == "moved"


def test_folders_of_the_image_can_be_renamed(vm):
    done = vm.run(
        "mv /etc/apt /etc/kept && echo x >/etc/kept/new && mv /etc/kept /etc/apt && ls /etc/apt", check=True
    )
    assert {"new", "sources.list.d"} <= set(done.stdout.split())


def test_a_root_file_system_with_python(host):
    with host.start(image="python", timeout=120) as machine:
        done = machine.run(
            ["python3", "-c", "import pytest, sys; print(sys.version_info[:2], pytest.__name__)"]
        )
        assert done.stdout.strip().endswith("pytest")


def test_no_network_card(vm):
    """Nothing but the loopback, and a device that leads to no other end than the guest's own process."""
    assert vm.run(["ls", "/sys/class/net"]).stdout.split() == ["lo", "nowhere"]
    assert vm.run(["cat", "/sys/class/net/nowhere/tun_flags"]).stdout == "0x1001\n"  # a TUN device
    assert not [
        line for line in vm.run("cat /proc/bus/pci/devices || true").stdout.splitlines() if "net" in line
    ]


def test_its_disk_and_memory_are_what_was_asked_for(host):
    with host.start(image="base", memory="192M", disk="64M", timeout=120) as machine:
        total = int(machine.run("grep MemTotal /proc/meminfo | tr -dc 0-9").stdout) * 1024
        assert 120 * 1024**2 < total <= 192 * 1024**2
        machine.run("head -c 40M /dev/zero > /big && sync", check=True)
        assert 40 * 1024**2 < machine.usage().disk_bytes < 64 * 1024**2
        with pytest.raises(QuotaExceeded, match="disk: limit 64 MiB"):
            machine.run("head -c 100M /dev/zero > /more")


@pytest.mark.thorough
def test_inodes_run_out_before_the_bytes_do(host):
    """What the guest's file system refuses is the command's failure, not the machine's."""
    with host.start(image="base", disk="256M", timeout=300) as machine:
        done = machine.run("mkdir /srv/many && cd /srv/many && seq 1000000 | xargs touch 2>&1 | head -n 1")
        assert "No space left on device" in done.stdout
        assert machine.run(["echo", "alive"]).stdout == "alive\n"


def test_a_fraction_of_a_cpu_is_throttled(host):
    """The same work at a quarter of a CPU gets about a quarter of the time."""
    shares = []
    for cpus in ("1", "0.25"):
        with host.start(image="base", cpus=cpus, timeout=120) as machine:
            assert machine.run(["nproc"]).stdout == "1\n"
            before, begin = machine.usage().cpu_seconds, time.monotonic()
            with pytest.raises(subprocess.TimeoutExpired):
                machine.run("while :; do :; done", timeout=4)
            shares.append((machine.usage().cpu_seconds - before) / (time.monotonic() - begin))
            not_enforced = machine.instance.vmm.not_enforced
    if not not_enforced:
        assert shares[1] < 0.35
        assert shares[1] < shares[0]
    else:
        assert "0.25" in not_enforced[0]


def test_the_vmm_is_confined(vm):
    status = Path(f"/proc/{vm.instance.vmm.pid}/status").read_text()
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert facts["Seccomp"] == "2"
    assert facts["NoNewPrivs"] == "1"


def test_usage_is_seen_from_outside(vm):
    before = vm.usage()
    vm.run("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
    after = vm.usage()
    assert after.cpu_seconds > before.cpu_seconds
    assert after.peak_memory_bytes > 10 * 1024**2


def test_everything_may_be_deleted(host):
    with host.start(image="base", timeout=300) as machine:
        assert machine.run("rm -rf --no-preserve-root / 2>/dev/null").returncode == 1  # /proc and /sys stay
        assert not machine.path("/bin/sh").exists()
        with pytest.raises(FileNotFoundError):
            machine.run(["ls"])
        machine.path("/hello").write_text("still here")
        assert machine.path("/hello").read_text() == "still here"
        assert machine.instance.vmm.alive


def test_what_one_writes_no_other_sees(host):
    with host.start(image="base", timeout=120) as one, host.start(image="base", timeout=120) as other:
        one.path("/tmp/mine").write_text("x")
        one.path("/etc/motd").write_text("x")
        assert not other.path("/tmp/mine").exists()
    with host.start(image="base", timeout=120) as later:
        assert not later.path("/tmp/mine").exists()


@pytest.mark.thorough
def test_ten_copies_are_ten_machines(host):
    """Entropy, names and time are made anew before anything else happens in a copy."""
    script = (
        "import json, os, random, socket, time, uuid; "
        "print(json.dumps([os.urandom(16).hex(), random.random(), str(uuid.uuid4()), socket.gethostname(), "
        "open('/etc/machine-id').read(), open('/proc/sys/kernel/random/uuid').read()])); print(time.time())"
    )
    seen = []
    for _ in range(10):
        with host.start(image="python", timeout=120) as machine:
            begin = time.time()
            facts, clock = machine.run(["python3", "-c", script], check=True).stdout.splitlines()
            end = time.time()
            assert begin - 1 <= float(clock) <= end + 1
            seen.append(json.loads(facts))
    for values in zip(*seen, strict=True):
        assert len(set(values)) == 10


def test_machines_leave_nothing(host):
    """Processes, descriptors, threads, files: as many as before."""
    spec = MachineSpec(image="base", timeout=120)
    host.start(spec).close()  # what is made once is there now
    gc.collect()

    def left():
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        files = sorted(path.name for path in host.templates.folder.iterdir() if str(os.getpid()) in path.name)
        mine = [record for record in host.budget.records() if record.owner == os.getpid()]
        return descriptors, children, len(mine), files, threading.active_count()

    before = left()
    for number in range(30):
        with host.start(spec) as machine:
            if number % 5 == 0:
                machine.run(["cat"], input=b"x" * 1_000_000, text=False)
    gc.collect()
    assert left() == before


def test_a_pool_has_one_ready_and_ends_with_its_host(host):
    from pytest_microvm.host.host import Host  # noqa: PLC0415

    other = Host(cache=host.cache)
    try:
        machines = [other.start(image="base", timeout=120, pool=1) for _ in range(3)]
        assert len({machine.id for machine in machines}) == 3
        for machine in machines:
            assert machine.run(["hostname"]).stdout.strip() == machine.id
            machine.close()
    finally:
        other.close()
    mine = [record for record in host.budget.records() if record.owner == os.getpid()]
    assert not {machine.id for machine in machines} & {record.id for record in mine}


@pytest.mark.skipif(not probe.KVM_DEVICE.exists(), reason="there is no KVM to find out about")
def test_the_accelerators_verdict_is_remembered(host, vm):
    remembered = json.loads((host.cache / "accelerator.json").read_text())
    assert [verdict["name"] for verdict in remembered.values()] == [vm.facts.accelerator]
