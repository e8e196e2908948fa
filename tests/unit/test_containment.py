"""The walls around QEMU as far as they are computed; the integration tests read them back from /proc."""

import os
import resource
import struct
import subprocess

import pytest

from pytest_microvm.errors import HostError
from pytest_microvm.hypervisors import containment
from pytest_microvm.hypervisors.containment import _IF_PARENT as IF_PARENT
from pytest_microvm.hypervisors.containment import Identity, Walls, grant, parse_id_map
from pytest_microvm.hypervisors.qemu.overlay import write_overlay
from pytest_microvm.hypervisors.rlimits import Rlimits

CLUSTER = 64 * 1024
GIB = 1024**3
ROOT = Walls("/bin/setpriv", "/bin/prlimit", ("/bin/unshare", "--net", "--"), range(70, 99), 69, True)
LIMITS = Rlimits(files=256, file_bytes=GIB, address_bytes=4 * GIB, data_bytes=2 * GIB)


def test_the_ids_of_a_user_namespace():
    assert parse_id_map("         0          0 4294967295\n") == [range(4294967295)]
    assert parse_id_map("0 1000 1\n1 100000 65536\n") == [range(1), range(1, 65537)]
    assert parse_id_map("") == []


@pytest.mark.parametrize(
    ("table", "users"),
    [
        ("0 0 4294967295\n", range(1879048193, 2147483647)),
        ("0 1000 1\n1 100000 65536\n", range(65534, 65535)),
        ("0 1000 1\n", None),
    ],
)
def test_users_are_those_that_the_namespace_has(monkeypatch, tmp_path, table, users):
    for name in ("uid_map", "gid_map"):
        (tmp_path / name).write_text(table)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(containment, "Path", lambda _folder, name: tmp_path / name)
    found, reason = containment._users()
    assert found == users
    assert bool(reason) == (users is None)


def test_the_chain_ends_with_the_death_signal():
    command = ROOT.command(Identity(71, 72, (69, 5)), LIMITS)
    assert command[:4] == ["/bin/unshare", "--net", "--", "/bin/prlimit"]
    inner = command[command.index("/bin/setpriv") :]
    assert inner == [
        "/bin/setpriv", "--reuid=71", "--regid=72", "--groups=69,5",
        "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all",
        "--no-new-privs", "--pdeathsig=KILL", "--", "/bin/sh", "-c", IF_PARENT, str(os.getpid()),
    ]  # fmt: skip


def test_an_ordinary_user_stays_himself():
    command = Walls("/bin/setpriv", "/bin/prlimit").command(None, LIMITS)
    assert command[-8:-4] == ["/bin/setpriv", "--no-new-privs", "--pdeathsig=KILL", "--"]

    assert Walls("/bin/setpriv", "/bin/prlimit").identity() is None


def test_program_whose_parent_already_died_does_not_start():
    walls = Walls("setpriv", "prlimit")
    command = [*walls.command(None, LIMITS), "/bin/echo", "started"]
    for between, said in (([], b"started\n"), (["/bin/sh", "-c", '"$@"; true', "sh"], b"")):
        assert subprocess.run([*between, *command], stdout=subprocess.PIPE, check=False).stdout == said


def test_limits_are_never_above_what_we_may_have_ourselves(monkeypatch):
    hard = {resource.RLIMIT_NOFILE: 100}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (0, hard.get(number, resource.RLIM_INFINITY)))
    command = ROOT.command(None, Rlimits(256, GIB, 2, 3, cpu_seconds=7, threads=9))
    assert command[4:11] == [
        "--core=0:0", "--nofile=100:100", f"--fsize={GIB}:{GIB}", "--as=2:2", "--data=3:3",
        "--cpu=7:8", "--nproc=9:9",
    ]  # fmt: skip


def test_a_device_needs_a_group(tmp_path):
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o666)
    assert ROOT.identity([device]).groups == (69,)
    device.chmod(0o600)
    assert ROOT.identity([device]) is None
    told = {wall.name: wall for wall in ROOT.told([device])}["user"]
    assert not told.stands
    assert f"chgrp kvm {device}" in told.fix
    if os.geteuid() == 0:
        os.chown(device, 0, 4711)
        device.chmod(0o660)
        assert ROOT.identity([device]).groups == (69, 4711)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_rights_are_given_once(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(b"")
    path.chmod(0o644)
    identity = Identity(71, 71, (69,))
    with path.open("rb") as file:
        grant(file.fileno(), identity, write=False)  # all may read it
        assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (os.getgid(), 0o644)
        grant(file.fileno(), identity, write=True)
        assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (69, 0o660)
        before = path.stat().st_ctime_ns
        for write in (True, False):
            grant(file.fileno(), identity, write=write)
        assert path.stat().st_ctime_ns == before
        path.chmod(0o600)
        grant(file.fileno(), identity, write=False)
        assert path.stat().st_mode & 0o777 == 0o640


def test_rights_that_cannot_be_given(tmp_path, monkeypatch):
    def refuse(*_all):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    path = tmp_path / "ram"
    path.write_bytes(b"")
    path.chmod(0o600)
    with path.open("rb") as file:
        grant(file.fileno(), None, write=True)
        with pytest.raises(HostError, match=f"{path}: Operation not permitted"):
            grant(file.fileno(), Identity(71, 71, (69,)), write=True)


@pytest.mark.parametrize(
    ("size", "entries", "tables"),
    [(512, 1, 1), (GIB // 2, 1, 1), (GIB // 2 + 512, 2, 1), (4096 * GIB, 8192, 1), (4097 * GIB, 8194, 2)],
)
def test_an_overlay_has_a_table_for_all_of_its_disk(tmp_path, size, entries, tables):
    path = tmp_path / "overlay"
    with path.open("wb") as file:
        write_overlay(file, size)
    content = path.read_bytes()
    assert len(content) == (3 + tables) * CLUSTER
    assert content[:8] == b"QFI\xfb\0\0\0\3"
    assert struct.unpack(">Q", content[24:32]) == (size,)
    assert struct.unpack(">IQ", content[36:48]) == (entries, 3 * CLUSTER)
    used = struct.unpack(">8H", content[2 * CLUSTER : 2 * CLUSTER + 16])
    assert used == (1,) * (3 + tables) + (0,) * (5 - tables)
    assert not any(content[3 * CLUSTER :])
