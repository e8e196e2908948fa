"""Landlock's rules and the filter of system calls: attacks on the user's files, with and without them."""

import errno
import os
import platform
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pytest_microvm.hypervisors import landlock
from pytest_microvm.hypervisors.containment import Walls, find_walls
from pytest_microvm.hypervisors.landlock import find_version, open_ruleset
from pytest_microvm.hypervisors.landlock_step import find_steps, step_command
from pytest_microvm.hypervisors.rlimits import Rlimits
from pytest_microvm.hypervisors.seccomp import deny_filter

GIB = 1024**3
VERSION, WHY_NOT = find_version()
LIMITS = Rlimits(files=256, file_bytes=GIB, address_bytes=8 * GIB, data_bytes=2 * GIB)

STEPS = find_steps()

needs_landlock = pytest.mark.skipif(VERSION == 0, reason=f"no Landlock here: {WHY_NOT}")

WAYS = {
    "append": "open(path, 'a').write('evil')",
    "overwrite": "open(path, 'w').write('evil')",
    "cut off": "os.truncate(path, 0)",
    "read": "open(path).read()",
    "list": "os.listdir(home)",
    "remove": "os.unlink(path)",
    "replace": "os.rename(path, path + '~')",
    "link": "os.link(path, path + '~')",
    "symlink": "os.symlink(path, path + '~')",
    "create": "open(path + '~', 'w')",
    "make a folder": "os.mkdir(path + '~')",
    "make a pipe": "os.mkfifo(path + '~')",
    "change the mode": "os.chmod(path, 0o777)",
    "change the owner": "os.chown(path, os.getuid(), os.getgid())",
    "change the times": "os.utime(path, (1, 1))",
    "mark": "os.setxattr(path, 'user.mark', b'evil')",
    "execute": "os.execv(home + '/program', ['program'])",
    "connect": "socket.socket(socket.AF_UNIX).connect(home + '/socket')",
    "send": "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'evil', home + '/datagrams')",
    "look into a process": "open(f'/proc/{parent}/environ').read()",
    "change a process's memory": "open(f'/proc/{parent}/mem', 'wb')",
}


@pytest.fixture
def home(tmp_path):
    """A folder like a user's own, with a file, a program and a server's sockets in it."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("export EDITOR=vi\n")
    (home / "program").write_text("#!/bin/sh\n")
    (home / "program").chmod(0o755)
    with (
        socket.socket(socket.AF_UNIX) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
    ):
        server.bind(str(home / "socket"))
        server.listen()
        datagrams.bind(str(home / "datagrams"))
        yield home


@pytest.fixture
def run():
    """Run Python in the chain that starts VMMs, behind rules for its interpreter or without any."""
    walls = find_walls()

    def run(code, *arguments, version=VERSION, descriptors=(), step=STEPS[0]):
        held = Walls(walls.setpriv, walls.prlimit, landlock=version, step=step)
        ruleset = held.ruleset(sys.executable, descriptors=descriptors)
        inherited = [number for number in (ruleset, *descriptors) if number is not None]
        chain = held.command(None, LIMITS, ruleset=ruleset)
        program = [os.path.realpath(sys.executable), "-I", "-S", "-c", code]
        try:
            return subprocess.run(
                [*chain, *program, *map(str, arguments)],
                capture_output=True, text=True, check=False, env={}, cwd="/", pass_fds=inherited,
            )  # fmt: skip
        finally:
            if ruleset is not None:
                os.close(ruleset)

    return run


def tree(home):
    """What can be changed of a folder: names, contents, modes, times."""
    found = {}
    for path in sorted(home.iterdir()):
        state = path.lstat()
        content = path.read_text() if stat.S_ISREG(state.st_mode) else ""
        found[path.name] = (content, state.st_mode, state.st_mtime_ns, state.st_ctime_ns)
    return found


def attempt(way):
    return (
        "import os, socket, sys\n"
        "home, parent = sys.argv[1:]\n"
        "path = home + '/.bashrc'\n"
        f"try: {way}\n"
        "except PermissionError as error: sys.exit(error.errno)\n"
    )


@needs_landlock
@pytest.mark.parametrize("way", WAYS)
def test_attack_on_user_files_fails(run, home, way):
    before = tree(home)
    for step in STEPS:
        done = run(attempt(WAYS[way]), home, os.getpid(), step=step)
        assert done.returncode in (errno.EACCES, errno.EPERM), (step[0], done.stderr)
        assert tree(home) == before
    done = run(attempt(WAYS[way]), home, os.getpid(), version=0)
    if way == "mark" and "Operation not supported" in done.stderr:
        pytest.skip("this file system has no extended attributes")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(VERSION < landlock.SCOPES_FROM, reason=f"Landlock's version is {VERSION} here: no scopes")
def test_signals_to_other_processes_are_denied(run):
    code = "import os, sys\nos.kill(int(sys.argv[1]), 0)"
    assert "PermissionError" in run(code, os.getpid()).stderr
    assert run(code, os.getpid(), version=0).returncode == 0


@needs_landlock
def test_reopened_file_keeps_its_access_mode(run, home):
    code = (
        "import os, sys\n"
        "for number in sys.argv[1:]:\n"
        "    os.close(os.open(f'/proc/self/fd/{number}', os.O_RDONLY))\n"
        "    try: os.close(os.open(f'/proc/self/fd/{number}', os.O_RDWR))\n"
        "    except PermissionError: print('read')\n"
        "    else: print('write')\n"
    )
    (home / "ram").write_text("")
    descriptors = [os.open(home / ".bashrc", os.O_RDONLY), os.open(home / "ram", os.O_RDWR)]
    try:
        assert run(code, *descriptors, descriptors=descriptors).stdout.split() == ["read", "write"]
        done = run(code, *descriptors, descriptors=descriptors, version=0)
        assert done.stdout.split() == ["write", "write"]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@needs_landlock
def test_older_versions_deny_the_same_writes(run, home):
    for version in range(1, VERSION + 1):
        for way in ("append", "cut off", "connect"):
            assert run(attempt(WAYS[way]), home, 0, version=version).returncode == errno.EACCES, (
                version,
                way,
            )


@needs_landlock
def test_only_listed_devices_open():
    devices = [path for path in map(Path, ("/dev/kvm", "/dev/zero")) if path.exists()]
    ruleset = open_ruleset(VERSION, ["/bin/sh"], devices[:1])
    try:
        for device in devices:
            command = [*step_command(STEPS[0], ruleset), "/bin/sh", "-c", f"exec 3<{device}"]
            done = subprocess.run(command, capture_output=True, check=False, pass_fds=[ruleset])
            assert (done.returncode == 0) == (device in devices[:1])
    finally:
        os.close(ruleset)


@needs_landlock
@pytest.mark.parametrize("step", STEPS, ids=lambda step: Path(step[0]).name)
def test_step_leaves_nothing_to_the_next_program(step):
    ruleset = open_ruleset(VERSION, ["/bin/sh"])
    script = f"env; [ -e /proc/self/fd/{ruleset} ] && echo open; [ -e /proc/self/fd/2 ] && echo stderr"
    command = [*step_command(step, ruleset), "/bin/sh", "-c", script]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, pass_fds=[ruleset], env={"NAME": "value"}
        )
    finally:
        os.close(ruleset)
    assert [line for line in done.stdout.splitlines() if not line.startswith("PWD=")] == ["stderr"]


@needs_landlock
@pytest.mark.parametrize("step", STEPS, ids=lambda step: Path(step[0]).name)
def test_step_that_fails_executes_nothing(step):
    with open(os.devnull) as null:  # noqa: PTH123 - no ruleset
        command = [*step_command(step, null.fileno()), "/bin/echo", "started"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, pass_fds=[null.fileno()], env={}
        )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Landlock: " in done.stderr


@needs_landlock
def test_walls_use_landlock_by_default():
    assert find_walls("/bin/true").landlock == VERSION


@pytest.fixture
def prefix():
    """A folder that the users of machines may enter, for a program outside of the system's folders."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        prefix = Path(folder)
        prefix.chmod(0o755)
        for name in ("bin", "lib", "elsewhere"):
            (prefix / name).mkdir(mode=0o755)
        yield prefix


def program(prefix, library):
    """A program that cannot start without its library."""
    (prefix / library).write_text("")
    path = prefix / "bin" / "vmm"
    path.write_text(f"#!/bin/sh\n. {prefix / library}\n")
    path.chmod(0o755)
    return str(path)


@needs_landlock
def test_program_with_files_beside_it_runs_behind_rules(prefix):
    assert find_walls(program(prefix, "lib/library")).landlock == VERSION


@needs_landlock
def test_program_in_the_home_folder_does_not_open_it(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    ruleset = open_ruleset(VERSION, ["/bin/sh", str(home / "program")])
    try:
        for script, status in ((f"{home}/program", 0), (f"cat {home}/.bashrc", 1)):
            command = [*step_command(STEPS[0], ruleset), "/bin/sh", "-c", script]
            done = subprocess.run(command, capture_output=True, check=False, pass_fds=[ruleset])
            assert done.returncode == status, done.stderr
    finally:
        os.close(ruleset)


@needs_landlock
def test_program_that_fails_behind_landlock_runs_without_it(prefix):
    walls = find_walls(program(prefix, "elsewhere/library"))
    assert walls.landlock == 0
    told = {wall.name: wall for wall in walls.told()}["landlock"]
    assert not told.stands
    assert "QEMU does not start behind it" in told.detail


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSYS, "built without it"), (errno.EOPNOTSUPP, "switched off"), (errno.EPERM, "not permitted")],
)
def test_kernel_without_landlock_is_reported(monkeypatch, code, reason):
    def refuse(*_arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(landlock, "_call", refuse)
    version, why = find_version()
    assert version == 0
    assert reason in why
    walls = find_walls.__wrapped__()
    assert walls.ruleset("/bin/true") is None
    told = {wall.name: wall for wall in walls.told()}["landlock"]
    assert not told.stands
    assert why in told.detail
    assert "PYTEST_MICROVM_BWRAP=1" in told.fix


@pytest.mark.parametrize(
    ("version", "handled"),
    [
        (1, (0x1FFF,)),
        (2, (0x3FFF,)),
        (3, (0x7FFF,)),
        (4, (0x7FFF, 3)),
        (5, (0xFFFF, 3)),
        (6, (0xFFFF, 3, 3)),
        (8, (0xFFFF, 3, 3)),
        (9, (0x1FFFF, 3, 3)),
        (99, (0x1FFFF, 3, 3)),
    ],
)
def test_ruleset_asks_for_rights_the_version_knows(version, handled):
    attributes, size, flags = landlock._handled(version)
    assert struct.unpack(f"={len(handled)}Q", attributes) == handled
    assert (size, flags) == (len(attributes), 0)


def judge(program, architecture, number):
    """Execute a seccomp program as the kernel does: it has four kinds of instructions."""
    instructions = list(struct.iter_unpack("=HBBI", program))
    position = value = 0
    while True:
        code, then, otherwise, operand = instructions[position]
        position += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            value = {0: number, 4: architecture}[operand]
        else:
            holds = value == operand if code == 0x15 else value >= operand
            position += then if holds else otherwise


ALLOWED, DENIED = 0x7FFF0000, 0x00050000 | errno.EACCES


@pytest.mark.parametrize(
    ("machine", "architecture", "denied", "allowed"),
    [
        (
            "x86_64",
            0xC000003E,
            (76, 90, 42, 41, 425, 469, 240, 0x40000000, 0x40000001),
            (0, 1, 257, 59, 16, 234),
        ),
        ("aarch64", 0xC00000B7, (45, 53, 203, 198, 425, 469, 180), (63, 64, 56, 221, 29, 131)),
    ],
)
def test_filter_denies_by_architecture(machine, architecture, denied, allowed):
    program = deny_filter(machine)
    assert {judge(program, architecture, number) for number in denied} == {DENIED}
    assert {judge(program, architecture, number) for number in allowed} == {ALLOWED}
    assert judge(program, 0x40000003, 1) == DENIED  # 32-bit calls


def test_other_architectures_have_no_landlock(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert find_version() == (0, "not used on Linux riscv64")
