"""Suites in real machines that write in the workspace, are debugged at a terminal, or end in one machine."""

import os
import socket
import subprocess
import textwrap
import time

import pytest

from support import guards
from support.commands import PYTEST
from support.debugging import SUITE, debug
from support.terminal import OnTerminal

IN_THE_IMAGE = [*PYTEST, "--microvm", "--microvm-python=image"]


@pytest.fixture
def project(tmp_path):
    def write(**files):
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return tmp_path

    return write


def run(folder, *options):
    return subprocess.run(
        [*IN_THE_IMAGE, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=guards.SUITE,
    )


def test_files_of_one_machine_reach_the_next_and_the_host(project):
    folder = project(
        conftest="""
            from pathlib import Path

            def pytest_sessionfinish():
                Path("end.txt").write_text("written at the end")
        """,
        test_it="""
            from pathlib import Path
            import pytest

            COUNT = Path("data/count.txt")

            @pytest.mark.parametrize("number", range(3))
            def test_counts(number):
                COUNT.parent.mkdir(exist_ok=True)
                before = COUNT.read_text() if COUNT.exists() else ""
                assert before == "x" * number
                COUNT.write_text(before + "x")
                Path("left.py").write_text("")
                Path("old.txt").unlink(missing_ok=True)
        """,
    )
    (folder / "old.txt").write_text("old")
    done = run(folder, "--microvm-write-back=*.txt")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "data" / "count.txt").read_text() == "xxx"
    assert (folder / "end.txt").read_text() == "written at the end"
    assert not (folder / "old.txt").exists()
    assert not (folder / "left.py").exists()
    assert "microvm: written by tests: 2 files (" in done.stdout
    assert "gone with their machines: 1 file (left.py)" in done.stdout


def test_one_machine_ends_the_session_it_has_run(project):
    folder = project(
        conftest="""
            seen = []

            def pytest_runtest_logreport(report):
                if report.when == "call":
                    seen.append(report.outcome)

            def pytest_terminal_summary(terminalreporter, config):
                terminalreporter.line(f"seen {seen}, worker {hasattr(config, 'workerinput')}")

            def pytest_testnodedown(node):
                raise AssertionError("there are no nodes")
        """,
        test_it="""
            def test_one(): pass
            def test_two(): assert 0
        """,
    )
    done = run(folder, "--microvm-isolation=session")
    assert done.returncode == 1
    assert "seen ['passed', 'failed'], worker False\n" in done.stdout
    assert "2 tests in 1 machine" in done.stdout


def test_debugger_at_a_terminal(project):
    folder = project(test_it=SUITE)
    with OnTerminal([*IN_THE_IMAGE, "--pdb"], cwd=folder) as terminal:
        debug(terminal)


def test_failing_examples_of_hypothesis_are_tried_first_the_next_time(project):
    """They come back into a folder that git ignores, and are given to the next run's machines."""
    folder = project(
        test_it="""
            from hypothesis import given, strategies

            tried = []

            @given(strategies.integers(min_value=0, max_value=10**9))
            def test_small(number):
                tried.append(number)
                assert number < 1000, tried[0]
        """
    )
    subprocess.run(["git", "init", "-q", folder], check=True)
    command = [*PYTEST, "--microvm", "--tb=short"]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}  # else it keeps none
    for first in (0, 1000):
        done = subprocess.run(
            command, cwd=folder, env=environment,
            capture_output=True, text=True, check=False, timeout=guards.SUITE,
        )  # fmt: skip
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"E   AssertionError: {first}\n" in done.stdout
        assert "written by tests" not in done.stdout
    examples = [path for path in folder.glob(".hypothesis/examples/*/*") if path.is_file()]
    assert examples
    status = ["git", "-C", folder, "status", "--porcelain", "--untracked-files=all"]
    left = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    assert ".hypothesis" not in left


def test_a_debugger_listens_on_a_port_of_each_machine(project):
    """A client of this computer's port reaches the test that runs, one after the other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = project(
        test_it=f"""
            import socket
            import pytest

            @pytest.mark.parametrize("number", [1, 2])
            def test_waits(number):
                with socket.create_server(("127.0.0.1", {port})) as server:
                    client, _address = server.accept()
                    with client:
                        client.sendall(b"test %d" % number)
        """
    )
    command = [*IN_THE_IMAGE, f"--microvm-debug-port={port}", "-q"]
    heard = []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=guards.SUITE) as client:
                    heard.append(client.recv(100).decode())
            except OSError:
                heard.append("")
            time.sleep(0.1)
        assert process.returncode == 0, process.stdout.read()
    assert [text for text in heard if text] == ["test 1", "test 2"]


def test_a_debug_port_leads_to_one_machine(project):
    done = run(project(test_it="def test_it(): pass"), "--microvm-debug-port=5678", "-n2")
    assert done.returncode == 4
    assert "the debug port leads to one machine, but -n runs several at once" in done.stderr


def test_temporary_folders_of_failed_tests_come_back(project, tmp_path):
    """Of forks with a fixture that stands, by their machines' archives."""
    folder = project(
        conftest="""
            import pytest

            @pytest.fixture(scope="session")
            def data(tmp_path_factory):
                folder = tmp_path_factory.mktemp("data")
                (folder / "data.txt").write_text("set up once")
                return folder
        """,
        test_it="""
            import os

            def test_passes(tmp_path, data):
                (tmp_path / "a.txt").write_text("passed")

            def test_fails(tmp_path, data):
                (tmp_path / "sub").mkdir()
                (tmp_path / "sub" / "a.txt").write_text("failed")
                (tmp_path / "a.txt").symlink_to("sub/a.txt")
                (tmp_path / "out").symlink_to("/etc/passwd")
                os.mkfifo(tmp_path / "pipe")
                (data / "own.txt").write_text("of this fork")
                assert not list(data.parent.glob("test_passes*"))
                assert 0
        """,
    )
    base = tmp_path / "kept"
    (base / "old").mkdir(parents=True)
    done = run(folder, "--microvm-keep-tmp", f"--basetemp={base}", "--microvm-fixtures=fork")
    assert done.returncode == 1
    assert f"microvm: kept tmp_path of 1 failed test in {base}\n" in done.stdout, done.stdout + done.stderr
    assert "test_fails0/out: a link that may lead out; test_fails0/pipe: neither a file" in done.stdout
    assert "written by tests" not in done.stdout
    found = {str(path.relative_to(base)): path.read_text() for path in base.rglob("*.txt")}
    assert found == {
        "data0/data.txt": "set up once",
        "data0/own.txt": "of this fork",
        "test_fails0/a.txt": "failed",
        "test_fails0/sub/a.txt": "failed",
    }


def test_files_come_back_to_the_places_outside_that_the_user_names(project, tmp_path):
    """As those of a plug-in that writes them while tests run, and of one that does at the end."""
    folder = project(
        conftest="""
            from pathlib import Path
            import pytest

            def pytest_addoption(parser):
                parser.addoption("--alluredir")
                parser.addoption("--benchmark-json", type=lambda path: open(path, "w"))

            @pytest.fixture(autouse=True)
            def result(request):
                yield
                Path(request.config.option.alluredir, f"{request.node.name}.json").write_text("{}")

            def pytest_sessionfinish(session):
                if not hasattr(session.config, "workerinput"):
                    session.config.option.benchmark_json.write("[]")
                    session.config.option.benchmark_json.close()
                Path(session.config.option.alluredir, "../beside.json").write_text("{}")
        """,
        test_it="""
            def test_one(): pass
            def test_two(): pass
        """,
    )
    reports = tmp_path.parent / f"{tmp_path.name}-reports"
    reports.mkdir()
    (reports / "b.json").write_text("old")
    done = run(folder, f"--alluredir=../{reports.name}/allure", f"--benchmark-json={reports}/b.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {str(path.relative_to(reports)): path.read_text() for path in reports.rglob("*.json")}
    assert found == {"allure/test_one.json": "{}", "allure/test_two.json": "{}", "b.json": "[]"}
