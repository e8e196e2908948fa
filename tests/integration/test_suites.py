"""``pytest --microvm`` over real machines: what stays off the host, outcomes, ``prepare``, kept machines."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from junitparser import JUnitXml, Properties

from support import guards
from support.commands import MICROVM, PYTEST
from support.strange_repositories import clone_with_embedded

MIXED = """
    import os, subprocess, warnings
    import pytest

    def test_passes(tmp_path):
        (tmp_path / "file").write_text("text")

    def test_fails():
        assert {"a": 1} == {"a": 2}

    @pytest.mark.skip(reason="not now")
    def test_is_skipped():
        pass

    @pytest.mark.xfail
    def test_fails_as_expected():
        assert False

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_numbers(number, once):
        assert once + number != 3

    class TestClass:
        def test_method(self, once):
            print("printed")
            assert once == 1
"""
FIXTURES = """
    import pytest

    @pytest.fixture(scope="module")
    def once():
        yield 1
"""


@pytest.fixture
def project(tmp_path):
    """A folder, with functions to write files and to run pytest in it."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    return Project(folder)


class Project:
    def __init__(self, folder):
        self.folder = folder

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def run(self, *arguments, status=0, **variables):
        environment = {**os.environ, **variables}
        done = subprocess.run(
            [*PYTEST, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=guards.SUITE,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def cases(self, report):
        """Return each test's outcome and properties."""
        found = {}
        for suite in JUnitXml.fromfile(str(self.folder / report)):
            for case in suite:
                kind = case.result[0]._tag if case.result else "passed"
                properties = {prop.name: prop.value for prop in case.child(Properties) or ()}
                found[case.name] = (kind, properties, case.result[0].text if case.result else "")
        return found


def test_same_outcomes_and_nothing_imported_on_the_host(project):
    mark = project.folder / "imported"
    note = f"open({str(mark)!r}, 'a').write('imported')\n"
    project.write("test_mixed.py", note + textwrap.dedent(MIXED))
    project.write("conftest.py", note + textwrap.dedent(FIXTURES))
    project.run("--microvm", "--junitxml=machines.xml", status=1)
    assert not mark.exists()
    project.run("--junitxml=native.xml", status=1)
    assert mark.exists()  # what was looked for does happen where the project is imported
    native, machines = project.cases("native.xml"), project.cases("machines.xml")
    assert {name: kind for name, (kind, _, _) in machines.items()} == {
        n: k for n, (k, _, _) in native.items()
    }
    assert len({properties["microvm.id"] for _, properties, _ in machines.values()}) == len(machines) == 8
    assert machines["test_fails"][2] == native["test_fails"][2]  # the traceback, with pytest's explanation


@pytest.mark.thorough  # tests/faults/test_suites.py has these ends and more
def test_every_way_a_machine_can_end(project):
    project.write(
        "test_ends.py",
        """
        import os, signal, subprocess, time

        def test_powers_the_machine_off():
            subprocess.run(["sh", "-c", "echo o > /proc/sysrq-trigger"])
            time.sleep(300)

        def test_panics_the_kernel():
            open("/proc/sysrq-trigger", "w").write("c")

        def test_kills_the_runner():
            os.kill(os.getpid(), signal.SIGKILL)

        def test_hangs():
            time.sleep(300)

        def test_is_not_affected():
            pass
        """,
    )
    out = project.run("--microvm", "--microvm-timeout=20", "--junitxml=report.xml", status=1)
    assert "4 failed, 1 passed" in out
    cases = project.cases("report.xml")
    outcomes = {name: properties["microvm.outcome"] for name, (_, properties, _) in cases.items()}
    assert outcomes == {
        "test_powers_the_machine_off": "crashed",
        "test_panics_the_kernel": "crashed",
        "test_kills_the_runner": "crashed",
        "test_hangs": "quota",
        "test_is_not_affected": "passed",
    }
    assert "panic" in cases["test_panics_the_kernel"][2]
    assert "timeout: limit 20 s" in cases["test_hangs"][2]


def test_output_is_shown_while_a_test_runs(project):
    """The last one never ends: what it has printed is shown nevertheless."""
    project.write(
        "test_live.py",
        r"""
        import os, subprocess, time
        import pytest

        @pytest.fixture(scope="session")
        def once():
            print("set up")
            yield

        def test_first(once):
            subprocess.run(["echo", "of a child"], check=True)
            print("\x1b[2J::error::safe")

        def test_second(once): print("in a fork")

        def test_crashes():
            print("last words", flush=True)
            os.abort()

        def test_waits():
            os.write(2, b"waiting")
            time.sleep(3600)
        """,
    )
    command = [*PYTEST, "--microvm", "-s", "-v", "--microvm-fixtures=fork"]
    with subprocess.Popen(
        command, cwd=project.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        shown = b""
        while b"waiting" not in shown:
            shown += run.stdout.read1()
            assert run.poll() is None, shown
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=guards.SUITE)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    lines = [
        line for line in shown.decode().splitlines() if line.strip() and not line.startswith("microvm: ")
    ]
    assert lines[lines.index("test_live.py::test_first set up") :] == [
        "test_live.py::test_first set up",
        "of a child",
        "\\x1b[2J::error::safe",
        "PASSED",
        "test_live.py::test_second in a fork",
        "PASSED",
        "test_live.py::test_crashes last words",
        "CRASHED",
        "test_live.py::test_waits waiting",
    ]


def test_prepare_runs_once_and_again_when_its_inputs_change(project):
    (project.folder / "pytest.ini").unlink()
    project.write(
        "pyproject.toml",
        """
        [tool.pytest-microvm]
        prepare = ["cp needed.txt /srv/prepared", "date +%s%N >> /srv/prepared"]
        prepare_inputs = ["needed.txt"]
        """,
    )
    project.write("needed.txt", "one\n")
    project.write("test_prepared.py", "def test_it():\n    print(open('/srv/prepared').read())\n")

    def prepared():
        out = project.run("--microvm", "-rP")
        return out[out.index("Captured stdout call") :].splitlines()[1:3]

    first = prepared()
    assert first[0] == "one"
    project.write("test_prepared.py", "def test_it():\n    print(open('/srv/prepared').read())  # edited\n")
    assert prepared() == first
    project.write("needed.txt", "two\n")
    second = prepared()
    assert second[0] == "two"
    assert second[1] != first[1]


def test_edited_test_file_does_not_restart_python(project):
    project.write(
        "test_it.py",
        """
        import os, sys

        def test_it(monkeypatch):
            assert sys.path[0] == os.environ["PWD"] == os.getcwd() == os.path.dirname(__file__)
            monkeypatch.syspath_prepend("lib")
            import helper
        """,
    )
    project.write("lib/helper.py", "")
    project.run("--microvm")
    project.write("test_it.py", (project.folder / "test_it.py").read_text() + "# edited\n")
    out = project.run("--microvm")
    assert "starting pytest" not in out
    assert "collecting" in out


@pytest.mark.thorough
def test_python_starts_once_after_prepare(project):
    """An editable installation: the folder of a plug-in is not there yet when Python starts."""
    (project.folder / "pytest.ini").unlink()
    project.write(
        "pyproject.toml",
        """
        [tool.pytest-microvm]
        prepare = ["sh install.sh"]
        prepare_inputs = ["install.sh"]
        """,
    )
    project.write(
        "install.sh",
        """
        site=$(python3 -c 'import site; print(site.getsitepackages()[0])')
        echo "$PWD/src" > "$site/editable.pth"
        mkdir "$site/plug-1.dist-info"
        printf 'Name: plug\nVersion: 1\n' > "$site/plug-1.dist-info/METADATA"
        printf '[pytest11]\nplug = plug\n' > "$site/plug-1.dist-info/entry_points.txt"
        """,
    )
    project.write("src/plug.py", "import pytest\n\n@pytest.fixture\ndef number():\n    return 1\n")
    project.write("test_it.py", "def test_it(number):\n    assert number == 1\n")
    out = project.run("--microvm")
    assert (out.count("preparing:"), out.count("starting pytest")) == (1, 1)
    project.write("src/plug.py", "import pytest\n\n@pytest.fixture\ndef number():\n    return 2\n")
    project.write("test_it.py", "def test_it(number):\n    assert number == 2\n")
    out = project.run("--microvm")
    assert "preparing:" not in out
    assert "starting pytest" not in out


def test_large_workspace_is_not_copied_again_for_other_arguments(project):
    project.write("test_it.py", "def test_it():\n    pass\n")
    (project.folder / "large").write_bytes(os.urandom(17 * 1024**2))
    assert "copying the workspace" in project.run("--microvm")
    out = project.run("--microvm", "--strict-markers")
    assert "copying the workspace" not in out
    assert "collecting" in out


def test_python_starts_in_the_workspace_for_relative_pythonpath(project):
    project.write("lib/sitecustomize.py", "import builtins\n\nbuiltins.began = True\n")
    project.write("lib/helper.py", "")
    project.write("test_it.py", "import helper\n\ndef test_it():\n    assert began\n")
    project.run("--microvm", PYTHONPATH="lib")


def test_a_failing_prepare_says_what_failed(project):
    (project.folder / "pytest.ini").unlink()
    project.write("pyproject.toml", '[tool.pytest-microvm]\nprepare = ["echo because >&2; exit 7"]\n')
    project.write("test_it.py", "def test_it():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "--microvm"]
    done = subprocess.run(
        command, cwd=project.folder, capture_output=True, text=True, check=False, timeout=guards.SUITE
    )
    said = done.stdout + done.stderr
    assert done.returncode not in {0, 1}
    assert "ended with status 7" in said
    assert "because" in said


def test_the_machine_of_a_failed_test_can_be_entered(project):
    project.write(
        "test_it.py", "def test_it():\n    open('/srv/trace', 'w').write('left')\n    assert False\n"
    )
    out = project.run("--microvm", "--microvm-keep=failed", status=1)

    def cli(*arguments):
        return subprocess.run(
            [*MICROVM, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        ).stdout

    kept = next(row for row in json.loads(cli("ps", "--json")) if row["about"] == "test_it.py::test_it")
    try:
        assert f"pytest-microvm shell {kept['id']}" in out
        assert cli("shell", kept["id"], "--", "cat", "/srv/trace") == "left"
        assert cli("shell", kept["id"], "--", "cat", "/srv/trace") == "left"
    finally:
        cli("rm", kept["id"])
    assert kept["id"] not in cli("ps")


def test_a_shared_machine_sets_module_fixtures_up_once(project):
    project.write("conftest.py", FIXTURES.replace("yield 1", "yield __import__('uuid').uuid4()"))
    project.write(
        "test_shared.py",
        """
        import pytest

        @pytest.mark.parametrize("number", [1, 2])
        def test_it(number, once, record_property):
            record_property("once", str(once))
        """,
    )
    project.run("--microvm", "--microvm-isolation=module", "--junitxml=shared.xml")
    project.run("--microvm", "--junitxml=apart.xml")
    shared = [properties["once"] for _, properties, _ in project.cases("shared.xml").values()]
    apart = [properties["once"] for _, properties, _ in project.cases("apart.xml").values()]
    assert len(set(shared)) == 1
    assert len(set(apart)) == 2


def test_a_folder_of_a_clone_that_is_a_repository_is_only_files(tmp_path):
    """Its configuration names a program, and its index a file behind a link that leads out of the clone."""
    program, mark = tmp_path / "program", tmp_path / "mark"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    test = """
        import os
        def test_it():
            assert os.path.islink("link") and os.path.isfile("HEAD")
            assert not os.path.exists("link/secret.txt")
        """
    files = {"sub/pytest.ini": "[pytest]\n", "sub/test_it.py": textwrap.dedent(test)}
    clone = clone_with_embedded(tmp_path, program, files)
    shown = Project(clone / "sub").run("--microvm")
    assert "1 passed" in shown
    assert not mark.exists()


def test_local_time_and_time_zones(project):
    project.write(
        "test_times.py",
        """
        import time, zoneinfo

        def test_local_time():
            assert time.localtime(0).tm_hour == 1

        def test_zones():
            assert zoneinfo.ZoneInfo("America/New_York").key == "America/New_York"
        """,
    )
    assert "2 passed" in project.run("--microvm", TZ="Europe/Berlin")
