"""The walls around QEMU, read back from /proc of a running machine; cgroups of both versions at work."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import pytest_microvm
from pytest_microvm.errors import BootError, HostError, QuotaExceeded
from pytest_microvm.hypervisors import bubblewrap, cgroups
from pytest_microvm.hypervisors.cgroups import find_cgroups, sweep
from pytest_microvm.hypervisors.containment import FILES_GROUP, OOM_SCORE, find_walls
from pytest_microvm.hypervisors.probe import KVM_DEVICE
from pytest_microvm.hypervisors.qemu.command import memory_ceiling
from pytest_microvm.settings.spec import MachineSpec
from support.containment import push_modules

MIB = 1024**2
SPEC = MachineSpec(image="base", timeout=120)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
needs_groups = pytest.mark.skipif(
    find_cgroups().kind != cgroups.FOLDERS, reason=f"groups cannot be made here: {find_cgroups().reason}"
)


@pytest.fixture
def vm(host):
    with host.start(SPEC) as machine:
        machine.run(["true"], check=True)
        yield machine


def status(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, value in (line.split(":", 1) for line in lines)}


def limits(pid):
    """Soft limits by name; ``None``: unlimited."""
    found = {}
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]:
        soft = line[26:47].strip()
        found[line[:26].strip()] = None if soft == "unlimited" else int(soft)
    return found


def files(pid):
    """What a process has open: descriptor, target."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one with which we look
            found.append((int(path.name), str(path.readlink())))
    return found


def test_no_privilege_is_left(vm):
    found = status(vm.instance.vmm.pid)
    for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        assert int(found[name][0], 16) == 0
    assert found["NoNewPrivs"] == ["1"]
    assert found["Seccomp"] == ["2"]
    if os.geteuid() == 0:
        assert int(found["CapBnd"][0], 16) == 0


@needs_root
def test_a_user_that_nothing_else_has(host, vm):
    users = find_walls().users
    assert len(users) > 2**28 - 10
    with host.start(SPEC) as other:
        found = [status(machine.instance.vmm.pid) for machine in (vm, other)]
    for entry in found:
        user, group = int(entry["Uid"][0]), int(entry["Gid"][0])
        assert user in users
        assert group in users
        assert entry["Uid"] == [str(user)] * 4  # real, effective, saved, file system
        assert entry["Gid"] == [str(group)] * 4
        assert set(entry["Groups"]) == {str(FILES_GROUP), *groups_of_the_device(vm)}
    assert found[0]["Uid"] != found[1]["Uid"]
    assert found[0]["Gid"] != found[1]["Gid"]


def groups_of_the_device(vm):
    """Return the group that alone may open KVM's device, if machines need it."""
    if vm.facts.accelerator != "kvm":
        return []
    found = KVM_DEVICE.stat()
    return [] if found.st_mode & stat.S_IWOTH else [str(found.st_gid)]


@needs_root
def test_that_user_cannot_come_to_a_file_of_the_cache(host, vm):
    identity = status(vm.instance.vmm.pid)
    command = [
        "setpriv", f"--reuid={identity['Uid'][0]}", f"--regid={identity['Gid'][0]}",
        f"--groups={FILES_GROUP}", "cat",
    ]  # fmt: skip
    for file in (host.base(SPEC).image.rootfs, host.template(host.base(SPEC)).ram):
        assert file.exists()
        done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False, cwd="/")
        assert done.returncode == 1
        assert "Permission denied" in done.stderr


@pytest.mark.skipif(not find_walls().network, reason="this user may not make a network namespace")
def test_no_network(vm):
    pid = vm.instance.vmm.pid
    assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")  # noqa: PTH115 - no path
    devices = [line.split(":")[0].strip() for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()]
    assert devices[2:] == ["lo"]
    assert Path(f"/proc/{pid}/net/if_inet6").read_text() == ""  # a device that is up has an address
    assert "127.0.0.1" not in Path(f"/proc/{pid}/net/fib_trie").read_text()


def test_the_kernels_limits(host, vm):
    found = limits(vm.instance.vmm.pid)
    assert found["Max core file size"] == 0
    assert found["Max open files"] <= 256 + 3 * 4  # three for each disk
    assert vm.facts.limits.disk < found["Max file size"] < 4 * vm.facts.limits.disk
    base = host.base(SPEC)
    assert found["Max data size"] < base.resources.memory + 2 * 1024 * MIB
    assert found["Max address space"] < base.resources.memory + 32 * 1024 * MIB
    if os.geteuid() == 0:
        assert found["Max processes"] < 200
    assert int(Path(f"/proc/{vm.instance.vmm.pid}/oom_score_adj").read_text()) == OOM_SCORE


def test_cpu_time_ends_at_the_kernels_limit_too(host):
    with host.start(SPEC, cpu_seconds=30) as vm:
        assert limits(vm.instance.vmm.pid)["Max cpu time"] == 32


def test_that_limit_is_the_quota_where_no_watchdog_came_first(host):
    """On a busy computer the kernel's SIGXCPU may come first: here it is sent."""
    with host.start(SPEC, cpu_seconds=30) as vm:
        sleeping = vm.popen(["sleep", "100"])
        os.kill(vm.instance.vmm.pid, signal.SIGXCPU)
        with pytest.raises(QuotaExceeded) as caught:
            sleeping.wait()
    assert (caught.value.quota, caught.value.limit) == ("cpu_seconds", 30)
    assert caught.value.observed >= 30


def test_nothing_of_the_environment(vm, monkeypatch):
    # bubblewrap sets the working folder's variable
    assert Path(f"/proc/{vm.instance.vmm.pid}/environ").read_bytes() in (b"", b"PWD=/\0")
    assert Path(f"/proc/{vm.instance.vmm.pid}/cwd").readlink() == Path("/")


def test_descriptors_are_only_what_was_given(host, vm):
    """Ours are many here: a pytest process with files and sockets of its own, and another machine's."""
    base = host.base(SPEC)
    template = host.template(base)
    image = base.image
    readonly = {image.kernel, image.initramfs, image.rootfs, image.runtime, template.scratch}
    readonly = {str(path.resolve()) for path in readonly}
    pid, sockets, unnamed = vm.instance.vmm.pid, 0, set()
    with host.start(SPEC), socket.socket() as inheritable, open(os.devnull) as null:  # noqa: PTH123
        os.set_inheritable(inheritable.fileno(), True)
        os.set_inheritable(null.fileno(), True)
        with host.start(SPEC) as other:
            pid = other.instance.vmm.pid
            for number, target in files(pid):
                flags = int(Path(f"/proc/{pid}/fdinfo/{number}").read_text().split("flags:")[1].split()[0], 8)
                if target.startswith("socket:"):
                    sockets += 1
                elif target.endswith(" (deleted)"):
                    unnamed.add(target)
                elif vm.facts.accelerator == "kvm" and target.startswith(("/dev/kvm", "anon_inode:kvm-")):
                    continue  # the device, the VM and its vCPU
                elif target.startswith("anon_inode:"):
                    assert target in (
                        "anon_inode:[eventfd]",
                        "anon_inode:[signalfd]",
                        "anon_inode:[eventpoll]",
                    )
                elif target in readonly:
                    assert flags & os.O_ACCMODE == os.O_RDONLY
                else:
                    assert target in (str(template.ram.resolve()), "/dev/null")
    assert sockets == 5  # qmp, console and the three ports
    assert len(unnamed) == 2  # what it says on stderr, and its overlay


def test_files_are_its_owners(host, vm):
    template = host.template(host.base(SPEC))
    for path in (template.ram, template.scratch):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o002
    if os.geteuid() == 0:
        assert stat.S_IMODE(template.ram.stat().st_mode) == 0o660
        assert template.ram.stat().st_gid == FILES_GROUP


def test_a_published_file_is_not_touched_again(host, vm):
    template = host.template(host.base(SPEC))
    before = [(path, path.stat().st_ctime_ns) for path in (template.ram, template.scratch, template.state)]
    with host.start(SPEC) as other:
        other.run("echo x > /written", check=True)
    assert [(path, path.stat().st_ctime_ns) for path, _time in before] == before


def test_what_is_written_is_counted_and_gone(host):
    overlays = set(Path("/var/tmp").iterdir())
    with host.start(SPEC) as vm:
        start = vm.usage().disk_bytes
        vm.run("dd if=/dev/urandom of=/file bs=1M count=20 && sync", check=True)
        assert 20 * MIB <= vm.usage().disk_bytes - start < 40 * MIB
        (overlay,) = {target for _number, target in files(vm.instance.vmm.pid) if "/var/tmp/" in target}
        assert overlay.endswith(" (deleted)")
        assert set(Path("/var/tmp").iterdir()) <= overlays
    assert vm.usage().disk_bytes >= 20 * MIB


@needs_groups
def test_a_group_of_its_own_that_goes_with_it(host):
    with host.start(SPEC, cpus=0.5) as vm:
        pid = vm.instance.vmm.pid
        base = host.base(SPEC)
        memory, cpu = (find_cgroups().controllers[name] for name in ("memory", "cpu"))
        folders = [found.parent / name for found in (memory, cpu) for name in group_names(found.parent, pid)]
        assert len(folders) == 2
        name = "memory.limit_in_bytes" if memory.version == 1 else "memory.max"
        assert int((folders[0] / name).read_text()) == memory_ceiling(
            host._chain(base)._launch(base, host.cache), base.accelerator
        )
        name = "cpu.cfs_quota_us" if cpu.version == 1 else "cpu.max"
        assert (folders[1] / name).read_text().split()[0] == "50000"
        assert vm.instance.vmm.not_enforced == ()
        assert vm.instance.vmm.ceiling_hit() is None
    assert not [folder for folder in folders if folder.exists()]
    assert vm.instance.vmm.ceiling_hit() is None


def group_names(parent, pid):
    """The names of our groups in ``parent`` that have the process as a member."""
    return [
        path.name
        for path in parent.glob(f"pytest-microvm-{os.getpid()}-*")
        if str(pid) in (path / "cgroup.procs").read_text().split()
    ]


@needs_groups
def test_vmm_beyond_its_memory_ceiling_is_killed_and_reported(host, monkeypatch):
    """The ceiling is set below the RAM of the guest, which then fills it."""
    spec = MachineSpec(image="python", memory=300 * MIB, timeout=120)
    host.start(spec).close()  # the template is made without
    monkeypatch.setattr("pytest_microvm.hypervisors.qemu.starting.memory_ceiling", lambda *_all: 160 * MIB)
    with host.start(spec) as vm:
        vmm = vm.instance.vmm
        with pytest.raises(pytest_microvm.MachineError):
            vm.run(["python3", "-c", "bytearray(b'x' * (200 << 20))"])
        assert vmm.ceiling_hit() == 160 * MIB
    assert vmm.ceiling_hit() == 160 * MIB


def test_a_machine_that_cannot_be_started_leaves_nothing(host, monkeypatch):
    monkeypatch.setattr("pytest_microvm.hypervisors.qemu.command.SANDBOX", "nonsense")
    before = {number for number, _target in files(os.getpid())}
    with pytest.raises(BootError, match="QEMU did not start"):
        host.start(SPEC)
    assert {number for number, _target in files(os.getpid())} <= before
    for controller in find_cgroups().controllers.values():
        if controller is not None:
            assert not list(controller.parent.glob(f"pytest-microvm-{os.getpid()}-*"))


@pytest.fixture
def wrapped(monkeypatch):
    """Machines start within bubblewrap."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    monkeypatch.setenv(bubblewrap.VARIABLE, "1")
    find_walls.cache_clear()
    yield
    find_walls.cache_clear()


@pytest.mark.usefixtures("wrapped")
def test_bubblewrap_leaves_programs_and_libraries(host):
    with host.start(SPEC) as vm:
        pid = vm.instance.vmm.pid
        assert vm.run(["echo", "alive"], check=True).stdout == "alive\n"
        root = Path(f"/proc/{pid}/root")
        assert {path.name for path in root.iterdir()} <= {
            "bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "usr",
        }  # fmt: skip
        assert [path.name for path in (root / "etc").iterdir()] == ["ld.so.cache"]
        found = status(pid)
        assert found["NSpid"][-1] == "1"  # no other process is in its sight
        assert [found[name] for name in ("NoNewPrivs", "Seccomp")] == [["1"], ["2"]]
        assert int(found["CapEff"][0], 16) == 0
        if os.geteuid() == 0:
            assert int(found["Uid"][0]) in find_walls().users
        assert vm.usage().cpu_seconds > 0.01
        if find_cgroups().kind == cgroups.FOLDERS:
            assert group_names(find_cgroups().controllers["memory"].parent, pid)
        outer = int(found["PPid"][0])
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{outer}").exists()


@pytest.mark.usefixtures("wrapped")
def test_crash_reason_is_reported_under_bubblewrap(host):
    with host.start(SPEC) as vm:
        os.kill(vm.instance.vmm.pid, signal.SIGKILL)
        with pytest.raises(pytest_microvm.MachineCrashed, match="QEMU was killed by signal 9"):
            vm.run(["true"])
    with host.start(SPEC) as vm, pytest.raises(pytest_microvm.MachineCrashed, match="powered itself off"):
        vm.run("echo o > /proc/sysrq-trigger; sleep 600")


@pytest.mark.usefixtures("wrapped")
def test_machines_within_bubblewrap_end_with_their_owner(host):
    code = (
        "import sys; from pytest_microvm.host.host import Host\n"
        "vm = Host().start(image='base'); print(vm.instance.vmm.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        machine = os.pidfd_open(int(owner.stdout.readline()))
        owner.kill()
    try:
        assert select.select([machine], [], [], 60)[0], "QEMU still runs"
    finally:
        os.close(machine)


@pytest.mark.usefixtures("wrapped")
def test_bubblewrap_that_is_missing_is_an_error(monkeypatch, tmp_path):
    for name in ("setpriv", "prlimit", "unshare"):
        (tmp_path / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="bwrap is missing"):
        find_walls()


AT_WORK = textwrap.dedent("""
    import json, subprocess, sys
    from pytest_microvm.hypervisors.cgroups import FOLDERS, CgroupLimits, find_cgroups

    HOG = "block = bytearray(int(sys.argv[1])); block[::4096] = b'x' * len(block[::4096])"
    BUSY = '''
    import time
    begin, used = time.monotonic(), time.process_time()
    while time.monotonic() < begin + float(sys.argv[1]): pass
    print((time.process_time() - used) / (time.monotonic() - begin))
    '''

    def start(group, program, argument):
        code = "import sys; sys.stdin.readline()" + chr(10) + program
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(argument)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        group.add(process.pid)
        process.stdin.write(b"go" + bytes([10]))
        process.stdin.close()
        return process

    def throttled(group):
        files = [folder / "cpu.stat" for folder in group.folders if (folder / "cpu.stat").exists()]
        lines = [line.split() for file in files for line in file.read_text().splitlines()]
        return sum(int(value) for name, value in lines if name == "nr_throttled")

    found = find_cgroups()
    told = {"kind": found.kind, "reason": found.reason, "text": str(found)}
    if found.kind == FOLDERS:
        hog, modest = found.group(CgroupLimits(48 << 20)), found.group(CgroupLimits(48 << 20))
        told["hog"] = start(hog, HOG, 150 << 20).wait()
        told["modest"] = start(modest, HOG, 20 << 20).wait()
        told["ceilings"] = [hog.ceiling_hit(), modest.ceiling_hit()]
        half, full = found.group(CgroupLimits(1 << 30, 0.25)), found.group(CgroupLimits(1 << 30))
        processes = [start(group, BUSY, 4) for group in (half, full)]
        told["cpu"] = [float(process.stdout.read()) for process in processes]
        assert [process.wait() for process in processes] == [0, 0]
        told["throttled"] = [throttled(group) for group in (half, full)]
        folders = [folder for group in (hog, modest, half, full) for folder in group.folders]
        told["there"] = [folder.exists() for folder in folders]
        for group in (hog, modest, half, full):
            group.remove()
        told["left"] = [str(folder) for folder in folders if folder.exists()]
    print(json.dumps(told))
""")


def check_at_work(told, version):
    assert told["kind"] == "folders", told
    assert told["text"] == f"cgroup v{version} (cpu, memory)"
    assert told["hog"] == -signal.SIGKILL
    assert told["modest"] == 0
    assert told["ceilings"] == [48 * MIB, None]
    throttled, _free = told["cpu"]
    assert throttled <= 0.25 * 1.5  # of a CPU: the kernel gives no more, however idle the computer is
    # The control: the kernel says whom it held back. What the other one gets depends on the load.
    assert told["throttled"][0] > 0
    assert told["throttled"][1] == 0
    assert all(told["there"])
    assert told["left"] == []


@needs_groups
def test_groups_at_work_here():
    done = subprocess.run([sys.executable, "-c", AT_WORK], capture_output=True, text=True, check=True)
    check_at_work(json.loads(done.stdout), find_cgroups().controllers["memory"].version)


@pytest.fixture(scope="module")
def with_version_2(host):
    """A machine with cgroup v2 and our module: Debian's kernel has every controller."""
    with host.start(MachineSpec(image="python", memory=512 * MIB, timeout=240)) as vm:
        push_modules(vm)
        vm.path("/code/at_work.py").write_text(AT_WORK)
        vm.run("mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup", check=True)
        yield vm


def at_work(vm, **options):
    env = {"PYTHONPATH": "/code", **options.pop("env", {})}
    done = vm.run([*options.pop("prefix", []), "python3", "/code/at_work.py"], env=env, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_version_2_as_root(with_version_2):
    check_at_work(at_work(with_version_2), 2)


def test_version_2_without_delegation_is_unavailable_to_users(with_version_2):
    told = at_work(with_version_2, user=65534)
    assert told["kind"] == "none"
    assert "PYTEST_MICROVM_CGROUP" in told["reason"]


@pytest.mark.parametrize("user", [0, 65534], ids=["root", "nobody"])
def test_version_2_in_a_delegated_group_whose_members_we_are(with_version_2, user):
    """A group with members hands nothing down: they move one down first."""
    folder = f"/sys/fs/cgroup/delegated-{user}"
    own = " ".join(f"{folder}/{name}" for name in ("", "cgroup.procs", "cgroup.subtree_control"))
    controllers = "echo '+memory +cpu' > /sys/fs/cgroup/cgroup.subtree_control"
    with_version_2.run(f"{controllers}; mkdir {folder} && chown {user} {own}", check=True)
    join = f'echo $$ > {folder}/cgroup.procs && exec setpriv --reuid={user} --clear-groups "$@"'
    told = at_work(
        with_version_2, prefix=["sh", "-c", join, "sh"], env={"PYTEST_MICROVM_CGROUP": folder}
    )  # fmt: skip
    check_at_work(told, 2)
    left = with_version_2.run(f"find {folder} -mindepth 1 -type d", check=True).stdout.split()
    assert left == [f"{folder}/pytest-microvm-members"]


@needs_groups
def test_what_a_killed_owner_left_is_removed_by_the_next():
    code = (
        "import sys; from pytest_microvm.hypervisors.cgroups import *\n"
        "print(*find_cgroups().group(CgroupLimits(1 << 30, 1.0)).folders, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        folders = [Path(word) for word in owner.stdout.readline().split()]
        for folder in folders:
            sweep(folder.parent)
        assert [folder.exists() for folder in folders] == [True] * len(folders)
        owner.kill()
    for folder in folders:
        sweep(folder.parent)
    assert folders
    assert not [folder for folder in folders if folder.exists()]
