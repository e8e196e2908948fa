"""``pytest-microvm setup``, and the one error that names all programs that a computer lacks.

apt-get and sudo are programs of the tests' own, which record how they are called.
"""

import os
import pty
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from pytest_microvm.cli import main
from pytest_microvm.errors import HypervisorMissing
from pytest_microvm.host.host import Host
from pytest_microvm.hypervisors.qemu.command import PROGRAMS
from pytest_microvm.hypervisors.qemu.hypervisor import Qemu
from pytest_microvm.images.kits import host_architecture
from pytest_microvm.programs import needed
from pytest_microvm.settings.spec import MachineSpec
from support import guards
from support.commands import MICROVM, PYTEST

REPOSITORY = Path(__file__).resolve().parents[2]
QEMU = PROGRAMS[host_architecture()]
QEMU_PACKAGE = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}[host_architecture()]
LACKING = {QEMU_PACKAGE, "util-linux", "mmdebstrap", "squashfs-tools"}  # with a PATH of empty folders
PROVIDED = (QEMU, "setpriv", "prlimit", "mke2fs", "mmdebstrap", "mksquashfs", "unsquashfs", "newuidmap")


class Computer:
    """A PATH without the programs that machines need, and with an apt-get that records its calls."""

    def __init__(self, folder):
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "log"
        self.log.touch()
        own = {"PATH": str(self.bin), "PYTEST_MICROVM_CACHE": str(folder / "cache")}
        self.environment = {**os.environ, **own}
        (self.bin / "env").symlink_to(shutil.which("env"))
        created = "".join(
            f"echo '#!/bin/sh' >{self.bin / name}; {shutil.which('chmod')} +x {self.bin / name}\n"
            for name in PROVIDED
        )
        self.add("apt-get", f"[ $1 = update ] || {{\n{created}}}")

    def add(self, name, script):
        """Add a program that records its arguments."""
        record = f'echo "{name} $*" >>{self.log}\n'
        (self.bin / name).write_text(f"#!/bin/sh\n{record}{script}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *command, **more):
        more = {"env": self.environment, "stdin": subprocess.DEVNULL, **more}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=guards.SUITE, **more
        )

    def setup(self, *words, **more):
        return self.run(*MICROVM, "setup", *words, **more)

    def calls(self):
        return self.log.read_text().splitlines()


@pytest.fixture
def computer(tmp_path):
    return Computer(tmp_path)


@pytest.fixture
def ordinary_user(computer, monkeypatch):
    """Make this process an ordinary user's, on that computer."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(computer.bin))


def installed(call):
    """Return the packages that a call of apt-get installs."""
    before, options, packages = call.partition(" install --yes --no-install-recommends ")
    assert (before.endswith("apt-get"), bool(options)) == (True, True)
    return set(packages.split())


def test_dry_run_lists_programs_and_commands_and_runs_nothing(computer):
    done = computer.setup("--dry-run")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert f"missing: {QEMU} (Debian package {QEMU_PACKAGE}), to run machines" in lines
    assert "missing: mksquashfs, unsquashfs (Debian package squashfs-tools), to build images" in lines
    assert lines[-3] == "to install:"
    assert lines[-2].endswith("apt-get update")
    assert installed(lines[-1]) >= LACKING
    assert computer.calls() == []


def test_setup_installs_missing_packages_once(computer):
    computer.add("sudo", 'exec "$@"')
    done = computer.setup("--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "nothing is missing any more; next: pytest-microvm doctor"
    update, install = [call for call in computer.calls() if call.startswith("apt-get")]
    assert update == "apt-get update"
    assert installed(install) >= LACKING
    computer.log.write_text("")
    again = computer.setup("--yes")
    assert (again.returncode, again.stdout, computer.calls()) == (0, "nothing is missing\n", [])


def test_setup_without_a_terminal_refuses(computer):
    done = computer.setup()
    assert done.returncode == 4
    assert installed(done.stdout.splitlines()[-1]) >= LACKING
    assert "next step: pytest-microvm setup --yes, or run the commands above" in done.stderr
    assert computer.calls() == []


@pytest.mark.parametrize(
    ("answer", "status", "calls"),
    [(b"y\n", 0, 2), (b"YES\n", 0, 2), (b"n\n", 1, 0), (b"\n", 1, 0), (b"what\n", 1, 0), (b"\x04", 1, 0)],
)
def test_setup_asks_on_a_terminal(computer, answer, status, calls):
    computer.add("sudo", 'exec "$@"')
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        done = computer.setup(stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == status, done.stderr
    assert "Run these commands now? [y/N] " in done.stdout
    assert ("nothing was installed" in done.stdout) == (status == 1)
    assert sum(call.startswith("apt-get") for call in computer.calls()) == calls


@pytest.mark.parametrize(("failing", "calls"), [("update", 1), ("install", 2)])
def test_failed_apt_get_is_an_error(computer, failing, calls):
    computer.add("sudo", 'exec "$@"')
    computer.add("apt-get", f"[ $1 != {failing} ] || {{ echo 'E: no network' >&2; exit 100; }}")
    done = computer.setup("--yes")
    assert done.returncode == 1
    message = f"pytest-microvm: apt-get {failing} failed (exit code 100)\nnext step: read its messages above"
    assert f"E: no network\n{message}" in done.stderr
    assert sum(call.startswith("apt-get") for call in computer.calls()) == calls


def test_programs_still_missing_after_the_installation_are_an_error(computer):
    computer.add("sudo", 'exec "$@"')
    computer.add("apt-get", "")
    done = computer.setup("--yes")
    assert done.returncode == 1
    assert "programs are still missing" in done.stderr
    assert f"missing: {QEMU} (Debian package {QEMU_PACKAGE}), to run machines" in done.stderr


@pytest.mark.parametrize("words", [[], ["--yes"], ["--dry-run"]], ids=["", "yes", "dry-run"])
def test_another_distribution_gets_the_names_only(computer, words):
    (computer.bin / "apt-get").unlink()
    done = computer.setup(*words)
    assert done.returncode == 1
    assert "without apt-get (Debian, Ubuntu) setup cannot install them" in done.stderr
    assert f"missing: {QEMU} (Debian package {QEMU_PACKAGE}), to run machines" in done.stderr


def test_nothing_of_the_current_folder_is_run(computer, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("apt-get", "sudo", "env", *PROVIDED):
        (project / name).write_text(f"#!/bin/sh\necho {name} >>ran\n")
        (project / name).chmod(0o755)
    computer.add("sudo", 'exec "$@"')
    path = f".:{computer.bin}::"
    done = computer.setup("--yes", cwd=project, env={**computer.environment, "PATH": path})
    assert done.returncode == 0, done.stderr
    assert not (project / "ran").exists()
    assert installed(computer.calls()[-1]) >= LACKING


@pytest.mark.usefixtures("ordinary_user")
def test_ordinary_users_install_with_sudo(computer, capfd):
    computer.add("sudo", 'exec "$@"')
    assert main(["setup", "--dry-run"]) == 1
    shown = capfd.readouterr().out.splitlines()
    assert shown[-2] == "  sudo apt-get update"
    assert shown[-1].startswith("  sudo env DEBIAN_FRONTEND=noninteractive apt-get install --yes ")
    assert installed(shown[-1]) >= LACKING | {"uidmap"}
    assert main(["setup", "--yes"]) == 0
    first, second, third, _fourth = computer.calls()
    assert (first, second) == ("sudo apt-get update", "apt-get update")
    assert third.startswith("sudo env DEBIAN_FRONTEND=noninteractive apt-get install --yes ")


@pytest.mark.usefixtures("ordinary_user")
def test_without_sudo_the_commands_are_for_root(computer, capfd):
    assert main(["setup", "--yes"]) == 1
    assert "next step: run the commands above as root, without sudo" in capfd.readouterr().err
    assert computer.calls() == []


def test_an_interrupt_does_not_cut_apt_get_off(computer, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    computer.add("sudo", 'exec "$@"')
    computer.add("apt-get", f"echo works; read _ <{gate}; echo ended >>{computer.log}")
    command = [*MICROVM, "setup", "--yes"]
    with (
        gate.open("r+b", buffering=0) as opening,
        subprocess.Popen(command, env=computer.environment, stdout=subprocess.PIPE, text=True) as running,
    ):
        assert "works\n" in running.stdout
        stat = Path(f"/proc/{running.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            pass  # until it waits for apt-get
        running.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(1)
        opening.write(b"go on\n")
        assert running.wait(guards.SUITE) == 130
    assert computer.calls()[-1] == "ended"
    assert not any("install" in call for call in computer.calls())


@pytest.mark.parametrize("bubblewrap", ["", "1"])
def test_scripts_find_the_same_packages(computer, bubblewrap):
    for name in ("uname", "id"):
        (computer.bin / name).symlink_to(shutil.which(name))
    computer.environment["PYTEST_MICROVM_BWRAP"] = bubblewrap
    script = f". {REPOSITORY / 'ci' / 'packages.sh'}; missing_packages"
    done = computer.run(shutil.which("bash"), "-euc", script)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert set(found) == installed(computer.setup("--dry-run").stdout.splitlines()[-1])
    assert len(set(found)) == len(found)
    assert ("bubblewrap" in found) == bool(bubblewrap)


# One error


def assert_names_everything(text):
    """Check that an error names all missing programs and packages, and one next step."""
    for name in (QEMU, "setpriv, prlimit", "mmdebstrap", "mksquashfs, unsquashfs", *LACKING):
        assert name in text
    assert text.rstrip().endswith("next step: pytest-microvm setup")
    assert text.count("next step") == 1


def test_pytest_names_all_missing_programs_at_once(computer, tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    done = computer.run(*PYTEST, "--microvm", cwd=tmp_path)
    assert done.returncode == 4
    assert_names_everything(done.stderr)
    assert done.stderr.startswith(f"ERROR: machines cannot run: {QEMU}, setpriv, prlimit not found\n")


def test_run_names_all_missing_programs_at_once(computer):
    done = computer.run(*MICROVM, "run", "--", "true")
    assert done.returncode == 75
    assert_names_everything(done.stderr)


def test_image_build_names_all_missing_programs_at_once(computer):
    done = computer.run(*MICROVM, "image", "build", "base")
    assert done.returncode == 1
    assert (
        "pytest-microvm: images cannot be built: mmdebstrap, mksquashfs, unsquashfs not found" in done.stderr
    )
    assert_names_everything(done.stderr)


def test_missing_qemu_is_noticed_before_an_image_is_built(monkeypatch, tmp_path):
    for name in PROVIDED[1:]:
        (tmp_path / name).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    host = Host(cache=tmp_path / "cache")
    with pytest.raises(HypervisorMissing, match=f"machines cannot run: {QEMU} not found") as caught:
        host.base(MachineSpec())
    assert caught.value.details == f"missing: {QEMU} (Debian package {QEMU_PACKAGE}), to run machines"


def test_qemu_for_another_architecture_has_its_own_next_step(monkeypatch, tmp_path):
    [other] = set(PROGRAMS) - {host_architecture()}
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(needed, "_SYSTEM_FOLDERS", str(tmp_path))
    with pytest.raises(HypervisorMissing, match=f"{PROGRAMS[other]} not found") as caught:
        Qemu(other, tmp_path)
    package = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}[other]
    assert caught.value.resolution == f"pytest-microvm setup and apt-get install {package}"
