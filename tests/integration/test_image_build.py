"""Images, built for real: the same twice, repaired, interrupted, refused; and booted without an agent.

The kits here are tiny. What all images of a suite share is taken from the user's own cache if it is there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from pytest_microvm.errors import BuildError
from pytest_microvm.images.artifacts import Artifacts, Built
from pytest_microvm.images.build_keys import platform_name_and_key
from pytest_microvm.images.cpio import CpioEntry, cpio_archive
from pytest_microvm.images.kits import host_architecture, load_kit
from pytest_microvm.images.store import ImageStore, cache_root
from support import guards
from support.commands import MICROVM

pytestmark = pytest.mark.skipif(
    not (shutil.which("mmdebstrap") and shutil.which("mksquashfs")),
    reason="images cannot be built here: apt-get install mmdebstrap squashfs-tools",
)

KIT = """
description = "for tests"
suite = "trixie"
[files]
"/srv/page" = {source = "page", mode = "0640"}
[environment]
GREETING = "good morning"
[resources]
memory = "256M"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    kit = folder / "microvm" / "kits" / "tiny"
    kit.mkdir(parents=True)
    (kit / "kit.toml").write_text(KIT)
    (kit / "page").write_text("hello")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return a cache folder that holds the platform of trixie and nothing else."""
    root = tmp_path_factory.mktemp("cache")
    _share_platform(root)
    return root


def _share_platform(root):
    name, key = platform_name_and_key(load_kit("base"))
    users = Artifacts(cache_root() / "images")

    def copy(folder):
        ImageStore(cache_root()).get("base")
        shared = users.get(name, key, _must_be_there, print)
        for role, digest in shared.files.items():
            shutil.copyfile(users.blobs.path(digest), folder / role)
        return Built({role: folder / role for role in shared.files}, shared.facts)

    Artifacts(root / "images").get(name, key, copy, print)


def _must_be_there(_folder):
    raise AssertionError("the image base was just built, so its platform is there")


@pytest.fixture
def command(cache, project, tmp_path):
    """Return a function that starts ``pytest-microvm`` in the project, with the test's cache."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    environment = {**os.environ, "PYTEST_MICROVM_CACHE": str(cache), "TMPDIR": str(temporary)}
    environment.pop("SOURCE_DATE_EPOCH", None)

    def start(*arguments):
        return subprocess.Popen(
            [*MICROVM, *arguments], cwd=project, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    start.temporary = temporary
    return start


def _finish(process):
    stdout, stderr = process.communicate(timeout=guards.MACHINE)
    return process.returncode, stdout, stderr


def _is_clean(cache, temporary):
    assert list((cache / "images" / "building").glob("*")) == []
    assert [path for name in ("mmdebstrap*", "pytest-microvm-*") for path in temporary.glob(name)] == []
    assert str(temporary) not in Path("/proc/self/mounts").read_text()
    return True


@pytest.fixture(scope="module")
def image(cache, project):
    return ImageStore(cache).get("tiny", project=project, progress=print)


def _read(image, path):
    """Return a file of the image's root file system."""
    return subprocess.run(
        ["unsquashfs", "-cat", str(image.rootfs), path], check=True, capture_output=True, text=True
    ).stdout


def _list(image):
    lines = subprocess.run(
        ["unsquashfs", "-lln", str(image.rootfs)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    entries = [line.split(maxsplit=5) for line in lines if line[:1] in "-dlcb" and "squashfs-root" in line]
    return {
        name.removeprefix("squashfs-root"): (mode, owner) for mode, owner, _size, _day, _time, name in entries
    }


def _package_lists():
    folder = Path("/var/lib/apt/lists")
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*") if path.is_file()}


@pytest.mark.thorough
def test_two_processes_at_once_build_one_image(command, cache, project):
    lists = _package_lists()
    processes = [command("image", "build", "tiny") for _ in range(2)]
    results = [_finish(process) for process in processes]
    assert _package_lists() == lists  # apt inside the new root must never work on this computer's own
    assert [status for status, _out, _err in results] == [0, 0]
    assert results[0][1] == results[1][1]
    said = [err for _status, _out, err in results]
    assert sorted("installing the essential packages" in err for err in said) == [False, True]
    assert ImageStore(cache).inspect("tiny").image.digest == results[0][1].split()[1]
    assert _is_clean(cache, command.temporary)


def test_an_unchanged_kit_builds_nothing(image, cache, project):
    said = []
    assert ImageStore(cache).get("tiny", project=project, progress=said.append) == image
    assert said == []


def test_what_the_kit_said_is_in_the_image(image):
    assert _read(image, "srv/page") == "hello"
    assert _list(image)["/srv/page"] == ("-rw-r-----", "0/0")
    assert _list(image)[""] == ("drwxr-xr-x", "0/0")  # the root folder itself
    assert image.environment == (("GREETING", "good morning"),)
    assert (image.name, image.resources["memory"], image.architecture) == (
        "tiny",
        256 * 1024**2,
        host_architecture(),
    )


def test_nothing_of_this_computer_is_in_the_image(image):
    assert _read(image, "etc/hostname") == "microvm\n"
    assert _read(image, "etc/hosts").splitlines()[0] == "127.0.0.1\tlocalhost microvm"
    assert _read(image, "etc/resolv.conf") == ""
    assert _read(image, "etc/machine-id") == ""
    assert "@" not in _read(image, "etc/apt/sources.list")
    names = _list(image)
    assert not [name for name in names if "microvm-build" in name or name.endswith("99mmdebstrap")]
    assert not [name for name in names if name.startswith("/var/log/") and names[name][0][0] == "-"]
    assert not [name for name in names if name.startswith("/usr/share/doc/")]


def test_a_deleted_root_file_system_is_built_again_the_same(image, cache, project):
    image.rootfs.unlink()
    said = []
    assert ImageStore(cache).get("tiny", project=project, progress=said.append) == image
    assert "rootfs is damaged or gone: building it again" in said[0]
    assert not any("kernel" in line for line in said)  # the platform was intact
    assert image.rootfs.is_file()


def test_list_inspect_and_prune_agree_with_the_image_store(command, image, cache, project):
    status, out, _err = _finish(command("image", "list", "--json"))
    (entry,) = json.loads(out)
    assert status == 0
    assert (entry["name"], entry["digest"], entry["current"]) == ("tiny", image.digest, True)
    assert entry["size_bytes"] == sum(Path(path).stat().st_size for path in entry["files"].values())
    status, out, _err = _finish(command("image", "inspect", image.digest[:8], "--json"))
    assert (status, json.loads(out)) == (0, entry)
    status, out, _err = _finish(command("image", "inspect", "tiny"))
    assert status == 0
    assert f"digest        {image.digest}" in out
    assert "memory        256M" in out
    status, out, _err = _finish(command("image", "prune", "--json"))
    assert (status, json.loads(out)) == (0, {"freed_bytes": 0})
    assert ImageStore(cache).get("tiny", project=project, progress=_no_progress) == image


def _no_progress(line):
    raise AssertionError(line)


@pytest.mark.parametrize(
    ("kit", "evidence", "advice"),
    [
        ('suite = "trixie"\npackages = ["no-such-package"]', "no-such-package", "`packages`"),
        ('suite = "trixie"\nmirror = "http://127.0.0.1:9/debian"', "127.0.0.1", "network"),
        ('suite = "trixie"\nwheels = ["no-such-wheel-at-all==1.0"]', "no-such-wheel-at-all", "`wheels`"),
    ],
)
def test_a_build_that_fails_says_why_and_leaves_nothing(cache, bad_kit, kit, evidence, advice):
    bad_kit.write_text(kit)
    before = set(ImageStore(cache).list())
    with pytest.raises(BuildError) as caught:
        ImageStore(cache).get(bad_kit)
    assert evidence in caught.value.details
    assert advice in caught.value.resolution
    assert set(ImageStore(cache).list()) == before
    assert _is_clean(cache, bad_kit.parents[1])


@pytest.fixture
def bad_kit(tmp_path, monkeypatch):
    """Return the path of a kit below the folder for temporary files; pip does not try twice."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PIP_RETRIES", "0")
    tmp_path.chmod(0o1777)
    (tmp_path / "bad").mkdir()
    return tmp_path / "bad" / "kit.toml"


def test_ctrl_c_in_the_middle_of_a_build_leaves_nothing(command, cache, project):
    kit = project / "microvm" / "kits" / "interrupted"
    kit.mkdir()
    (kit / "kit.toml").write_text('suite = "trixie"\nsetup = ["echo never"]')
    process = command("image", "build", "interrupted")
    for line in process.stderr:
        if "installing the essential packages" in line:  # mounts exist from here on
            process.send_signal(signal.SIGINT)
            break
    status, _out, err = _finish(process)
    assert status == 130, err
    assert "interrupted" in err
    assert _is_clean(cache, command.temporary)
    assert [entry.image.name for entry in ImageStore(cache).list()] == ["tiny"]


def test_a_changed_kit_is_pruned_and_remove_removes(command, image, cache, project):
    kit = project / "microvm" / "kits" / "tiny" / "kit.toml"
    kit.write_text(KIT.replace("morning", "evening"))
    try:
        (entry,) = ImageStore(cache).list()
        assert not entry.current
        size = image.rootfs.stat().st_size
        status, out, _err = _finish(command("image", "prune", "--json"))
        assert status == 0
        assert json.loads(out)["freed_bytes"] >= size
        assert ImageStore(cache).list() == []
        assert not image.rootfs.exists()
        status, _out, err = _finish(command("image", "remove", "tiny"))
        assert status == 1
        assert "no image 'tiny'" in err
    finally:
        kit.write_text(KIT)


def test_a_malformed_kit_is_a_usage_error(command, project):
    kit = project / "microvm" / "kits" / "malformed"
    kit.mkdir()
    (kit / "kit.toml").write_text('suite = "trixie"\npakages = []')
    status, out, err = _finish(command("image", "build", "malformed"))
    assert (status, out) == (4, "")
    assert f"{kit / 'kit.toml'}: pakages: unknown key" in err
    assert "next step: known keys: architecture, description" in err


# -- booted, with a stand-in for the agent -------------------------------------------------------------

STAND_IN = b"""
import ctypes, json, os, shutil

def main():
    os.sync()
    print("STAND-IN " + json.dumps({
        "pid": os.getpid(),
        "python": shutil.which("python3"),
        "os": open("/etc/os-release").read().splitlines()[0],
        "mounts": [line.split()[:4] for line in open("/proc/mounts")],
        "code": os.listdir("/run/microvm/code"),
        "modules": os.listdir("/lib/modules") == [os.uname().release],
        "fd": os.readlink("/dev/fd"),
        "lo": open("/sys/class/net/lo/flags").read().strip(),
        "root": sorted(os.listdir("/")),
    }), flush=True)
    ctypes.CDLL(None).reboot(0x1234567)
"""


@pytest.fixture
def boot(tmp_path):
    """Return a function that boots an image with QEMU alone and returns what its console showed."""
    program = {"x86_64": "qemu-system-x86_64"}.get(host_architecture(), "")
    if not shutil.which(program):
        pytest.skip("needs qemu-system-x86_64 on a computer of that architecture")

    def run(image, *, words="", code=b"", scratch=None):
        initramfs = tmp_path / "initramfs"
        initramfs.write_bytes(image.initramfs.read_bytes() + code)
        disks = [(image.rootfs, "on"), (image.runtime, "on"), *([(scratch, "off")] if scratch else [])]
        argv = [
            program, "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256M", "-no-reboot",
            "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio",
            "-kernel", image.kernel, "-initrd", initramfs, "-append", f"console=ttyS0 quiet panic=-1 {words}",
        ]  # fmt: skip
        for number, (path, readonly) in enumerate(disks):
            argv += ["-drive", f"if=none,id=d{number},file={path},format=raw,readonly={readonly}"]
            argv += ["-device", f"virtio-blk-pci,drive=d{number}"]
        done = subprocess.run(
            argv, capture_output=True, text=True, check=True, timeout=guards.MACHINE, stdin=subprocess.DEVNULL
        )
        return done.stdout

    return run


@pytest.fixture(scope="module")
def base():
    return ImageStore(cache_root()).get("base", progress=print)


def _guest_code(agent):
    folders = ["guest-code", "guest-code/pytest_microvm", "guest-code/pytest_microvm/guest"]
    return cpio_archive(
        [
            *(CpioEntry.directory(name) for name in folders),
            *(CpioEntry.file(f"{name}/__init__.py", b"") for name in folders[1:]),
            CpioEntry.file(f"{folders[-1]}/agent.py", agent),
        ]
    )


def _told(console):
    (line,) = [line for line in console.splitlines() if line.startswith("STAND-IN ")]
    return json.loads(line.removeprefix("STAND-IN "))


def test_the_agents_python_runs_where_there_is_none(boot, base):
    told = _told(boot(base, code=_guest_code(STAND_IN)))
    mounts = {where: (kind, options.split(",")) for _what, where, kind, options in told["mounts"]}
    assert told["pid"] == 1
    assert told["python"] is None  # the root file system has no Python
    assert told["os"].startswith('PRETTY_NAME="Debian GNU/Linux 13')
    assert told["code"] == ["pytest_microvm"]
    assert told["modules"]
    assert told["fd"] == "/proc/self/fd"
    assert int(told["lo"], 16) & 1  # up
    assert not {"mnt-root", "newroot", "guest-code", "microvm-build"} & set(told["root"])
    assert mounts["/"][0] == "overlay"
    for where in ("/run/microvm/code", "/run/microvm/runtime"):
        assert "ro" in mounts[where][1]


def test_the_scratch_disk_is_what_the_machine_writes_to(boot, base, tmp_path):
    scratch = tmp_path / "scratch"
    with scratch.open("wb") as file:
        file.truncate(64 * 1024**2)
    subprocess.run(["mkfs.ext4", "-q", str(scratch)], check=True)
    agent = STAND_IN.replace(b"os.sync()", b"open('/srv/w', 'w').write('w'); os.sync()")
    _told(boot(base, code=_guest_code(agent), scratch=scratch))
    listing = subprocess.run(
        ["debugfs", "-R", "ls -p /upper/srv", str(scratch)], check=True, capture_output=True, text=True
    ).stdout
    assert "/w/" in listing


def test_a_boot_without_the_agents_code_says_so_and_ends(boot, base):
    assert "microvm: the agent's code is missing (/guest-code)" in boot(base)


def test_a_probe_ends_at_once(boot, base):
    console = boot(base, words="microvm.probe=1")
    assert "microvm-probe-ok" in console
    assert "microvm: " not in console


@pytest.mark.thorough
def test_kit_of_another_debian_release(host, tmp_path):
    """Debian 12, before the bundled kits' release, with the kernel and Python of its own."""
    kit = tmp_path / "twelve"
    kit.mkdir()
    (kit / "kit.toml").write_text(
        'suite = "bookworm"\npackages = ["python3", "python3-pip"]\nwheels = ["packaging==26.3"]\n'
    )
    with host.start(image=str(kit), timeout=guards.MACHINE) as machine:
        assert machine.run("cat /etc/debian_version", check=True).stdout.startswith("12.")
        assert machine.run("uname -r", check=True).stdout.startswith("6.1.")
        code = "import packaging, sys; print(*sys.version_info[:2], packaging.__version__)"
        assert machine.run(["python3", "-c", code], check=True).stdout == "3 11 26.3\n"
