"""Control groups: what is read of the kernel's tables, what is written into its files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_microvm.hypervisors import cgroups
from pytest_microvm.hypervisors.cgroups import Cgroup, CgroupLimits, Cgroups, Controller, parse_parents, sweep

MIB = 1024**2
OWNER = """
import os, sys
from pytest_microvm.hypervisors.cgroups import _start_time
print(_start_time(os.getpid()), flush=True)
sys.stdin.read()
"""
HALF_V1 = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}
V1_MOUNTS = """\
23 1 254:0 / / rw - ext4 /dev/vda rw
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
"""
V1_OWN = "9:name=systemd:/\n4:memory:/session/7\n3:cpuset:/\n2:cpu,cpuacct:/batch\n0::/\n"
V2_MOUNT = "24 23 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def parents(mountinfo, own):
    return {name: (found.version, str(found.parent)) for name, found in parse_parents(mountinfo, own).items()}


def test_version_1_has_a_tree_for_each_controller():
    assert parents(V1_MOUNTS, V1_OWN) == {
        "memory": (1, "/sys/fs/cgroup/memory/session/7"),
        "cpu": (1, "/sys/fs/cgroup/cpu,cpuacct/batch"),
    }


def test_version_2_has_one_tree():
    assert parents(V2_MOUNT, "0::/user.slice/session-1.scope\n") == {
        "memory": (2, "/sys/fs/cgroup"),
        "cpu": (2, "/sys/fs/cgroup"),
    }


def test_a_host_with_both_has_each_controller_in_one_of_them():
    mounts = V1_MOUNTS.replace("rw,memory", "rw,pids") + V2_MOUNT.replace("/sys/fs/cgroup", "/unified")
    assert parents(mounts, V1_OWN) == {
        "memory": (2, "/unified"),
        "cpu": (1, "/sys/fs/cgroup/cpu,cpuacct/batch"),
    }


def test_a_container_sees_but_a_part_of_the_tree():
    mount = "35 31 0:32 /docker/ab /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    assert parents(mount, "4:memory:/docker/ab/inner\n") == {"memory": (1, "/sys/fs/cgroup/memory/inner")}
    assert parents(mount, "4:memory:/docker/ab\n") == {"memory": (1, "/sys/fs/cgroup/memory")}
    assert parents(mount, "4:memory:/elsewhere\n") == {"memory": (1, "/sys/fs/cgroup/memory")}


def test_a_system_without():
    assert parents("23 1 254:0 / / rw - ext4 /dev/vda rw\n", "") == {}
    assert str(Cgroups()) == "no cgroup"


@pytest.mark.parametrize(
    ("version", "throttle", "written"),
    [
        (1, None, {"memory.limit_in_bytes": "67108864"}),
        (1, 0.5, {"memory.limit_in_bytes": "67108864", **HALF_V1}),
        (2, None, {"memory.max": "67108864"}),
        (2, 1.5, {"memory.max": "67108864", "cpu.max": "150000 100000"}),
        (2, 0.001, {"memory.max": "67108864", "cpu.max": "1000 100000"}),
    ],
)  # fmt: skip
def test_what_is_written(tmp_path, version, throttle, written):
    found = Cgroups(cgroups.FOLDERS, dict.fromkeys(("memory", "cpu"), Controller(version, tmp_path)))
    group = found.group(CgroupLimits(64 * MIB, throttle))
    (folder,) = group.folders
    assert {path.name: path.read_text() for path in folder.iterdir()} == written
    group.add(4711)
    assert (folder / "cgroup.procs").read_text() == "4711"


@pytest.mark.parametrize(("version", "name"), [(1, "memory.oom_control"), (2, "memory.events")])
@pytest.mark.parametrize(
    ("content", "hit"),
    [
        ("oom_kill 0\n", None),
        ("oom 3\noom_kill 2\n", 64 * MIB),
        ("", None),
        ("garbage\n", None),
        (None, None),
    ],
)
def test_whether_the_kernel_killed_a_member(tmp_path, version, name, content, hit):
    group = Cgroups(cgroups.FOLDERS, {"memory": Controller(version, tmp_path)}).group(CgroupLimits(64 * MIB))
    if content is not None:
        (group.folders[0] / name).write_text(content)
    assert group.ceiling_hit() == hit


def test_what_is_not_enforced_is_one_line():
    memory, cpu = {"memory": Controller(2, Path("/"))}, {"cpu": Controller(2, Path("/"))}
    half = CgroupLimits(MIB, 0.5)
    assert Cgroups(cgroups.FOLDERS, {**memory, **cpu}).not_enforced(half) == ()
    assert Cgroups(cgroups.FOLDERS, memory).not_enforced(CgroupLimits(MIB)) == ()
    (line,) = Cgroups(cgroups.FOLDERS, memory).not_enforced(half)
    assert line == "this host's cgroups are not enough: cpus = 0.5 is not throttled"
    (line,) = Cgroups(reason="read-only").not_enforced(half)
    assert line == (
        "no cgroup can be used here (read-only): cpus = 0.5 is not throttled "
        "and QEMU's memory has no ceiling but its address space"
    )


def test_a_scope_of_systemd(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setenv("A_SECRET", "x")
    found = Cgroups(cgroups.SCOPE, {"memory": None, "cpu": None})
    assert found.prefix(CgroupLimits(64 * MIB, 0.5)) == [
        "systemd-run", "--user", "--scope", "--quiet", "--collect",
        "-p", "MemoryMax=67108864", "-p", "MemorySwapMax=0", "-p", "CPUQuota=50%", "--", "env", "-i",
    ]  # fmt: skip
    assert found.environment()["XDG_RUNTIME_DIR"] == "/run/user/1000"
    assert "A_SECRET" not in found.environment()
    assert found.group(CgroupLimits(64 * MIB)).folders == ()
    assert Cgroups().prefix(CgroupLimits(1)) == []
    assert Cgroups().environment() == {}


def test_only_what_ended_owners_left_is_swept(tmp_path):
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            OWNER,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        theirs = tmp_path / f"pytest-microvm-{owner.pid}-{owner.stdout.readline().strip()}-1"
        earlier = tmp_path / f"pytest-microvm-{os.getpid()}-1-1"  # our number, another process's start
        garbage = tmp_path / "pytest-microvm-x-y-z"
        other = tmp_path / "pytest-microvm-members"
        for folder in (theirs, earlier, garbage, other):
            folder.mkdir()
        sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([theirs, other])
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [other]


def test_a_group_that_the_kernel_refuses_is_not_left(tmp_path):
    with pytest.raises(OSError):
        Cgroup(CgroupLimits(MIB), {"memory": Controller(1, tmp_path / "missing" / "group")})
    assert list(tmp_path.iterdir()) == []
