"""The environment that runs these tests, mirrored into machines: suites, fixtures, commands, CI jobs."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from junitparser import JUnitXml

from support import guards, repositories
from support.commands import MICROVM, PYTEST

ONLY_HERE = "hypothesis"  # a package of this environment that no image has


def run(folder, command, status=0):
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=guards.SUITE
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def project(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(textwrap.dedent(text))
        return tmp_path

    write("pytest.ini", "[pytest]\n")
    return write


SUITE = f"""
    import os, shutil, ssl, sqlite3, subprocess, sys
    import {ONLY_HERE}

    def test_same_python():
        assert sys.prefix == {sys.prefix!r}
        assert sys.base_prefix == {sys.base_prefix!r}
        assert sys.version == {sys.version!r}
        assert os.environ["PATH"].startswith(sys.prefix + "/bin:")
        assert {ONLY_HERE}.__file__ == {{}}

    def test_own_plugin_is_not_there():
        import importlib.util
        assert importlib.util.find_spec("pytest_microvm") is None

    def test_programs_of_the_environment():
        out = subprocess.check_output(["python", "-c", "import sys; print(sys.prefix)"], text=True)
        assert out == sys.prefix + "\\n"
        assert shutil.which("hypothesis") == sys.prefix + "/bin/hypothesis"

    def test_extensions_of_the_standard_library():
        assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
        assert ssl.create_default_context()

    def test_breaks_it():
        os.remove({ONLY_HERE}.__file__)
        os.remove(os.path.realpath(sys.executable))

    def test_next_machine_is_whole():
        assert os.path.exists({ONLY_HERE}.__file__)
        assert os.path.exists(os.path.realpath(sys.executable))
"""


def suite():
    return SUITE.replace("{}", repr(__import__(ONLY_HERE).__file__))


@pytest.mark.parametrize("launcher", [False, True])
def test_suite_runs_in_the_environment_that_runs_pytest(project, launcher):
    folder = project("test_here.py", suite())
    command = [*MICROVM, "test", "--"] if launcher else [*PYTEST, "--microvm"]
    told = run(folder, [*command, "--junitxml=junit.xml"] if not launcher else command)
    assert f"python {Path(sys.prefix).name} (CPython " in told
    assert "mirrored from this computer" in told
    assert "6 passed" in told
    assert Path(__import__(ONLY_HERE).__file__).is_file()
    if not launcher:
        properties = JUnitXml.fromfile(str(folder / "junit.xml"))
        named = {p.name: p.value for s in properties for p in s.properties()}
        assert "CPython" in named["microvm.python"]


def test_image_python_is_said_to_lack_what_this_one_has(project):
    folder = project("test_here.py", f"import {ONLY_HERE}, not_anywhere\ndef test_a(): pass\n")
    told = run(folder, [*PYTEST, "--microvm", "--microvm-python=image"], status=2)
    assert f"microvm: missing in the machine: {ONLY_HERE}\n" in told
    assert "microvm: its Python is that of image python, without this computer's packages\n" in told
    assert "microvm: next step: --microvm-python=host mirrors the environment" in told
    told = run(folder, [*PYTEST, "--microvm"], status=2)
    assert "No module named 'not_anywhere'" in told
    assert "missing in the machine" not in told  # it is missing here as well


def test_option_of_a_plugin_that_the_image_lacks(project):
    folder = project("test_here.py", "def test_a(): pass\n")
    asked = [*PYTEST, "--microvm", "--microvm-args=--frobnicate"]
    told = run(folder, [*asked, "--microvm-python=image"], status=4)
    assert "unrecognized arguments: --frobnicate" in told
    assert "next step: --microvm-python=host mirrors" in told
    assert "next step" not in run(folder, asked, status=4)


def test_configuration_with_an_image_uses_its_python(project):
    folder = project("test_here.py", 'import sys\ndef test_a(): assert sys.prefix == "/usr"\n')
    project("pyproject.toml", '[tool.pytest-microvm]\nimage = "python"\n')
    assert "mirrored" not in run(folder, [*PYTEST, "--microvm"])
    project("pyproject.toml", '[tool.pytest-microvm]\npython = "image"\n')
    assert "mirrored" not in run(folder, [*PYTEST, "--microvm"])


def test_fixture_and_command_mirror_it_on_request(project):
    folder = project(
        "test_there.py",
        f"""
        import pytest

        @pytest.mark.microvm(python="host")
        def test_a(microvm):
            out = microvm.run(["python", "-c", "import {ONLY_HERE}, sys; print(sys.prefix)"]).stdout
            assert out == {sys.prefix + chr(10)!r}
        """,
    )
    assert "1 passed" in run(folder, [*PYTEST])
    code = f"import {ONLY_HERE}, sys; print('prefix', sys.prefix)"
    told = run(folder, [*MICROVM, "run", "--python", "host", "--", "python", "-c", code])
    assert f"prefix {sys.prefix}\n" in told


@pytest.mark.thorough
def test_ci_job_of_a_work_tree_mirrors_it(project):
    folder = project(
        "microvm.toml",
        f"""
        [ci.jobs.test]
        python = "host"
        steps = ["python -c 'import {ONLY_HERE}, sys; print(\\"prefix\\", sys.prefix)'"]
        """,
    )
    repositories.git(folder, "init", "-q", "-b", "main")
    repositories.git(folder, "add", "-A")
    repositories.git(folder, "commit", "-q", "-m", "a job")
    told = run(folder, [*MICROVM, "ci", "run", "--worktree"])
    assert f"prefix {sys.prefix}" in told


def test_virtual_environment_in_the_workspace_is_not_copied_twice(project, tmp_path):
    """A new environment: its Python is this one's base, its packages come by a .pth file from here."""
    prefix = tmp_path / "env"
    run(tmp_path, [sys.executable, "-m", "venv", "--without-pip", str(prefix)])
    site = next((prefix / "lib").glob("python3*")) / "site-packages"
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "here.pth").write_text(f"{here}\nimport site; site.addsitedir({here!r})\n")
    (site / "only_in_env.py").write_text("value = 42\n")
    folder = project(
        "test_here.py", "def test_a():\n    import only_in_env\n    assert only_in_env.value == 42\n"
    )
    told = run(folder, [str(prefix / "bin" / "python"), *PYTEST[1:], "--microvm"])
    assert "python env (CPython " in told
    assert f"editable sources outside the workspace are mirrored, too: {here}" in told
    assert "1 passed" in told
    assert not os.path.lexists(folder / "only_in_env.py")


def test_coverage_of_machines_is_the_native_one(project):
    project(
        "part.py",
        "def half(number):\n    if number % 2:\n        raise ValueError(number)\n    return number // 2\n",
    )
    project(
        "test_part.py",
        "import part\ndef test_half(): assert part.half(4) == 2\ndef test_more(): part.half(2)\n",
    )
    folder = project(".coveragerc", "[run]\nbranch = true\n")
    options = ["--cov=part", "--cov-report=json", "--cov-fail-under=90"]
    native = run(folder, [*PYTEST, *options], status=1)
    expected = json.loads((folder / "coverage.json").read_text())
    (folder / "coverage.json").unlink()
    told = run(folder, [*PYTEST, "--microvm", *options], status=1)
    found = json.loads((folder / "coverage.json").read_text())
    assert found["files"] == expected["files"]
    assert found["totals"] == expected["totals"]
    (message,) = [line for line in native.splitlines() if line.startswith("ERROR: Coverage failure")]
    assert message in told.splitlines()


@pytest.mark.thorough
def test_coverage_run_with_machines_is_the_native_one(project):
    """Its modules, contexts and a child process; pytest-cov is installed and loads coverage early, too."""
    project("part.py", "def half(number):\n    if number % 2:\n        return None\n    return number // 2\n")
    project("conftest.py", "import part\ndef pytest_sessionfinish(): part.half(6)\n")
    project(
        "test_part.py",
        "import subprocess, sys\nimport part\n\n"
        "def test_half(): assert part.half(4) == 2\n\n"
        "def test_child():\n    code = 'import part; part.half(3)'\n"
        "    subprocess.run([sys.executable, '-c', code], check=True)\n",
    )
    folder = project(
        ".coveragerc",
        "[run]\nbranch = true\nsource = .\npatch = subprocess\ndynamic_context = test_function\n"
        "[json]\nshow_contexts = true\n",
    )
    found = []
    for options in ([], ["--microvm"]):
        told = run(folder, [sys.executable, "-m", "coverage", "run", *PYTEST[1:], *options])
        assert "microvm: coverage" not in told
        run(folder, [sys.executable, "-m", "coverage", "combine", "-q"])
        run(folder, [sys.executable, "-m", "coverage", "json", "-q"])
        report = json.loads((folder / "coverage.json").read_text())
        found.append((report["files"], report["totals"]))
        (folder / ".coverage").unlink()
    assert found[0] == found[1]
    assert found[1][0]["part.py"]["executed_lines"] == [1, 2, 3, 4]
