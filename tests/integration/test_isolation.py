"""From within a machine, as root: nothing of the host, nothing of another machine, nothing left."""

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pytest_microvm.errors import UsageError
from pytest_microvm.host.host import Host
from pytest_microvm.settings.spec import MachineSpec
from support.commands import PYTEST

MIB = 1024**2
SPEC = MachineSpec(image="python", memory=320 * MIB, disk=128 * MIB, timeout=900)
COPIES = 20

# Everything root can read in a machine: each word is looked for in every file of /, /proc and /sys.
SEARCH = """
import json, os, sys

words = {name: word.encode() for name, word in json.load(sys.stdin).items()}
found = {name: [] for name in words}
left_out = {"/proc/kcore", "/dev", "/usr/lib/modules"}  # RAM is searched from outside; Debian's modules

def look(path):
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return
    tail, left = b"", 1 << (20 if path.startswith(("/proc", "/sys")) else 30)  # some there never end
    try:
        while left > 0 and (data := os.read(fd, 1 << 20)):
            left -= len(data)
            data = tail + data
            for name, word in words.items():
                if word in data:
                    found[name].append(path)
            tail = data[-100:]
    except OSError:
        pass
    finally:
        os.close(fd)

look("/dev/kmsg")
for folder, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if os.path.join(folder, name) not in left_out and name != "task"]
    if folder.startswith("/proc/%d" % os.getpid()):
        continue
    for name in files:
        path = os.path.join(folder, name)
        if path not in left_out:
            look(path)
    for name, word in words.items():
        if any(word in os.fsencode(entry) for entry in (folder, *files)):
            found[name].append(folder)
print(json.dumps(found))
"""

# QEMU's configuration device, read without a driver: docs/specs/fw_cfg of QEMU. Two functions in machine
# code: ``mov edx, edi; xor eax, eax; in al, dx; ret`` and ``mov edx, edi; mov eax, esi; out dx, ax; ret``.
FW_CFG = """
import ctypes, json, mmap, struct

def native(code, *kinds):
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex(code))
    pages.append(page)
    return ctypes.CFUNCTYPE(ctypes.c_uint, *kinds)(ctypes.addressof(ctypes.c_char.from_buffer(page)))

pages = []
assert ctypes.CDLL(None).iopl(3) == 0
inb = native("89fa31c0ecc3", ctypes.c_uint)
outw = native("89fa89f066efc3", ctypes.c_uint, ctypes.c_uint)

def read(key, size):
    outw(0x510, key)
    return bytes(inb(0x511) for _ in range(size))

items = {"signature": read(0, 4), "uuid": read(2, 16), "cmdline": read(0x15, 4096)}
count, = struct.unpack(">I", read(0x19, 4))
listing = read(0x19, 4 + 64 * count)[4:]
for number in range(count):
    size, key, _, name = struct.unpack_from(">IHH56s", listing, 64 * number)
    items[name.rstrip(b"\\0").decode()] = read(key, min(size, 16384))
print(json.dumps({name: data.decode("latin-1") for name, data in items.items()}))
"""

CONNECT = """
import json, socket, sys

answers = []
for address, port in json.load(sys.stdin):
    try:
        socket.create_connection((address, port), timeout=10).close()
        answers.append("connected")
    except OSError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""

MARK = """
import os, sys, time

marker = os.urandom(32).hex().encode()
print(marker.decode(), flush=True)
for path in ("/marker", "/tmp/marker", "/dev/shm/marker"):
    with open(path, "wb") as file:
        file.write(marker * (4 << 14))
        os.fsync(file.fileno())
os.sync()
kept = marker * (4 << 14)
print("written", flush=True)
sys.stdin.read()
"""

READ_DISK = """
import sys

marker, tail, total = sys.stdin.read().encode(), b"", 0
with open("/dev/vdc", "rb") as disk:
    while data := disk.read(1 << 20):
        assert marker not in tail + data
        total, tail = total + len(data), data[-len(marker):]
print(total)
"""

DRAW = """
import json, os, random, secrets, socket, tempfile, time, uuid

def read(path):
    with open(path) as file:
        return file.read().strip()

def draw():
    return {
        "time": time.time(),
        "os.urandom": os.urandom(16).hex(),
        "random": random.random(),
        "getrandbits": random.getrandbits(64),
        "secrets": secrets.token_hex(16),
        "uuid1": str(uuid.uuid1()),
        "uuid4": str(uuid.uuid4()),
        "temporary name": next(tempfile._get_candidate_names()),
        "host name": socket.gethostname(),
        "machine-id": read("/etc/machine-id"),
        "kernel's uuid": read("/proc/sys/kernel/random/uuid"),
    }
"""

FRESH = (
    DRAW
    + """
import ctypes, ssl

print(json.dumps({
    **draw(),
    "openssl": ssl.RAND_bytes(16).hex(),
    "hash": hash("text"),
    "boot id": read("/proc/sys/kernel/random/boot_id"),
    "address of the C library": ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value,
}))
"""
)

SUITE = (
    DRAW
    + """
import ssl
import pytest

draw(), ssl.RAND_bytes(16)  # every generator has its state before the machine is frozen

@pytest.mark.parametrize("number", range({copies}))
def test_copy(number, record_property):
    record_property("drawn", json.dumps({**draw(), "openssl": ssl.RAND_bytes(16).hex()}))
"""
)

TIMES = """
import json, os, time

microvm_host_only = True
begun = {}

def pytest_microvm_started(nodeid):
    begun[nodeid] = time.time()

def pytest_runtest_logreport(report):
    if report.when == "call":
        drawn = json.loads(dict(report.user_properties)["drawn"])
        with open(os.environ["TIMES"], "a") as file:
            print(json.dumps([begun[report.nodeid], drawn, time.time()]), file=file)
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """What only this computer has, by what it is; some of it is put there for this."""
    canary = {kind: f"canary-{kind}-{secrets.token_hex(8)}" for kind in ("variable", "file", "process")}
    secret = tmp_path_factory.mktemp("host") / f"canary-name-{secrets.token_hex(8)}"
    secret.write_text(canary["file"])
    found = {**canary, "file name": secret.name, "project": str(Path(__file__).parents[2])}
    for kind, path in (("machine-id", "/etc/machine-id"), ("boot id", "/proc/sys/kernel/random/boot_id")):
        if Path(path).exists():
            found[kind] = Path(path).read_text().strip()
    for card in Path("/sys/class/net").glob("*/address"):
        if card.parent.name != "lo":
            found[f"address of {card.parent.name}"] = card.read_text().strip()
    for name in ("product_uuid", "product_serial", "board_serial"):
        with contextlib.suppress(OSError):
            found[name] = Path("/sys/class/dmi/id", name).read_text().strip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY", canary["variable"])
        sleeper = subprocess.Popen([canary["process"], "infinity"], executable="/bin/sleep")
        yield {kind: word for kind, word in found.items() if len(word) > 7}
        sleeper.kill()
        sleeper.wait()


@pytest.fixture(scope="module")
def here(host, words):
    """This computer with a template of its own, made while all that is looked for is there."""
    computer = Host(cache=host.cache, say=print)
    words["cache"] = str(host.cache)
    base = computer.base(SPEC)
    key = computer._chain(base).key(base)
    with contextlib.suppress(UsageError):
        computer.templates.remove(key)  # of an earlier run that was killed
    computer.template(base)
    yield computer
    computer.close()
    computer.templates.remove(key)


@pytest.fixture(scope="module")
def vm(here):
    with here.start(SPEC) as machine:
        yield machine


def python(machine, script, **given):
    """Run a script in a machine and return what it prints, as JSON; words reach it by stdin alone."""
    done = machine.run(["python3", "-c", script], check=True, **given)
    return json.loads(done.stdout)


def holds(path, word):
    """Whether a file has ``word`` in it."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return False
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            return content.find(word) >= 0


def digests(paths):
    found = {}
    for path in paths:
        with path.open("rb") as file:
            total = hashlib.sha256()
            while data := file.read(MIB):
                total.update(data)
            found[path] = total.hexdigest()
    return found


def template_files(here):
    folder = here.template(here.base(SPEC)).folder
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_no_word_of_the_host_is_in_a_machines_memory(here, words):
    """All that a copy of it can ever read: its template's RAM, disk and devices' state."""
    template = here.template(here.base(SPEC))
    assert holds(template.ram, b"pytest_microvm.guest.agent")  # what is there is found
    machine = [path for path in template_files(here) if path.suffix != ".json"]  # those are the host's
    assert {path.name for path in machine} == {"ram", "scratch", "state"}
    assert [
        (kind, path.name) for kind, word in words.items() for path in machine if holds(path, word.encode())
    ] == []


def test_no_word_of_the_host_is_in_a_file_a_process_or_a_device(vm, words):
    """Not in images and programs either, which were built here."""
    control = {"cmdline": "random.trust_cpu=on", "processes": "pytest_microvm.guest.agent"}
    found = python(vm, SEARCH, input=json.dumps({**words, **control}))
    assert "/proc/cmdline" in found.pop("cmdline")
    assert "/proc/1/cmdline" in found.pop("processes")
    assert found == {kind: [] for kind in words}


def test_names_users_and_variables_are_the_machines_own(vm):
    assert vm.run(["uname", "-n"]).stdout.strip() == vm.id
    users = [line.split(":") for line in vm.path("/etc/passwd").read_text().splitlines()]
    assert [user[0] for user in users if int(user[2]) >= 1000] == ["nobody"]
    assert vm.run(["ls", "/home"]).stdout == ""
    given = {name for name, _value in vm.facts.environment}
    variables = dict(line.split("=", 1) for line in vm.run(["env"]).stdout.splitlines())
    assert set(variables) - given <= {"HOME", "LANG", "LOGNAME", "PATH", "PWD", "SHELL", "TERM", "USER"}
    commands = vm.run(["ps", "-eo", "pid,ppid,comm"]).stdout.splitlines()[1:]
    ours = [line.split(maxsplit=2) for line in commands]
    threads = {pid for pid, parent, _name in ours if parent == "2"} | {"2"}
    programs = [name for pid, _parent, name in ours if pid not in threads]
    assert len(programs) == 3  # the agent, its network process, and ps
    assert {"microvm-network", "ps"} < set(programs)


def test_fw_cfg_holds_no_host_information(vm, words):
    if vm.run(["uname", "-m"]).stdout != "x86_64\n":
        pytest.skip("read by instructions of x86")
    items = python(vm, FW_CFG)
    assert items["signature"] == "QEMU"
    assert items["cmdline"].startswith("console=")
    assert [name for name in items if name.startswith("opt/")] == []
    assert items["uuid"] == "\0" * 16
    text = json.dumps(items)
    assert [kind for kind, word in words.items() if word in text] == []


def test_devices_are_the_known_ones(vm):
    assert vm.run(["ls", "/sys/class/net"]).stdout.split() == ["lo", "nowhere"]
    assert vm.run(["ls", "/sys/block"]).stdout.split() == ["vda", "vdb", "vdc"]
    assert vm.run("cat /sys/block/*/ro").stdout.split() == ["1", "1", "0"]
    assert vm.run("cat /sys/block/*/serial").stdout == ""
    assert sorted(vm.run("cat /sys/class/virtio-ports/*/name").stdout.split()) == [
        "agent",
        "network",
        "runner",
    ]
    kinds = vm.run("cat /sys/bus/virtio/devices/*/device").stdout.split()
    assert sorted(kinds) == ["0x0002"] * 3 + ["0x0003"]  # block, console
    known = {"0x010000", "0x010601", "0x060000", "0x060100", "0x078000", "0x0c0500"}  # q35's, and virtio's
    assert set(vm.run("cat /sys/bus/pci/devices/*/class 2>/dev/null").stdout.split()) <= known
    words = vm.run(["cat", "/proc/cmdline"]).stdout.split()
    names = {"console", "quiet", "panic", "random.trust_cpu", "mitigations", "reboot", "tsc_early_khz"}
    assert {word.partition("=")[0] for word in words} <= names


def test_no_way_to_the_host_but_the_channel(vm):
    script = """
import ctypes, errno, json, socket

libc, answers = ctypes.CDLL(None, use_errno=True), {}
for kind in ("9p", "virtiofs", "vboxsf", "nfs", "fuse"):
    assert libc.mount(b"host", b"/mnt", kind.encode(), 0, None) == -1
    answers[kind] = errno.errorcode[ctypes.get_errno()]
try:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).connect((socket.VMADDR_CID_HOST, 1024))
except OSError as error:
    answers["vsock"] = errno.errorcode[error.errno]
print(json.dumps(answers))
"""
    answers = python(vm, script)
    assert answers.pop("vsock") in {"EAFNOSUPPORT", "ENODEV"}
    # A descriptor is missing, which leads to a process of the machine: to the host in live mounts alone.
    assert answers.pop("fuse") == "EINVAL"
    assert answers.pop("virtiofs") in {"ENODEV", "EINVAL"}  # no such file system, or no device with that name
    assert set(answers.values()) == {"ENODEV"}


def test_the_hosts_ports_are_out_of_reach(vm):
    with socket.create_server(("0.0.0.0", 0)) as server:  # noqa: S104 - every way there would be
        port = server.getsockname()[1]
        own = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
        addresses = ["127.0.0.1", "::1", "10.0.2.2", "169.254.169.254", *own]
        answers = python(vm, CONNECT, input=json.dumps([(address, port) for address in addresses]))
        assert [answer for answer in answers if "refused" not in answer and "unreachable" not in answer] == []
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_root_cannot_write_to_the_image(here, vm):
    image = here.base(SPEC).image
    before = digests(image.files().values())
    for disk in ("/dev/vda", "/dev/vdb"):
        for attempt in (
            f"dd if=/dev/urandom of={disk} bs=4096 count=1 conv=fsync",
            f"blockdev --setrw {disk}; dd if=/dev/urandom of={disk} bs=4096 count=1 conv=fsync,notrunc",
            f"blockdev --setrw {disk}; dd if=/dev/urandom of={disk} bs=4096 count=1 oflag=direct",
            f"blkdiscard -f {disk}",
            f"blkdiscard -f --zeroout {disk}",
        ):
            done = vm.run(attempt)
            assert done.returncode != 0, attempt
            assert "not found" not in done.stderr
    assert digests(image.files().values()) == before


def test_two_at_once_know_nothing_of_each_other(here, vm):
    with here.start(SPEC) as other:
        script = (
            "import socket, sys; a = socket.create_server(('0.0.0.0', 7007)); "
            "b = socket.socket(socket.AF_UNIX); b.bind('\\0known'); b.listen(); "
            "print('ready', flush=True); sys.stdin.read()"
        )
        with vm.popen(["python3", "-c", script], stdin=True) as server:
            assert server.stdout.readline() == "ready\n"
            where = json.dumps([("127.0.0.1", 7007)])
            assert python(vm, CONNECT, input=where) == ["connected"]
            assert "refused" in python(other, CONNECT, input=where)[0]
            assert "@known" in vm.path("/proc/net/unix").read_text()
            assert "@known" not in other.path("/proc/net/unix").read_text()
            server.kill()
        for path in ("/etc/seen", "/tmp/seen", "/dev/shm/seen", "/run/seen"):
            vm.path(path).write_text("x")
            assert not other.path(path).exists()
        vm.run("echo 4242 > /proc/sys/kernel/threads-max; date -s 2001-01-01", check=True)  # the kernel's own
        assert other.path("/proc/sys/kernel/threads-max").read_text() != "4242\n"
        assert other.run(["date", "+%Y"]).stdout.strip() == str(time.gmtime().tm_year)


def changed_since(folder, begin):
    """Files below ``folder`` that were written to; others may go while it is looked at.

    Other file systems mounted there are left out: machines write to none of them.
    """
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not Path(here, name).is_mount()]
        for name in names:
            path = Path(here, name)
            with contextlib.suppress(OSError):
                if path.is_file() and path.stat().st_mtime >= begin:
                    yield path


def overlay(pid):
    """What takes a machine's writes to its disk: a file without a name."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(link)  # noqa: PTH115 - no path: it says (deleted)
        if target.endswith("(deleted)") and link.stat().st_size > 256 * 1024:
            return link
    raise AssertionError("no overlay")


def test_what_a_machine_wrote_is_gone(here, vm):
    template = template_files(here)
    image = list(here.base(SPEC).image.files().values())
    before, begin = digests(template + image), time.time() - 2
    with here.start(SPEC) as writer, writer.popen(["python3", "-c", MARK], stdin=True) as process:
        marker = process.stdout.readline().strip().encode()
        assert len(marker) == 64
        assert process.stdout.readline() == "written\n"
        assert holds(overlay(writer.instance.vmm.pid), marker)  # while it lives, it is found
        process.kill()
    assert digests(template + image) == before
    places = {Path("/var/tmp"), Path(tempfile.gettempdir()), here.cache}
    searched = {path for place in places for path in changed_since(place, begin)}
    assert [path for path in {*searched, *template, *image} if path.exists() and holds(path, marker)] == []
    with here.start(SPEC) as later:
        done = later.run(["python3", "-c", READ_DISK], input=marker.decode(), check=True)
        assert int(done.stdout) >= 128 * MIB
        assert later.run("ls /marker /tmp/marker /dev/shm/marker").stdout == ""


def all_differ(drawn):
    """Each kind of value is another one in every machine."""
    alike = {kind: [values[kind] for values in drawn] for kind in drawn[0]}
    return [kind for kind, values in alike.items() if len(set(values)) != len(drawn)]


@pytest.mark.parametrize("copies", [5, pytest.param(COPIES, marks=pytest.mark.thorough)])
def test_copies_differ(here, copies):
    drawn = []
    for _ in range(copies):
        with here.start(SPEC) as machine:
            begin = time.time()
            drawn.append(python(machine, FRESH))
            assert begin - 0.2 <= drawn[-1]["time"] <= time.time() + 0.2
    assert all_differ(drawn) == []


def test_clock_of_a_machine_that_adopts_slowly_is_right(vm):
    """It is told again: what it heard first is three seconds old when it can act on it."""
    identity = {"hostname": vm.id, "machine_id": vm.path("/etc/machine-id").read_text().strip()}
    qmp = vm.instance.vmm.qmp
    qmp.execute("stop")
    later = threading.Timer(3, qmp.execute, ["cont"])
    later.start()
    begin = time.monotonic()
    vm.instance.adopt("agent", identity)
    assert time.monotonic() - begin > 2.5  # it was slow indeed
    later.join()
    begin = time.time()
    told = float(vm.run(["date", "+%s.%N"], check=True).stdout)
    assert begin - 0.2 <= told <= time.time() + 0.2


def test_copies_of_one_interpreter_differ(tmp_path):
    """``pytest --microvm``: the process itself is copied, with the state of all its generators."""
    project, plugins = tmp_path / "project", tmp_path / "plugins"
    project.mkdir()
    plugins.mkdir()
    (project / "pytest.ini").write_text("[pytest]\n")
    (project / "test_copies.py").write_text(SUITE.replace("{copies}", str(COPIES)))
    (plugins / "times.py").write_text(TIMES)
    environment = {**os.environ, "PYTHONPATH": str(plugins), "TIMES": str(tmp_path / "times")}
    done = subprocess.run(
        [*PYTEST, "--microvm", "-p", "times"],
        cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "times").read_text().splitlines()]
    assert len(lines) == COPIES
    for begin, values, end in lines:
        assert begin - 0.2 <= values["time"] <= end + 0.2
    assert all_differ([values for _begin, values, _end in lines]) == []
