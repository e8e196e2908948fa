"""The action's shell scripts, run for real where they do not change this computer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ACTION = Path(__file__).resolve().parents[2] / "github-action"
SUDO = """#!/bin/sh
echo "$@" >>"$LOG"
case "$*" in
    "tee /etc/udev/rules.d/99-kvm4all.rules") cat >>"$LOG" ;;
    "udevadm settle") chmod 0666 "$DEVICE" ;;
esac
"""


def run(script, *words, user=None, **variables):
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = [str(ACTION / script), *map(str, words)]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        user=user,
    )  # fmt: skip


@pytest.fixture
def folder():
    """A folder that everybody may enter, with a program sudo in bin, and a device that few may open."""
    with TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        (place / "bin").mkdir()
        (place / "bin" / "sudo").write_text(SUDO)
        (place / "log").touch()
        (place / "kvm").touch()
        shutil.copy2(ACTION / "kvm.sh", place)
        for program in ("bin", "bin/sudo", "kvm.sh"):
            (place / program).chmod(0o755)
        (place / "kvm").chmod(0o000)
        yield place


def test_no_device_is_no_failure(tmp_path):
    done = run("kvm.sh", tmp_path / "kvm")
    assert (done.returncode, "machines will be emulated" in done.stdout) == (0, True)


def test_one_that_may_be_opened_stays_as_it_is(folder):
    (folder / "kvm").chmod(0o666)
    done = run("kvm.sh", folder / "kvm", PATH=f"{folder / 'bin'}:{os.environ['PATH']}", LOG=folder / "log")
    assert (done.returncode, done.stdout, (folder / "log").read_text()) == (0, "", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, as only root can")
def test_the_right_is_given_by_a_rule_that_is_applied_at_once(folder):
    for name in ("kvm", "log"):
        os.chown(folder / name, 65534, 65534)
    variables = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "LOG": folder / "log", "DEVICE": folder / "kvm"}
    done = run(folder / "kvm.sh", folder / "kvm", user=65534, **variables)
    assert (done.returncode, done.stdout) == (0, "")
    assert (folder / "log").read_text().splitlines() == [
        "tee /etc/udev/rules.d/99-kvm4all.rules",
        'KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"',
        "udevadm control --reload-rules",
        "udevadm trigger --name-match=kvm",
        "udevadm settle",
    ]
    assert (folder / "kvm").stat().st_mode & 0o777 == 0o666


def test_packages_that_are_there_are_not_installed(tmp_path):
    """Only where all are there already; else this would install them."""
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho installing; exit 1\n")
    (tmp_path / "apt-get").chmod(0o755)
    done = run("setup.sh", PATH=f"{tmp_path}:{os.environ['PATH']}")
    if "==> installing" in done.stdout:
        assert done.returncode != 0  # what apt-get said is not passed over
    else:
        assert (done.returncode, done.stdout) == (0, "")


def test_a_package_that_is_missing_is_asked_for(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "env", "uname", "id", "dirname", "cat"):
        (programs / name).symlink_to(shutil.which(name))
    (programs / "apt-get").write_text('#!/bin/sh\necho "apt-get $*"; exit 3\n')
    (programs / "apt-get").chmod(0o755)
    (programs / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (programs / "sudo").chmod(0o755)
    done = run("setup.sh", PATH=programs)
    first = done.stdout.splitlines()[0]
    assert first.startswith("==> installing ")
    assert {"mmdebstrap", "squashfs-tools"} <= set(first.split())
    assert (done.returncode, done.stdout.splitlines()[1]) == (3, "apt-get update -qq")


def test_a_python_of_the_jobs_own(tmp_path):
    files = {name: tmp_path / name.lower() for name in ("GITHUB_PATH", "GITHUB_OUTPUT")}
    done = run("install.sh", PYTHON=sys.executable, RUNNER_TEMP=tmp_path, **files)
    assert (done.returncode, done.stdout) == (0, "")
    folder = Path(files["GITHUB_OUTPUT"].read_text().strip().removeprefix("folder="))
    assert files["GITHUB_PATH"].read_text() == f"{folder}/bin\n"
    assert [path.name for path in (folder / "bin").iterdir()] == ["pytest-microvm"]  # shadows nothing
    shown = subprocess.run([folder / "bin" / "pytest-microvm", "--version"], capture_output=True, check=True)
    assert shown.stdout.startswith(b"pytest-microvm ")


def test_a_python_without_it(tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    files = {name: tmp_path / name.lower() for name in ("GITHUB_PATH", "GITHUB_OUTPUT")}
    done = run("install.sh", PYTHON=environment / "bin" / "python", RUNNER_TEMP=tmp_path, **files)
    assert done.returncode == 1
    assert done.stdout == (
        "::error title=pytest-microvm::the Python named by the input 'python' has no pytest-microvm\n"
    )
