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


def test_pytest_finds_the_plug_in(environment, tmp_path):
    assert "--microvm" in run(environment / "python", "-m", "pytest", "--help", cwd=tmp_path)


def test_the_kits_are_found_where_they_were_installed(environment, tmp_path):
    code = "from pytest_microvm.images.kits import shipped_kits; print(shipped_kits())"
    folder = Path(run(environment / "python", "-c", code, cwd=tmp_path).strip())
    assert folder.is_relative_to(environment.parent)
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in (REPOSITORY / "images").iterdir()
    }
