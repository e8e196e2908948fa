"""Tests nobody would run on a computer they like. Each starts on an intact one."""

import os
import pwd
import subprocess
from pathlib import Path

import pytest

MACHINE = Path("/run/microvm")  # only inside a microVM

pytestmark = [
    pytest.mark.destructive,
    pytest.mark.skipif(not MACHINE.exists(), reason="destroys the computer it runs on; use pytest --microvm"),
]


@pytest.fixture(autouse=True)
def intact():
    """Whatever the test before did, this machine is new."""
    assert os.geteuid() == 0
    assert pwd.getpwuid(0).pw_name == "root"
    assert subprocess.run(["ls", "/usr/bin/dpkg"], check=True, stdout=subprocess.DEVNULL).returncode == 0


def test_deletes_the_root_file_system():
    command = [
        "rm",
        "-rf",
        "--one-file-system",
        "--no-preserve-root",
        "/",
    ]  # /proc and /sys cannot be removed
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    assert [path for path in ("/usr/bin", "/etc/passwd", "/home", "/var/lib") if Path(path).exists()] == []
    with pytest.raises(FileNotFoundError):
        subprocess.run(["ls"], check=False)
    assert sorted({"still": 1, "here": 2}) == ["here", "still"]  # what is in memory goes on


def test_installs_a_package(tmp_path):
    program = tmp_path / "greet" / "usr" / "bin" / "greet"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho hello from a package\n")
    program.chmod(0o755)
    control = tmp_path / "greet" / "DEBIAN" / "control"
    control.parent.mkdir()
    control.write_text(
        "Package: greet\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\n"
        "Description: greets\n"
    )
    build = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", "greet", "greet.deb"]
    subprocess.run(build, cwd=tmp_path, check=True)
    subprocess.run(["dpkg", "--install", "greet.deb"], cwd=tmp_path, check=True)
    greeting = subprocess.run(["greet"], check=True, capture_output=True, text=True)
    assert greeting.stdout == "hello from a package\n"


def test_breaks_the_account_database():
    Path("/etc/passwd").write_text("")
    with pytest.raises(KeyError):
        pwd.getpwnam("root")
    assert subprocess.run(["id", "--user", "--name"], check=False, capture_output=True).returncode != 0


def test_takes_the_c_library_away():
    mapped = Path("/proc/self/maps").read_text().split()
    for library in {word for word in mapped if "/libc.so" in word or "/libc-" in word}:
        Path(library).unlink()
    broken = subprocess.run(["ls"], check=False, capture_output=True, text=True)
    assert broken.returncode == 127
    assert "libc.so.6" in broken.stderr


def test_nothing_of_that_is_left():
    assert Path("/usr/bin").is_dir()
    assert not Path("/usr/bin/greet").exists()
    assert "root:" in Path("/etc/passwd").read_text()
