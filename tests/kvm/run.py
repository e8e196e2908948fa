"""Run the tests for which KVM matters: ``python tests/kvm/run.py [ARGUMENTS FOR PYTEST]``.

Where KVM works, they run here. Elsewhere they run in a machine with an emulated one: under TCG an x86 CPU has
AMD's SVM, so the machine's kernel loads kvm_amd, and QEMU in it starts machines of its own. That is slow, but
it is KVM's own path: the probe, the command line, checkpoints, clones, clocks and quotas.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pytest_microvm.host.host import Host
from pytest_microvm.images.store import cache_root

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
IMAGES = ("base", "python", "agent")
"""The images that the tests use; they come into the machine as files, since nothing is built there."""

TESTS = (
    "tests/contract",
    "tests/faults/test_boot_trials.py",
    "tests/faults/test_ends.py",
    "tests/integration/test_machines.py",
    "tests/integration/test_templates.py",
    "tests/integration/test_isolation.py",
    "tests/integration/test_containment.py",
    "tests/integration/test_network_ports.py",
    "tests/integration/test_forks.py",
    "tests/integration/test_suites.py",
)
DEFAULT = ["-m", "not thorough", "--durations=30", *TESTS]
NOT_EMULATED = ("tests/integration/test_isolation.py::test_fw_cfg_holds_no_host_information",)
"""A program that uses I/O ports itself (iopl(2)) dies of SIGSEGV where SVM is emulated (QEMU 7.2)."""

CPUS, MEMORY, DISK, SECONDS = 1, "8G", "16G", 5400
"""One vCPU: with two the machine's kernel panicked in KVM after 9 minutes, on a breakpoint with which Linux
replaces its own code while another CPU runs (QEMU 7.2, kernel 6.12)."""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nested", action="store_true", help="in a machine, even if KVM works here")
    parser.epilog = f"Without arguments for pytest: {' '.join(DEFAULT)}"
    options, arguments = parser.parse_known_args()
    arguments = arguments or DEFAULT
    if not options.nested and accelerator() == "kvm":
        command = [sys.executable, "-m", "pytest", "--require-kvm", *arguments]
        return subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    with tempfile.TemporaryDirectory(prefix="microvm-kvm-") as folder:
        return in_a_machine(Path(folder), [*arguments, *(f"--deselect={test}" for test in NOT_EMULATED)])


def accelerator():
    """Return the accelerator that works here."""
    host = Host(say=print)
    try:
        found = host.accelerator(host.images.get("base", progress=print))
    finally:
        host.close()
    print(f"accelerator {found.name}: {found.reason}", flush=True)
    return found.name


def in_a_machine(folder, arguments):
    """Run pytest in a machine that starts machines of its own; return the exit status."""
    source, wheels, images = folder / "source", folder / "wheels", folder / "images"
    copy_sources(source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, source]
    subprocess.run(build, check=True)
    export_images(images)
    command = [
        Path(sys.executable).with_name("pytest-microvm"), "run",
        "--image", HERE / "nested", "--python", "host", "--nested",
        "--cpus", str(CPUS), "--memory", MEMORY, "--disk", DISK, "--timeout", str(SECONDS), "--output", "1G",
        "--push", f"{source}:/root/source", "--push", f"{wheels}:/root/wheels",
        "--push", f"{images}:/root/cache/images",
        "--env", "PYTEST_MICROVM_CACHE=/root/cache",
        "--workdir", "/root/source", "--",
        "bash", "tests/kvm/inside.sh", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, cwd=REPOSITORY, check=False).returncode


def copy_sources(target):
    """Copy the checkout without what git ignores; changes that are not committed are in it."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.check_output(listed, cwd=REPOSITORY).decode().split("\0"):
        found = REPOSITORY / name
        if name and found.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(found, target / name)


def export_images(target):
    """Copy the images of this computer's cache that the tests use, with what finds them."""
    host = Host(say=print)
    try:
        found = [host.images.get(name, progress=print) for name in IMAGES]
    finally:
        host.close()
    for name in ("names", "manifests", "artifacts"):
        shutil.copytree(cache_root() / "images" / name, target / name)
    for path in {path for image in found for path in image.files().values()}:
        copy = target / path.relative_to(cache_root() / "images")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)


if __name__ == "__main__":
    sys.exit(main())
