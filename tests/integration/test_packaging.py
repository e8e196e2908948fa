"""What people install: a wheel built from the source distribution, in an environment of its own."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*argv, cwd=None):
    done = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=REPOSITORY)
    [file] = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, sdist)
    [file] = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A folder of programs, with the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", wheel)
    return folder / "bin"


def tracked(folder):
    return set(filter(None, run("git", "ls-files", "-z", folder, cwd=REPOSITORY).split("\0")))


def test_the_wheel_holds_the_package_and_the_kits(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kits = {"pytest_microvm/_kits/" + name.removeprefix("images/") for name in tracked("images")}
    assert "pytest_microvm/_kits/python/kit.toml" in kits
    assert tracked("pytest_microvm") | kits <= held
    assert not {name for name in held if name.startswith(("tests/", "examples/"))}


def test_sdist_holds_tests_images_examples_and_ci_files(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "ci/setup.sh", "LICENSE", "README.md", "pyproject.toml"} <= held
    assert tracked("tests") | tracked("images") | tracked("examples") <= held
    assert tracked("ci") | tracked("github-action") | tracked(".github") <= held


def test_the_command_starts(environment):
    assert run(environment / "pytest-microvm", "--version").startswith("pytest-microvm ")


def test_a_computer_without_programs_gets_one_error_and_its_next_step(environment, tmp_path):
    project, programs = tmp_path / "project", tmp_path / "bin"
    project.mkdir()
    programs.mkdir()
    (project / "test_it.py").write_text("def test_it():\n    pass\n")

    def start(*command):
        variables = {"PATH": str(programs), "HOME": str(tmp_path)}
        return subprocess.run(
            command, cwd=project, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    done = start(environment / "pytest", "--microvm")
    assert done.returncode == 4, done.stdout + done.stderr
    for name in ("qemu-system-", "mmdebstrap", "mksquashfs"):
        assert name in done.stderr
    assert done.stderr.count("next step: ") == 1
    assert "\nnext step: pytest-microvm setup\n" in done.stderr

    (programs / "apt-get").write_text("#!/bin/sh\nexit 9\n")
    (programs / "apt-get").chmod(0o755)
    done = start(environment / "pytest-microvm", "setup", "--dry-run")
    assert done.returncode == 1, done.stdout + done.stderr
    command = done.stdout.splitlines()[-1]
    for name in ("apt-get install", "qemu-system-", "mmdebstrap", "squashfs-tools"):
        assert name in command


def test_pytest_finds_the_plug_in(environment, tmp_path):
    assert "--microvm" in run(environment / "python", "-m", "pytest", "--help", cwd=tmp_path)


def test_the_kits_are_found_where_they_were_installed(environment, tmp_path):
    code = "from pytest_microvm.images.kits import shipped_kits; print(shipped_kits())"
    folder = Path(run(environment / "python", "-c", code, cwd=tmp_path).strip())
    assert folder.is_relative_to(environment.parent)
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in (REPOSITORY / "images").iterdir()
    }
