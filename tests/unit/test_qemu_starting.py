"""Starting QEMU, played by a script: a start that fails leaves nothing of its machine."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_microvm.errors import BootError, HostError
from pytest_microvm.hypervisors import Accelerator, Disk, Launch
from pytest_microvm.hypervisors.containment import Walls
from pytest_microvm.hypervisors.qemu import starting
from pytest_microvm.hypervisors.qemu.files import WrittenFile, open_files
from pytest_microvm.hypervisors.qemu.process import QemuProcess
from pytest_microvm.hypervisors.qemu.spawned import spawn
from pytest_microvm.hypervisors.qemu.starting import start_qemu

TCG = Accelerator("tcg", "", "q35")
MIB = 1024**2
QEMU = """\
#!{python} -IS
import json, re, socket, sys
line = next(word for word in sys.argv if "id=qmp" in word)
sock = socket.socket(fileno=int(re.search(r"fd=(\\d+)", line)[1]))
sock.sendall(b'{{"QMP": {{"version": {{"qemu": {{"major": {major}, "minor": 2}}}}}}}}\\n')
for line in sock.makefile():
    command = json.loads(line)["execute"]
    refusal = {{"error": {{"desc": "not today"}}}}
    answers = [refusal if command == "{refused}" else {{"return": {{"fdset-id": 3}}}}]
    if command == "migrate-incoming":
        answers.append({{"event": "MIGRATION", "data": {{"status": "completed"}}}})
    sock.sendall("".join(json.dumps(answer) + "\\n" for answer in answers).encode())
"""


class Group:
    """A cgroup that remembers what it was told."""

    def __init__(self):
        self.members, self.removed, self.error = [], False, None

    def add(self, pid):
        if self.error:
            raise self.error
        self.members.append(pid)

    def ceiling_hit(self):
        return None

    def remove(self):
        self.removed = True


@pytest.fixture
def group(monkeypatch):
    made = Group()
    walls = Walls(shutil.which("setpriv"), shutil.which("prlimit"))
    cgroups = SimpleNamespace(
        group=lambda _limits: made, prefix=lambda _limits: [], environment=dict,
        not_enforced=lambda _limits: ("no throttle",),
    )  # fmt: skip
    monkeypatch.setattr(starting, "find_walls", lambda _program: walls)
    monkeypatch.setattr(starting, "find_cgroups", lambda: cgroups)
    spawn(["/bin/true"], (), subprocess.DEVNULL, {}).child.wait()  # the thread is there from now on
    return made


@pytest.fixture
def launch(tmp_path):
    for name in ("kernel", "initramfs", "scratch", "state"):
        (tmp_path / name).write_bytes(bytes(4096))
    return Launch(
        "x86_64", tmp_path / "kernel", tmp_path / "initramfs", 1, MIB, tmp_path / "ram",
        share=True, disks=(Disk(tmp_path / "scratch"),), name="vm-1",
    )  # fmt: skip


@pytest.fixture
def qemu(tmp_path):
    def write(refused="", major=7):
        program = tmp_path / "qemu"
        program.write_text(QEMU.format(python=sys.executable, refused=refused, major=major))
        program.chmod(0o700)
        return str(program)

    return write


def held():
    """Return the open descriptors and the children of this process."""
    children = "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    return len(list(Path("/proc/self/fd").iterdir())), children.split()


@pytest.mark.parametrize(("state", "major"), [(None, 7), ("state", 7), ("state", 8)])
def test_start_and_kill(launch, qemu, group, state, major):
    launch.ram.touch()
    before = held()
    process = start_qemu(qemu(major=major), replace(launch, state=state and launch.ram.with_name(state)), TCG)
    assert process.alive
    assert group.members == [process.pid]
    assert set(process.sockets) == {"console", *launch.ports}
    assert process.not_enforced == ("no throttle",)
    assert process.usage().memory_bytes > 0
    process.kill()
    process.kill()
    assert not process.alive
    assert process.usage().peak_memory_bytes > 0
    assert process.end_reason() == "QEMU was killed by signal 9"
    for sock in process.sockets.values():
        sock.close()
    assert held() == before
    assert group.removed


@pytest.mark.parametrize(
    ("major", "refused"),
    [(7, "qmp_capabilities"), (7, "getfd"), (7, "migrate-incoming"), (8, "add-fd"), (11, "migrate-incoming")],
)
def test_qemu_that_refuses_leaves_nothing(launch, qemu, group, major, refused):
    launch.ram.touch()
    before = held()
    with pytest.raises(BootError, match=f"QEMU did not start: QEMU refused {refused}: not today"):
        start_qemu(qemu(refused, major), replace(launch, state=launch.ram.with_name("state")), TCG)
    assert held() == before
    assert group.removed


def test_qemu_that_ends_at_once_leaves_nothing(launch, group):
    before = held()
    with pytest.raises(BootError, match="QEMU did not start"):
        start_qemu("/bin/false", launch, TCG)
    assert held() == before
    assert group.removed


def test_interrupted_start_leaves_nothing(launch, qemu, group, tmp_path, monkeypatch):
    def interrupted(_process, _state):
        raise KeyboardInterrupt

    (tmp_path / "ram").touch()
    monkeypatch.setattr(QemuProcess, "load", interrupted)
    before = held()
    with pytest.raises(KeyboardInterrupt):
        start_qemu(qemu(), replace(launch, state=tmp_path / "state"), TCG)
    assert held() == before
    assert group.removed


def test_cgroup_that_takes_no_process_leaves_nothing(launch, qemu, group):
    group.error = PermissionError("not permitted")
    before = held()
    with pytest.raises(BootError, match="QEMU could not be put into its cgroup: not permitted"):
        start_qemu(qemu(), launch, TCG)
    assert held() == before
    assert group.removed


def test_missing_file_leaves_nothing(launch, qemu, group):
    before = held()
    with pytest.raises(BootError, match=r"QEMU cannot be started: .*nowhere"):
        start_qemu(qemu(), replace(launch, initramfs=Path("/nowhere")), TCG)
    assert held() == before
    assert not group.members


def test_missing_program_is_named(tmp_path):
    with (tmp_path / "stderr").open("wb") as stderr, pytest.raises(HostError, match="/nowhere is missing"):
        spawn(["/nowhere"], (), stderr, {})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_command_below_another_process(tmp_path, number):
    """The shell stands for bubblewrap: it reports its child's id, waits for it and passes its status on."""
    reading, writing = os.pipe()
    script = f'sleep 60 & echo "{{\\"child-pid\\": $!}}" > /proc/self/fd/{writing}; wait $!'
    with (tmp_path / "stderr").open("wb") as stderr, os.fdopen(reading, "rb", buffering=0) as told:
        process = spawn(["/bin/sh", "-c", script], (writing,), stderr, {"PATH": os.environ["PATH"]})
        os.close(writing)
        process.find_command(told)
    assert process.pid != process.child.pid
    if number == signal.SIGBUS:
        os.kill(process.pid, number)
        assert process.wait(60) == -number
    process.kill()
    process.kill()
    assert process.reaped
    stat = Path(f"/proc/{process.pid}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_command_that_bubblewrap_did_not_start(tmp_path):
    reading, writing = os.pipe()
    with (tmp_path / "stderr").open("wb") as stderr, os.fdopen(reading, "rb", buffering=0) as told:
        process = spawn(["/bin/false"], (writing,), stderr, {})
        os.close(writing)
        process.find_command(told)
    assert process.pid == process.child.pid
    assert process.wait(60) == 1
    process.kill()


@pytest.mark.parametrize("ephemeral", [False, True])
def test_growth_of_the_written_file(launch, tmp_path, ephemeral):
    readonly = Disk(tmp_path / "kernel", readonly=True)
    launch = replace(launch, disks=(readonly, Disk(tmp_path / "scratch", ephemeral=ephemeral)))
    with ExitStack() as stack:
        fds = open_files(launch, None, readonly_ram=False, stack=stack)
        written = WrittenFile(launch, fds)
        assert written.growth() == 0
        os.pwrite(fds["overlay1" if ephemeral else "disk1"], os.urandom(MIB), MIB)
        assert written.growth() >= MIB
        written.close()
        written.close()
        assert written.growth() >= MIB
    nothing = WrittenFile(replace(launch, disks=(readonly,)), {})
    assert nothing.growth() == 0
    nothing.close()
