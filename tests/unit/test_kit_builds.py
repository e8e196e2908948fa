"""What a build will do, decided without doing it: command lines, mirrors, scripts, module order, errors."""

from __future__ import annotations

import io
import os
import select
import subprocess
import tarfile
import venv
from collections import deque

import pytest

from pytest_microvm.errors import BuildError, HostError
from pytest_microvm.images import process
from pytest_microvm.images.debian import debian_sources, mmdebstrap_command
from pytest_microvm.images.initramfs import loading_order
from pytest_microvm.images.kits import load_kit
from pytest_microvm.images.rootfs import setup_script, staging_archive
from pytest_microvm.programs import needed

INDEXES = """\
'http://a.example/debian/dists/bookworm/InRelease' a.example_debian_dists_bookworm_InRelease 0
'http://a.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' x 0
'http://a.example/debian/dists/bookworm-updates/main/binary-amd64/Packages.xz' x 0
'http://b.example/security/dists/bookworm-security/main/binary-amd64/Packages.xz' x 0
'https://tools.example/linux/debian/dists/bookworm/main/binary-amd64/Packages.xz' x 0
'http://a.example/debian/dists/bookworm-backports/main/binary-amd64/Packages.xz' x 0
'http://a.example/debian/dists/bookworm/contrib/binary-amd64/Packages.xz' x 0
""".splitlines()


def test_mirrors_are_this_computers_and_only_debians_own():
    assert debian_sources("bookworm", INDEXES) == [
        ("bookworm", "http://a.example/debian"),
        ("bookworm-updates", "http://a.example/debian"),
        ("bookworm-security", "http://b.example/security"),
    ]


def test_another_release_is_on_the_same_mirrors():
    assert debian_sources("trixie", INDEXES) == [
        ("trixie", "http://a.example/debian"),
        ("trixie-updates", "http://a.example/debian"),
        ("trixie-security", "http://b.example/security"),
    ]
    assert debian_sources("trixie", INDEXES[4:]) == []


@pytest.mark.parametrize("suite", ["noble", "bookworm-backports"])
def test_suite_absent_from_the_hosts_indexes_has_no_sources(suite):
    assert debian_sources(suite, INDEXES) == []


def test_a_foreign_archive_alone_is_not_debian():
    assert debian_sources("bookworm", INDEXES[4:]) == []


def test_the_command_line():
    command = mmdebstrap_command(
        suite="bookworm", architecture="arm64", variant="apt", packages=["procps", "less"],
        mirrors=["deb http://a.example/debian bookworm main"], mode="unshare",
        apt=['Acquire::Check-Date "false";'], hooks=["--customize-hook=true"],
    )  # fmt: skip
    assert command == [
        "mmdebstrap",
        "--mode=unshare",
        "--variant=apt",
        "--architectures=arm64",
        "--format=tar",
        "--include=procps,less",
        '--aptopt=Acquire::Check-Date "false";',
        "--customize-hook=true",
        "--",
        "bookworm",
        "-",
        "deb http://a.example/debian bookworm main",
    ]


@pytest.fixture
def kit(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "page").write_text("hello")
    (folder / "kit.toml").write_text(
        """
        suite = "bookworm"
        wheels = ["thing==1.0"]
        setup = ["echo one; exit 0", "echo two"]
        [files]
        "/srv/it's/page" = {source = "page", mode = "0640"}
        [environment]
        GREETING = "it's $HOME"
        """
    )
    return load_kit(folder)


def test_setup_script_is_valid_quoted_shell_in_order(kit):
    script = setup_script(kit)
    subprocess.run(["/bin/sh", "-n"], input=script, text=True, check=True)
    assert "export GREETING='it'\"'\"'s $HOME'" in script
    assert "-m 0640 /microvm-build/files/0 '/srv/it'\"'\"'s/page'" in script
    assert script.index("thing==1.0") < script.index(": > /etc/machine-id")
    assert "echo one" not in script  # it runs in a machine


def test_nothing_of_a_wheel_is_run_on_the_building_computer(kit, tmp_path):
    """What a .pth file says is run by every Python that reads its folder, so none does once it is there."""
    marker = tmp_path / "run"
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "thing.pth").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")
    (packages / "thing.py").write_text("")
    lines = [line for line in setup_script(kit).splitlines() if "python3 " in line]
    assert "pip install" in lines.pop(0)
    here = {"PATH": f"{tmp_path / 'venv' / 'bin'}:/usr/bin:/bin"}
    for line in lines:
        there = line.replace("/usr/local/lib/python3*/dist-packages", str(packages))
        subprocess.run(["/bin/sh", "-c", there], env=here, check=False, stderr=subprocess.DEVNULL)
        assert not marker.exists(), line
    assert list(packages.glob("__pycache__/thing.*.pyc"))
    subprocess.run(["python3", "-c", ""], env=here, check=True)
    assert marker.exists()


def test_staged_files_belong_to_root_and_have_no_time(kit, tmp_path):
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    archive = staging_archive(kit, [wheel])
    assert archive == staging_archive(kit, [wheel])
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = {member.name: member for member in tar}
        assert tar.extractfile("microvm-build/files/0").read() == b"hello"
    assert set(members) == {
        "microvm-build/files/0",
        "microvm-build/wheels/thing-1.0-py3-none-any.whl",
        "microvm-build/trust_pyc.py",
        "microvm-build/setup",
    }
    assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, 0)}


def _module(folder, name, depends):
    path = folder / "kernel" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0")


def test_modules_load_after_what_they_need(tmp_path):
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\nkernel/lib/crc16.ko\n")
    _module(tmp_path, "virtio_blk.ko", "virtio,virtio_ring")
    _module(tmp_path, "virtio.ko", "virtio-ring")
    _module(tmp_path, "virtio_ring.ko", "")
    _module(tmp_path, "jbd2.ko", "crc16")
    order = [name for name, _path in loading_order(tmp_path, ["virtio_blk", "ext4", "jbd2", "virtio"])]
    assert order == ["virtio_ring", "virtio", "virtio_blk", "jbd2"]


def test_a_module_the_kernel_lacks(tmp_path):
    (tmp_path / "modules.builtin").write_text("")
    _module(tmp_path, "a.ko", "b")
    with pytest.raises(BuildError, match="no module b"):
        loading_order(tmp_path, ["a"])


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("E: Temporary failure resolving 'mirror.example'", "network"),
        ("Could not connect to mirror.example:80", "network"),
        ("E: Unable to locate package nonsense", "`packages`"),
        ("write error: No space left on device", "disk space"),
        ("ERROR: No matching distribution found for thing==1.0", "`wheels`"),
        ("something else", "lines above"),
    ],
)
def test_a_failure_says_what_to_do_next(said, advice):
    error = process.build_error("mmdebstrap", 25, deque(["I: begin", said]))
    assert advice in error.resolution
    assert said in error.details
    assert "exit code 25" in error.brief


def test_a_program_that_fails_is_quoted_with_its_last_lines_only():
    script = "for i in $(seq 100); do echo line $i; done; echo bad >&2; exit 3"
    with pytest.raises(BuildError, match=r"sh failed \(exit code 3\)") as caught:
        process.run(["/bin/sh", "-c", script], what="sh", environment=process.build_environment())
    lines = caught.value.details.splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("line 72", "bad", 30)


def test_a_program_and_its_children_end_when_the_block_is_left():
    reading, writing = os.pipe()

    def leave():
        script = "sleep 1000 & echo started; wait"
        with (
            os.fdopen(writing, "wb") as held,
            process.started(
                ["/bin/sh", "-c", script], environment=os.environ, stdout=subprocess.PIPE, stderr=held
            ) as running,
        ):
            assert running.stdout.readline() == b"started\n"
            raise KeyboardInterrupt

    with os.fdopen(reading, "rb") as end:
        with pytest.raises(KeyboardInterrupt):
            leave()
        # The pipe ends once nobody holds its other end any more: neither the shell nor its child.
        readable, _, _ = select.select([end], [], [], 30)
        assert readable
        assert end.read() == b""


def test_program_of_another_architecture_is_named_as_the_cause(tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x02\x00\xff\xff" + b"\0" * 44)
    program.chmod(0o755)
    with pytest.raises(BuildError, match="starting it failed: this computer does not run programs of that"):
        process.run([str(program)], what="starting it", environment=process.build_environment())


def test_builds_see_little_of_the_users_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "t")
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    environment = process.build_environment(SOURCE_DATE_EPOCH="1")
    assert "SECRET_TOKEN" not in environment
    assert environment["http_proxy"] == "http://proxy.example:3128"
    assert environment["SOURCE_DATE_EPOCH"] == "1"


def test_missing_programs_are_named_with_their_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(needed, "_SYSTEM_FOLDERS", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError) as caught:
        needed.require("images")
    assert "mmdebstrap (Debian package mmdebstrap)" in caught.value.details
    assert "mksquashfs, unsquashfs (Debian package squashfs-tools)" in caught.value.details
    assert caught.value.resolution == "pytest-microvm setup"
