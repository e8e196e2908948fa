"""Forks in real machines: what runs at the checkpoint runs on in each fork, and nothing is shared."""

import subprocess
import textwrap

import pytest

from pytest_microvm.errors import MachineError, UsageError
from pytest_microvm.host.host import Host
from support import guards
from support.commands import PYTEST

SERVER = """
import socket
server = socket.create_server(("127.0.0.1", 5555))
served = 0
while True:
    connection, _ = server.accept()
    served += 1
    connection.sendall(str(served).encode())
    connection.close()
"""

ASK = "import socket; print(socket.create_connection(('127.0.0.1', 5555)).recv(9).decode())"


@pytest.fixture
def served(host):
    """A machine with a server, in which checkpoints may be taken."""
    with host.start(image="python", checkpoints=True) as vm:
        vm.path("/srv/server.py").write_text(SERVER)
        vm.path("/run/log").write_text("begun\n")
        vm.run("python3 /srv/server.py >/dev/null 2>&1 &", check=True)
        vm.network.wait_for(5555, guards.SUITE)
        yield vm


def asked(vm):
    """Ask the server, which counts."""
    return int(vm.run(["python3", "-c", ASK], check=True).stdout)


def test_a_server_runs_on_in_each_fork(served):
    before = asked(served)
    with served.checkpoint() as checkpoint, checkpoint.fork() as one, checkpoint.fork() as two:
        for fork in (one, two):
            assert asked(fork) == before + 1
            assert fork.path("/run/log").read_text() == "begun\n"
            fork.path("/run/log").write_text(fork.id)
        names = {machine.run(["hostname"]).stdout.strip() for machine in (served, one, two)}
        assert names == {served.id, one.id, two.id}
        drawn = {vm.run(["cat", "/proc/sys/kernel/random/uuid"]).stdout for vm in (served, one, two)}
        assert len(drawn) == 3
        assert (one.facts.fork_of, served.facts.fork_of) == (served.id, "")
    assert served.path("/run/log").read_text() == "begun\n"
    assert asked(served) == before + 1


def test_a_fork_outlives_its_checkpoint(served, host):
    checkpoint = served.checkpoint()
    served.path("/run/log").write_text("later")
    with checkpoint.fork() as fork:
        checkpoint.close()
        assert fork.path("/run/log").read_text() == "begun\n"
        with pytest.raises(UsageError, match="is closed"):
            checkpoint.fork()
        assert not fork.closed


def test_while_a_command_is_read(served):
    with served.popen(["sleep", "60"]) as process:
        with pytest.raises(MachineError, match="whose output is read"):
            served.checkpoint()
        process.kill()
        process.wait()
    served.checkpoint().close()


@pytest.mark.parametrize("options", [{}, {"checkpoints": True, "secrets": {"A": "env:HOME"}}])
def test_machines_without_checkpoints(host, options):
    with host.start(image="base", **options) as vm, pytest.raises(UsageError, match="checkpoints=True"):
        vm.checkpoint()


def test_nothing_is_left_by_a_host_that_ends():
    host = Host()
    vm = host.start(image="base", checkpoints=True)
    checkpoint = vm.checkpoint()
    left = [*host.templates._drafts]  # others beside it are other tests'
    host.close()
    assert len(left) == 2
    assert not [path for path in left if path.exists()]
    assert checkpoint.machine == vm.id


def suite(folder, conftest, test, *options):
    folder.joinpath("pytest.ini").write_text("[pytest]\n")
    folder.joinpath("conftest.py").write_text(textwrap.dedent(conftest))
    folder.joinpath("test_it.py").write_text(textwrap.dedent(test))
    return subprocess.run(
        [*PYTEST, *options], cwd=folder, capture_output=True, text=True, check=False, timeout=guards.SUITE
    )


def test_fixtures_of_a_host_side_suite(tmp_path):
    done = suite(
        tmp_path,
        """
        import pytest

        @pytest.fixture(scope="session")
        def base(microvm_session):
            microvm_session.path("/srv/data").write_text("1")
            return microvm_session.checkpoint()
        """,
        """
        import pytest

        @pytest.mark.parametrize("number", range(2))
        def test_changes(base, microvm_fork, number):
            vm = microvm_fork(base)
            assert vm.path("/srv/data").read_text() == "1"
            vm.path("/srv/data").write_text("2")

        def test_factory(microvm_factory):
            vm = microvm_factory(checkpoints=True, image="base")
            assert vm.checkpoint().fork().alive
        """,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_wide_fixtures_of_a_suite_in_machines(tmp_path):
    """Threads, processes, sockets and files of a fixture are there in every fork; entropy is new."""
    done = suite(
        tmp_path,
        f"""
        import ssl
        import subprocess
        import sys
        import threading
        import time
        import pytest

        @pytest.fixture(scope="session")
        def server(tmp_path_factory):
            ssl.RAND_bytes(8)
            folder = tmp_path_factory.mktemp("server")
            (folder / "kept").write_text("kept")
            process = subprocess.Popen([sys.executable, "-c", {SERVER!r}])
            ticks = []

            def tick():
                while True:
                    ticks.append(1)
                    time.sleep(0.01)

            threading.Thread(target=tick, daemon=True).start()
            yield folder, ticks
            process.kill()
            print("ended")
        """,
        """
        import random
        import socket
        import ssl
        import time
        import uuid
        import pytest

        @pytest.mark.parametrize("number", range(3))
        def test_it(server, number):
            folder, ticks = server
            for _ in range(600):
                try:
                    connection = socket.create_connection(("127.0.0.1", 5555))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.1)
            with connection:
                assert connection.recv(9) == b"1"
            assert (folder / "kept").read_text() == "kept"
            (folder / "kept").unlink()
            before = len(ticks)
            time.sleep(0.5)
            assert len(ticks) > before
            print("drawn", uuid.uuid4(), random.random())
            print("drawn by OpenSSL", ssl.RAND_bytes(8).hex())
            print("clock", time.time())
        """,
        "--microvm",
        "--microvm-python=image",
        "--microvm-fixtures=fork",
        "-rP",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len({line for line in lines if line.startswith("drawn")}) == 6
    clocks = [float(line.split()[1]) for line in lines if line.startswith("clock")]
    assert clocks == sorted(clocks)
    assert lines.count("ended") == 1
    assert "microvm: 3 tests in 3 machines (3 forks with fixtures that stood)" in done.stdout
