"""``pytest --microvm`` with grants: what tests reach and hold, and what is told of what was denied."""

from __future__ import annotations

import contextlib
import http.server
import os
import subprocess
import textwrap
from pathlib import Path

import pytest
from junitparser import JUnitXml, Properties

from pytest_microvm import MicroVM
from support import guards
from support.commands import MICROVM, PYTEST
from support.local_servers import LocalServer
from support.repositories import git, repository

SUITE = """
    import os, socket, urllib.request
    from pathlib import Path
    import pytest

    AT_IMPORT = os.environ.get("KEY")

    def get(name):
        return urllib.request.urlopen(f"http://{name}/", timeout=60).read()

    def test_reaches_what_it_may():
        assert get("one.example") == b"hello"
        assert get("two.example") == b"hello"

    @pytest.mark.microvm(network=["one.example", "three.example"])
    def test_marker_narrows():
        assert get("one.example") == b"hello"
        with pytest.raises(OSError, match="403"):
            get("two.example")
        with pytest.raises(OSError, match="403"):  # a marker adds nothing
            get("three.example")

    def test_direct():
        with pytest.raises(OSError):
            socket.create_connection(("192.0.2.77", 81), timeout=60)

    def test_secret():
        assert AT_IMPORT is None
        assert os.environ["KEY"] == "correct" + "-horse"
        assert Path("/run/secrets/CERT").stat().st_mode & 0o777 == 0o400

    def test_tells_its_secret():
        print("the key is", os.environ["KEY"])
        assert os.environ["KEY"] == "another"

    def test_mounted():
        assert Path("/data/in.txt").read_text() == "given"
        Path("/data/out.txt").write_text("made")
"""


class _Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    with LocalServer(_Hello) as served:
        yield served.port


@pytest.fixture(scope="module")
def ran(server, tmp_path_factory):
    """One run of the suite: its folder, its output, and its cases by name."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_suite.py").write_text(textwrap.dedent(SUITE))
    (folder / "data").mkdir()
    (folder / "data/in.txt").write_text("given")
    (folder / "pyproject.toml").write_text(f"""
        [tool.pytest-microvm]
        network = ["one.example", "two.example", "deny:four.example"]
        hosts = {{ "one.example" = "127.0.0.1:{server}", "two.example" = "127.0.0.1:{server}" }}
        secrets.KEY = {{ command = "echo correct-horse" }}
        secrets.CERT = {{ command = "echo battery", as = "file" }}
        mounts = ["data:/data"]
        fail_on_denied = true
    """)  # fmt: skip
    command = [*PYTEST, "-p", "no:randomly", "--microvm"]
    done = subprocess.run(
        [*command, "-rA", "--junitxml=report.xml", "--microvm-keep=failed"],
        cwd=folder, env={**os.environ, "PYTEST_MICROVM_TRUST": "1"},
        capture_output=True, text=True, timeout=guards.SUITE, check=False,
    )  # fmt: skip
    cases = {case.name: case for suite in JUnitXml.fromfile(str(folder / "report.xml")) for case in suite}
    return folder, done.stdout + done.stderr, cases


def properties(case):
    return {each.name: each.value for each in case.child(Properties)}


def outcome(case):
    return [result.message for result in case.result]


def test_what_is_granted_is_reached(ran):
    _folder, out, cases = ran
    assert outcome(cases["test_reaches_what_it_may"]) == [], out
    found = properties(cases["test_reaches_what_it_may"])
    assert found["microvm.requests"] == "2"
    assert "microvm.denied" not in found


def test_a_marker_only_narrows_and_denials_fail_the_test(ran):
    _folder, out, cases = ran
    (message,) = outcome(cases["test_marker_narrows"])
    assert "denied network access" in message, out
    denied = properties(cases["test_marker_narrows"])["microvm.denied"]
    assert "two.example:80" in denied
    assert "three.example:80" in denied
    assert "one.example" not in denied


def test_traffic_past_the_proxy_is_reported_as_denied(ran):
    _folder, out, cases = ran
    assert "denied TCP 192.0.2.77:81" in properties(cases["test_direct"])["microvm.denied"]
    assert "denied TCP 192.0.2.77:81" in out


def test_secrets_arrive_after_collection_and_are_shown_nowhere(ran):
    folder, out, cases = ran
    assert outcome(cases["test_secret"]) == [], out
    assert outcome(cases["test_tells_its_secret"]) != []
    assert "the key is ***" in out
    for text in (out, (folder / "report.xml").read_text()):
        assert "correct-horse" not in text


def test_a_machine_with_a_secret_is_not_kept(ran):
    _folder, out, _cases = ran
    assert "machines that hold secrets are not kept" in out
    assert "pytest-microvm shell" not in out


def test_what_a_test_made_in_a_mount_comes_back(ran):
    folder, out, cases = ran
    assert outcome(cases["test_mounted"]) == [], out
    assert (folder / "data/out.txt").read_text() == "made"
    assert {path.name for path in (folder / "data").iterdir()} == {"in.txt", "out.txt"}


@pytest.fixture
def asking(tmp_path):
    """A function that gives a project a configuration, and one that runs a command in it."""
    folder = tmp_path / "project"
    repository(folder)
    (folder / "test_it.py").write_text("def test_it():\n    pass\n")
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    environment.pop("PYTEST_MICROVM_TRUST", None)

    def written(configuration):
        (folder / "pyproject.toml").write_text(f"[tool.pytest-microvm]\n{configuration}\n")
        return folder

    def run(*command):
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=guards.SUITE,
            check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return written, run


def test_untrusted_configuration_is_refused_before_anything_runs(asking, tmp_path):
    written, run = asking
    mark = tmp_path / "ran"
    written(f'secrets.KEY = {{ command = "touch {mark}" }}\nmounts = ["/etc:/stolen:ro"]')
    status, said = run(*PYTEST, "--microvm")
    assert status == 4
    assert 'mounts = ["/etc:/stolen:ro"]' in said
    assert "nobody has allowed that for branch main" in said
    assert not mark.exists()


def test_trust_covers_neither_the_makefile_nor_another_branch(asking, tmp_path):
    """`make token` once ran whatever Makefile lay there, with the words that were allowed."""
    written, run = asking
    mark = tmp_path / "ran"
    folder = written('secrets.KEY = { command = "make -s token" }')
    assert run(*MICROVM, "trust")[0] == 0
    (folder / "Makefile").write_text(f"token:\n\t@touch {mark}; echo correct-horse\n")
    status, said = run(*PYTEST, "--microvm")
    assert status == 4
    assert "the command '/usr/bin/make' ended with status 2" in said
    written('secrets.KEY = { command = "echo correct-horse" }')
    assert run(*MICROVM, "trust")[0] == 0
    assert run(*PYTEST, "--microvm")[0] == 0
    git(folder, "checkout", "-q", "-b", "evil")
    status, said = run(*PYTEST, "--microvm")
    assert status == 4
    assert "nobody has allowed that for branch evil" in said
    assert not mark.exists()


def test_the_proxy_has_no_port_on_this_computer(server):
    def listening():
        mine = set()
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one by which the folder is read
                mine.add(str(descriptor.readlink()))
        tables = (Path("/proc/net", name).read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
        rows = [row.split() for table in tables for row in table]
        return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}

    before = listening()
    assert before  # the test's own server: what is looked for can be found
    with MicroVM.start(
        image="python", network=["one.example"], hosts={"one.example": f"127.0.0.1:{server}"}
    ) as vm:
        script = "import urllib.request as u; print(u.urlopen('http://one.example/').read().decode())"
        assert vm.run(["python3", "-c", script], check=True).stdout == "hello\n"
        assert listening() == before


def test_network_all_warns_and_an_invalid_rule_is_a_usage_error(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it():\n    pass\n")

    def run(rule):
        command = [*PYTEST, "--microvm", "--microvm-network", rule]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=guards.SUITE, check=False
        )
        return done.returncode, done.stdout + done.stderr

    status, out = run("all")
    assert (status, "WARNING: network = all" in out) == (0, True), out
    status, out = run("http//wrong")
    assert (status, "not a network rule" in out) == (4, True), out
