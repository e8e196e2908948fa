"""QEMU behind Landlock's rules: machines work, and QEMU's process cannot change the user's files.

QEMU itself stands in for an attacker who broke out of it: commands of its control socket write files and
connect to sockets.
"""

import re
import shutil
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_microvm.host.host import Host
from pytest_microvm.hypervisors.containment import find_walls
from pytest_microvm.hypervisors.landlock import find_version
from pytest_microvm.hypervisors.qemu import starting
from pytest_microvm.hypervisors.qemu.qmp import QmpError
from pytest_microvm.settings.spec import MachineSpec
from support.containment import FOLDER, push_modules

SPEC = MachineSpec(image="base", timeout=120)
VERSION, WHY_NOT = find_version()

needs_landlock = pytest.mark.skipif(VERSION == 0, reason=f"no Landlock here: {WHY_NOT}")


@pytest.fixture
def home():
    """A folder in which the user of every machine may write, with a file and a server's socket in it."""
    home = Path(tempfile.mkdtemp(dir="/var/tmp"))
    home.chmod(0o777)
    (home / ".bashrc").write_text("export EDITOR=vi\n")
    (home / ".bashrc").chmod(0o666)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(home / "socket"))
        (home / "socket").chmod(0o777)
        server.listen()
        yield home
    shutil.rmtree(home)


@pytest.fixture
def without(monkeypatch):
    """Machines start without Landlock's rules, as on a kernel that has none."""
    monkeypatch.setattr(starting, "find_walls", lambda program: replace(find_walls(program), landlock=0))


def overwrite(vmm, path):
    vmm.qmp.execute("pmemsave", {"val": 0, "size": 4, "filename": str(path)})


def create(vmm, path):
    backend = {"type": "file", "data": {"out": str(path)}}
    vmm.qmp.execute("chardev-add", {"id": "created", "backend": backend})


def connect(vmm, path):
    address = {"type": "unix", "data": {"path": str(path)}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    vmm.qmp.execute("chardev-add", {"id": "connected", "backend": backend})


@needs_landlock
def test_qemu_cannot_change_files_or_connect(host, home):
    with host.start(SPEC) as vm:
        vmm = vm.instance.vmm
        for way, name in ((overwrite, ".bashrc"), (create, "new"), (connect, "socket")):
            with pytest.raises(QmpError, match="Permission denied"):
                way(vmm, home / name)
        assert vm.run(["echo", "alive"]).stdout == "alive\n"
    assert (home / ".bashrc").read_text() == "export EDITOR=vi\n"
    assert {path.name for path in home.iterdir()} == {".bashrc", "socket"}


@pytest.mark.usefixtures("without")
def test_without_landlock_qemu_changes_files(host, home):
    """The control: the same commands work where nothing denies them."""
    with host.start(SPEC) as vm:
        for way, name in ((overwrite, ".bashrc"), (create, "new"), (connect, "socket")):
            way(vm.instance.vmm, home / name)
    assert len((home / ".bashrc").read_bytes()) == 4  # of the guest's memory
    assert (home / "new").exists()


@needs_landlock
def test_cached_files_cannot_be_changed(host):
    """Disk and state of the template, memory of others; its own memory only where QEMU must write to it."""
    base = host.base(SPEC)
    template, other = host.template(base), host.template(host.base(replace(SPEC, memory=200 * 1024**2)))
    closed = [template.scratch, template.state, other.ram, base.image.kernel, base.image.rootfs]
    if host.hypervisor(base.image.architecture)._copies_readonly_ram:
        closed.append(template.ram)
    before = [(path, path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in closed]
    with host.start(SPEC) as vm:
        for path in closed:
            with pytest.raises(QmpError, match="Permission denied"):
                overwrite(vm.instance.vmm, path)
    assert [(path, path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in closed] == before


@needs_landlock
def test_machines_boot_checkpoint_and_clone(host, tmp_path, monkeypatch, said):
    host.base(SPEC)
    (tmp_path / "images").symlink_to(host.cache / "images")
    if (host.cache / "accelerator.json").exists():
        shutil.copy(host.cache / "accelerator.json", tmp_path)
    monkeypatch.setenv("PYTEST_MICROVM_CACHE", str(tmp_path))
    fresh = Host(say=said.append)
    try:
        with fresh.start(SPEC) as vm, fresh.start(SPEC) as other:
            for machine in (vm, other):
                assert machine.run("echo x > /written && cat /written", check=True).stdout == "x\n"
                status = Path(f"/proc/{machine.instance.vmm.pid}/status").read_text()
                assert re.search(r"^Seccomp_filters:\s+2$", status, re.MULTILINE)  # ours and QEMU's
                assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    finally:
        fresh.close()
    assert said == ["booting base"]


@pytest.mark.parametrize(
    "user", [pytest.param(65534, id="nobody"), pytest.param(0, id="root", marks=pytest.mark.thorough)]
)
def test_unit_tests_on_debians_kernel(host, user):
    """The unit tests again, in a machine: an older version of Landlock, and an ordinary user's processes."""
    env = {"PYTHONPATH": FOLDER, "PYTHONDONTWRITEBYTECODE": "1"}
    version = "from pytest_microvm.hypervisors.landlock import find_version; print(*find_version())"
    command = ["python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{FOLDER}/test_landlock.py"]
    command += ["-k", "append or cut or mode or connect or process or reopened or default"]
    with host.start(MachineSpec(image="python", memory=512 * 1024**2, timeout=240)) as vm:
        push_modules(vm)
        vm.push(Path(__file__).parents[1] / "unit" / "test_landlock.py", f"{FOLDER}/test_landlock.py")
        found = vm.run(["python3", "-c", version], env=env, check=True).stdout
        assert int(found.split()[0]) >= 1, found
        done = vm.run(command, env=env, user=user, cwd="/tmp")
        assert done.returncode == 0, done.stdout
