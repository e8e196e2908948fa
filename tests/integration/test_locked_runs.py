"""``--locked`` with real machines: the locked images start, others do not."""

import json
import subprocess

import pytest

from pytest_microvm.images.lock_file import FILE
from support import guards
from support.commands import MICROVM, PYTEST

CONFIGURATION = '[tool.pytest-microvm]\nimage = "python"\nlocked = true\n'
COMMANDS = {
    "suite": [*PYTEST, "-q", "--microvm"],
    "run": [*MICROVM, "run", "--image", "python", "--locked", "--", "python3", "-c", "print('1 passed')"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locked")
    (folder / "pyproject.toml").write_text(CONFIGURATION)
    (folder / "test_a.py").write_text("def test_a():\n    pass\n")
    done = started([*MICROVM, "lock"], folder)
    assert done.returncode == 0, done.stderr
    return folder


def started(command, folder):
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=guards.MACHINE, check=False
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_locked_image_starts(project, name):
    done = started(COMMANDS[name], project)
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_other_package_version_starts_nothing(project, name):
    text = (project / FILE).read_text()
    content = json.loads(text)
    (pins,) = content["images"]["python"].values()
    assert len(pins["installed"]) > 50
    version, pins["installed"]["dpkg"] = pins["installed"]["dpkg"], "0"
    try:
        (project / FILE).write_text(json.dumps(content))
        done = started(COMMANDS[name], project)
    finally:
        (project / FILE).write_text(text)
    assert done.returncode == 4
    assert f'installed.dpkg: locked "0", now "{version}"' in done.stderr + done.stdout
    assert "passed" not in done.stdout
