"""An environment that tox made on this computer, mirrored into a machine: real tox; no machine is started."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from support import guards
from support.wheels import write_wheel

# Tox with an object in place of the machines: it prints what would be mirrored, and ends the environment.
WITHOUT_MACHINES = """
import sys
from types import SimpleNamespace
from tox.run import run
from pytest_microvm.images.mirror.selection import select
from pytest_microvm.tox import guest

class NoMachine:
    def __init__(self, settings, *, project, made, environment, say):
        self.machine = self.workspace = None
        if settings.spec.python == "host":
            print("mirrored", environment().prefix, *select(environment()).entries, sep="\\n")

    def step(self, kind, *_plan, **_inputs):
        return SimpleNamespace(kind=kind)

    def make(self, steps):
        print("steps:", [step.kind for step in steps], flush=True)
        raise SystemExit(3)

    def close(self):
        pass

guest.ToxGuest = NoMachine
run(sys.argv[1:])
"""
ONE, TWO = "one-1.0-py3-none-any.whl", "two-1.0-py3-none-any.whl"
REACHED = 3  # the exit status of an environment for which a machine would have been started


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("PYTEST_MICROVM_TRUST", raising=False)


def run(folder, program, *words):
    done = subprocess.run(
        [sys.executable, *program, "run", *words],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "PIP_NO_INDEX": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=guards.SUITE,
        check=False,
    )
    assert "Traceback (most" not in done.stdout, done.stdout
    return done


def native(folder, *words):
    done = run(folder, ["-m", "tox"], *words)
    assert done.returncode == 0, done.stdout


def mirrored(folder, *words, status=REACHED):
    done = run(folder, ["-c", WITHOUT_MACHINES], "--microvm", *words)
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with the environment ``py``, as tox made it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "requirements.txt").write_text(f"./{ONE}\n")
    (folder / "constraints.txt").write_text("# none\n")
    assert [write_wheel(folder, name) for name in ("one", "two")] == [ONE, TWO]
    configure(folder)
    native(folder, "-e", "py")
    return folder


def configure(folder, more=""):
    (folder / "tox.ini").write_text(
        textwrap.dedent("""\
        [tox]
        no_package = true
        [testenv:other]
        [testenv]
        microvm_python = host
        deps =
            -r requirements.txt
            -c constraints.txt
        commands = python -c "import one"
        """)
        + more
    )


@pytest.fixture
def project(made):
    """The project with its environment; what a test changes in it is put back."""
    kept = [*made.glob("[a-z]*.*"), made / ".tox/py/.tox-info.json", made / ".tox/py/pyvenv.cfg"]
    content = {path: path.read_bytes() for path in kept}
    yield made
    for path, data in content.items():
        path.unlink(missing_ok=True)
        path.write_bytes(data)
    (made / "pyproject.toml").unlink(missing_ok=True)


def snapshot(folder):
    return {str(path): path.lstat().st_mtime_ns for path in (folder / ".tox" / "py").rglob("*")}


def test_environment_is_mirrored_and_not_changed(project):
    before = snapshot(project)
    told = mirrored(project, "-e", "py").splitlines()
    assert "steps: []" in told
    start = told.index("mirrored")
    prefix = project / ".tox" / "py"
    assert told[start + 1] == str(prefix)
    files = set(told[start + 2 :])
    library = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}"
    assert {f"{prefix}/{library}/site-packages/one.py", f"{prefix}/bin/python"} <= files
    assert {f"{sys.base_prefix}/{library}/os.py", os.path.realpath(sys.executable)} <= files
    assert not [name for name in files if name.startswith((f"{prefix}/log", f"{prefix}/.tox-info"))]
    assert snapshot(project) == before


def test_recreate_leaves_the_environment_alone(project):
    before = snapshot(project)
    told = mirrored(project, "-e", "py", "-r")
    assert f"-r does not make {project}/.tox/py again; next step: tox -r without --microvm" in told
    assert snapshot(project) == before


def test_paths_in_the_configuration_are_those_of_the_environment(project):
    keys = ["env_dir", "env_bin_dir", "env_python", "env_log_dir"]
    words = ["--microvm", "-e", "py", "-k", *keys]
    done = subprocess.run(
        [sys.executable, "-m", "tox", "config", *words],
        cwd=project,
        capture_output=True,
        text=True,
        check=True,
    )
    prefix = project / ".tox" / "py"
    assert (
        f"env_dir = {prefix}\nenv_bin_dir = {prefix}/bin\nenv_python = {prefix}/bin/python\n" in done.stdout
    )
    assert f"env_log_dir = {project}/.tox/.microvm/py/log" in done.stdout


def test_missing_environment_names_the_next_step(project):
    told = mirrored(project, "-e", "other", status=1)
    assert f"env_dir is {project}/.tox/other, which does not exist" in told
    assert "next step: run `tox -e other` once without --microvm" in told
    assert not (project / ".tox" / "other").exists()
    configure(project, "runner = microvm\n")
    assert (
        "next step: run `tox -e other` once with runner = virtualenv"
        in run(project, ["-c", WITHOUT_MACHINES], "-e", "other").stdout
    )


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("requirements.txt", f"./{ONE}\n./{TWO}\n", "deps: now also ./two-"),
        ("requirements.txt", "", f"deps: no longer ./{ONE}"),
        ("constraints.txt", "one<1\n", "deps: now also -c one<1"),
        (".tox/py/.tox-info.json", "{}", "deps: now also ./one"),
        (".tox/py/pyvenv.cfg", "home = /x/bin\nversion = 3.99.1\n", "was made with Python 3.99.1 in /x/bin"),
    ],
    ids=range(5),
)  # fmt: skip
def test_environment_that_differs_from_the_configuration_is_stale(project, file, text, why):
    (project / file).write_text(text)
    told = mirrored(project, "-e", "py", status=1)
    assert why in told
    assert "next step: run `tox -e py` once without --microvm" in told


def test_recorded_environment_variables_of_pip_do_not_count(project):
    file = project / ".tox" / "py" / ".tox-info.json"
    record = json.loads(file.read_text())
    assert record["PythonRun"]["deps"]["env"] == {**record["PythonRun"]["deps"]["env"], "PIP_NO_INDEX": "1"}
    mirrored(project, "-e", "py")


def test_stale_environment_is_used_on_request(project):
    (project / "requirements.txt").write_text("")
    mirrored(project, "-e", "py", "--skip-env-install")


def test_other_python_than_configured_is_stale(project):
    told = mirrored(project, "-e", "py", "-x", "testenv:py.base_python=python3.6", status=1)
    assert "is stale: it has python3." in told


def test_packages_of_the_base_need_trust(project, monkeypatch):
    asked = ["-x", "testenv:py.system_site_packages=true"]
    assert "is stale: system_site_packages has changed" in mirrored(project, "-e", "py", *asked, status=1)
    config = project / ".tox" / "py" / "pyvenv.cfg"
    config.write_text(config.read_text().replace("packages = false", "packages = true"))
    told = mirrored(project, "-e", "py", "--skip-env-install", status=1)
    assert "is stale: system_site_packages has changed" in told
    assert "nobody has allowed that" in mirrored(project, "-e", "py", *asked, status=1)
    monkeypatch.setenv("PYTEST_MICROVM_TRUST", "1")
    mirrored(project, "-e", "py", *asked)


def test_setup_commands_run_in_a_step(project):
    configure(project, "extra_setup_commands = python -V\n")
    assert "steps: ['tox-package']" in mirrored(project, "-e", "py")


def packaged(project, **recorded):
    """Give the project a package, and the environment a record of its dependencies."""
    (project / "pyproject.toml").write_text(
        '[project]\nname = "mine"\nversion = "1.0"\ndependencies = ["one>=1,<3"]\n'
        '[project.optional-dependencies]\nmore = ["two"]\n'
    )
    text = (project / "tox.ini").read_text().replace("no_package = true", "")
    (project / "tox.ini").write_text(text)
    file = project / ".tox" / "py" / ".tox-info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **recorded}))


RECORDED = {"RunToxEnv": {"package_deps": {"req": ["one<3,>=1"], "env": {}}}}


def test_installed_copy_of_the_package_is_named(project):
    packaged(project, **RECORDED)
    told = mirrored(project, "-e", "py")
    assert f"the project's package is the copy that tox installed in {project}/.tox/py" in told
    assert "next step: run `tox -e py` once without --microvm, or set package = editable" in told


def test_editable_package_comes_with_the_workspace(project):
    packaged(project, **RECORDED)
    pth = next((project / ".tox/py/lib").glob("python3*/site-packages")) / "mine.pth"
    pth.write_text(f"{project}\n")
    assert "the project's package" not in mirrored(project, "-e", "py", "--develop")
    pth.write_text(f"{Path.home()}\n")
    assert "the project's package" in mirrored(project, "-e", "py", "--develop")
    pth.unlink()


def test_dependencies_of_the_package_are_compared(project):
    packaged(project)
    told = mirrored(project, "-e", "py", status=1)
    assert "is stale: package_deps: now also one<3,>=1" in told
    packaged(project, **RECORDED)
    told = mirrored(project, "-e", "py", "-x", "testenv:py.extras=more", status=1)
    assert "is stale: package_deps: now also two" in told
    (project / "pyproject.toml").write_text('[project]\nname = "mine"\ndependencies = [3]\n')
    assert "pyproject.toml has invalid dependencies" in mirrored(project, "-e", "py", status=1)


@pytest.mark.parametrize("option", ["--pkg-only", f"--installpkg={ONE}"])
def test_package_of_the_command_line_is_refused(project, option):
    packaged(project, **RECORDED)
    assert "need the image's Python: microvm_python = image" in mirrored(
        project, "-e", "py", option, status=1
    )
