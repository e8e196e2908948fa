"""Pure fixtures in real machines: the next run begins in machines in which they stand, processes included."""

import http.server
import json
import os
import re
import subprocess
import textwrap

import pytest

from support import guards
from support.commands import MICROVM, PYTEST
from support.local_servers import LocalServer

SERVER = """
    import socket
    import sys

    server = socket.create_server(("127.0.0.1", 5555))
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        connection.sendall(sys.argv[1].encode())
        connection.close()
"""

CONFTEST = """
    import ssl
    import subprocess
    import sys
    import warnings
    from pathlib import Path
    import pytest

    @pytest.fixture(scope="session")
    def server(tmp_path_factory):
        drawn = ssl.RAND_bytes(16).hex()
        (tmp_path_factory.mktemp("server") / "data").write_text(drawn)
        Path("made.txt").write_text(drawn)
        process = subprocess.Popen([sys.executable, "server.py", drawn], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\\n"
        print("set up", drawn)
        warnings.warn("the server warns")
        yield tmp_path_factory.getbasetemp() / "server0" / "data"
        process.kill()
        print("torn down", process.wait())
"""

TEST = """
    import socket
    import ssl
    import pytest

    @pytest.mark.parametrize("number", range(2))
    def test_it(server, number):
        drawn = server.read_text()
        with socket.create_connection(("127.0.0.1", 5555)) as connection:
            assert connection.recv(99).decode() == drawn
        server.unlink()
        print("found", drawn)
        print("own", ssl.RAND_bytes(16).hex())
"""


class Suite:
    """A project with a session fixture that starts a server."""

    def __init__(self, folder):
        self.folder = folder
        self.write("pytest.ini", "[pytest]\n")
        self.write("server.py", SERVER)
        self.write("conftest.py", CONFTEST)
        self.write("test_it.py", TEST)

    def write(self, name, text):
        (self.folder / name).write_text(textwrap.dedent(text))

    def run(self, *options, status=0, **variables):
        """Run it in machines with the image's Python; return what was printed."""
        command = [*PYTEST, "--microvm", "--microvm-python=image", "--microvm-pure-fixtures=server", "-rP"]
        done = subprocess.run(
            [*command, *options],
            cwd=self.folder,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=guards.SUITE,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def suite(tmp_path):
    return Suite(tmp_path)


def words(output, first):
    """Return the words behind ``first`` on the lines that begin with it."""
    return re.findall(rf"^{first} (\S+)$", output, re.MULTILINE)


RESTORED = "2 tests in 2 machines (2 forks with fixtures that stood, of an earlier run: server), ready in"


def test_the_next_run_begins_where_it_stands(suite):
    """It is shown, torn down and brought back as in the run that set it up; only random numbers are old."""
    first = suite.run("--microvm-write-back=made.txt")
    (drawn,) = words(first, "set up")
    assert words(first, "found") == [drawn, drawn]
    assert "2 tests in 2 machines (2 forks with fixtures that stood), ready in" in first
    (suite.folder / "made.txt").unlink()

    again = suite.run("--microvm-write-back=made.txt", "--junitxml=report.xml")
    assert words(again, "set up") == [drawn]
    assert words(again, "found") == [drawn, drawn]
    assert len({*words(first, "own"), *words(again, "own")}) == 4
    assert words(again, "torn down") == ["-9"]
    assert again.count("UserWarning: the server warns") == 1
    assert RESTORED in again
    assert (suite.folder / "made.txt").read_text() == drawn
    report = (suite.folder / "report.xml").read_text()
    assert report.count('name="microvm.restored" value="server"') == 2

    listed = subprocess.run([*MICROVM, "template", "list", "--json"], capture_output=True, check=True)
    kept = [entry for entry in json.loads(listed.stdout) if entry["kind"] == "fixtures"]
    forked = re.search(r'name="microvm.fork_of" value="(\w+)"', report)[1]
    assert [entry["in_use"] for entry in kept if entry["key"].startswith(forked)] == [False]

    (suite.folder / "made.txt").unlink()
    suite.write("test_it.py", TEST + "\n    # edited\n")
    edited = suite.run()
    assert words(edited, "set up") != [drawn]
    assert "of an earlier run" not in edited


def test_a_selection_begins_there_too(suite):
    (drawn,) = words(suite.run("--microvm-write-back=nothing"), "set up")
    selected = suite.run("-k", "test_it and 1")
    assert (words(selected, "found"), words(selected, "torn down")) == ([drawn], ["-9"])
    assert words(selected, "set up") == [drawn]


def test_not_in_a_run_with_secrets(suite):
    """Forks would write the secret to a disk. What the set-up draws shows that each machine does it."""
    suite.run()
    secret = suite.run("--microvm-secret=KEY=env:KEY", KEY="correct-horse")
    assert len({*words(secret, "set up")}) == 2
    assert "fixtures that stood" not in secret


class _Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *arguments):
        pass


def test_not_if_the_set_up_uses_the_network(suite):
    """It is set up again in the machine of the run, which has its network: there it succeeds."""
    suite.write(
        "conftest.py",
        """
        import urllib.request
        import pytest

        def get():
            return urllib.request.urlopen("http://one.example/", timeout=60).read()

        @pytest.fixture(scope="session")
        def remote(): return get()

        @pytest.fixture(scope="session")
        def local(): print("local is set up")
        """,
    )
    suite.write(
        "test_it.py",
        """
        from conftest import get

        def test_local(local): assert get() == b"hello"
        def test_remote(remote): assert remote == b"hello"
        """,
    )
    names = ["--microvm-pure-fixtures=remote", "--microvm-pure-fixtures=local"]
    with LocalServer(_Hello) as server:
        network = ["--microvm-network=one.example", f"--microvm-host=one.example=127.0.0.1:{server.port}"]
        outputs = [suite.run(*names, *network) for _ in range(2)]
    assert ["of an earlier run: local)" in output for output in outputs] == [False, True]
    for output in outputs:
        assert "test_remote: remote cannot be kept for later runs: the set-up uses the network" in output
