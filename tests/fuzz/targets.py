"""What is fuzzed: for every place where a guest's bytes arrive, a function that judges what comes of them.

A function returns when the bytes were refused as they should be, or were used without harm. Whatever it
raises is a finding.
"""

import asyncio
import contextlib
import io
import json
import os
import re
import socket
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

from _pytest._io import TerminalWriter
from _pytest.config import get_config
from _pytest.junitxml import LogXML

from pytest_microvm.agent.answers import Answer
from pytest_microvm.agent.link import GuestError, Link
from pytest_microvm.agent.transfer import as_os_error
from pytest_microvm.errors import (
    MachineCrashed,
    MachineError,
    ProtocolViolation,
    PullError,
    TransferError,
)
from pytest_microvm.images.oci.contents import inspect
from pytest_microvm.images.oci.documents import (
    parse_configuration,
    parse_document,
    parse_index,
    parse_manifest,
)
from pytest_microvm.images.oci.layer import rewrite
from pytest_microvm.machine.console import ConsoleReader
from pytest_microvm.mounts.live.folder import Folder, Growth
from pytest_microvm.mounts.live.messages import LENGTH, BadRequest
from pytest_microvm.mounts.live.server import Server
from pytest_microvm.network.policy.rules import parse_rules
from pytest_microvm.network.proxy.access import Access
from pytest_microvm.network.proxy.client_hello import MAX_BYTES, BadHello, HelloReader
from pytest_microvm.network.proxy.log import NetworkLog
from pytest_microvm.network.proxy.meter import CHUNK, Meter
from pytest_microvm.network.proxy.server import Proxy
from pytest_microvm.reports.checking import check_report
from pytest_microvm.reports.profiles import PROFILES
from pytest_microvm.reports.reading import UNREADABLE, read_report
from pytest_microvm.reports.writing import write_report
from pytest_microvm.suite.checks import Records
from pytest_microvm.suite.collected import Collected, parse_warning
from pytest_microvm.suite.foreign_warnings import warning_message
from pytest_microvm.suite.replay import rebuild_test_report
from pytest_microvm.untrusted.extraction import extract
from pytest_microvm.untrusted.output import LiveText
from pytest_microvm.untrusted.text import sanitize, sanitize_line
from pytest_microvm.wire.channel import WINDOW, Channel, Data
from pytest_microvm.wire.frames import HEADER, MAX_PAYLOAD, FrameReader, WireError

CORPUS = Path(__file__).parent / "corpus"
GUARD = 20  # seconds; shorter than the fuzzers' own timeout (run.py), to say what hung


def frames(data):
    """Whole or in pieces, the same frames come out, and no more is kept than one of them."""
    whole, pieces = FrameReader(), FrameReader()
    try:
        expected = whole.feed(data)
    except WireError:
        return
    found = [frame for start in range(0, len(data), 7) for frame in pieces.feed(data[start : start + 7])]
    assert found == expected
    assert whole.pending == pieces.pending <= HEADER.size + max(MAX_PAYLOAD.values())


def channel(data):
    """A channel takes no more than it granted, and says no more than it was asked."""
    host = Channel("host")
    for stream in (1, 2, 3):
        host.open(stream)
    host.write(1, b"x" * 1000)
    host.take()
    came = {1: 0, 2: 0, 3: 0}
    with contextlib.suppress(WireError):
        for start in range(0, len(data), 100):
            for event in host.receive(data[start : start + 100]):
                if isinstance(event, Data):
                    came[event.stream] += len(event.data)
                    if event.stream != 2:
                        host.consumed(event.stream, len(event.data))
    assert came[2] <= WINDOW
    assert len(host.take()) <= sum(came.values()) // 1000 + 100


def link(data):
    """Whatever comes over a socket, the link ends as a violation or as the machine's end."""
    ours, theirs = socket.socketpair()
    connection = Link(ours)
    try:
        stream, thrown_away = connection.open_stream(), connection.open_stream()
        thrown_away.discard()
        requests = [connection.request("op", stream=stream.number) for _ in range(3)]
        with theirs, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            theirs.sendall(b'\x01\0\0\0\0\0\0\0\x1e{"version":1,"role":"agent123"}' + data)
        with connection.changed:
            assert connection.changed.wait_for(lambda: connection.failure, GUARD)
        assert isinstance(connection.failure, (MachineCrashed, ProtocolViolation)), connection.failure
        for request in requests:
            try:
                _ask(connection, request.wait(GUARD))
            except GuestError as error:
                _is_safe(str(error))
                as_os_error(error, "/x")
            except MachineError:
                pass
    finally:
        connection.close()


def _ask(connection, result):
    answer = Answer(connection, result)
    for read in (answer.whole, answer.number, answer.path, answer.names):
        for name in ("size", "names", "target"):
            with contextlib.suppress(ProtocolViolation):
                read(name)


def tar(data):
    """Nothing is made or changed outside the folder, and nothing in it leads out."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as top:
        outside, inside = Path(top, "outside"), Path(top, "inside")
        outside.write_text("precious")
        inside.mkdir()
        with contextlib.suppress(TransferError):
            extract(io.BytesIO(data), inside)
        assert sorted(path.name for path in Path(top).iterdir()) == ["inside", "outside"]
        assert outside.read_text() == "precious"
        assert outside.stat().st_nlink == 1
        for path in inside.rglob("*"):
            assert not path.lstat().st_mode & 0o7022 or path.is_symlink()
            try:
                where = path.resolve()
            except (OSError, RuntimeError):  # a loop of links leads nowhere
                continue
            assert where.is_relative_to(inside.resolve()), path


class _Choices:
    """Decisions taken from bytes, so that a fuzzer's small changes are small changes of the outcome."""

    def __init__(self, data):
        self._data = io.BytesIO(data)

    def number(self, below):
        return int.from_bytes(self._data.read(2), "big") % below

    def value(self):
        kind = self.number(9)
        if kind < 4:
            return self._data.read(self.number(200)).decode("utf-8", "surrogatepass" if kind else "replace")
        if kind == 4:
            return int.from_bytes(self._data.read(self.number(20)), "big", signed=True)
        if kind == 5:
            return [self.value() for _ in range(self.number(4))]
        if kind == 6:
            return {str(self.number(5)): self.value() for _ in range(self.number(4))}
        return [None, True, float("nan"), float("inf"), 1.5, [], {}][self.number(7)]


def _places(value, above=()):
    yield above
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield from _places(inner, (*above, key))


def _mutated(seed, data):
    """Return the JSON value that ``seed`` becomes when ``data`` decides what is changed in it."""
    value, choices = json.loads(seed), _Choices(data)
    for _ in range(1 + choices.number(3)):
        path = list(_places(value))[1:]
        if not path:
            break
        *above, last = path[choices.number(len(path))]
        here = value
        for key in above:
            here = here[key]
        with contextlib.suppress(UnicodeDecodeError):
            here[last] = choices.value()
    return value


def _record(seeds, data):
    """Read ``data`` as JSON, or else as decisions that change a good record."""
    if data[:1] in (b"{", b"["):
        return data
    chosen = seeds[data[0] % len(seeds)] if data else seeds[0]
    return json.dumps(_mutated(chosen, data[1:])).encode()


_CONFIG = get_config()
_CONFIG.parse(["-c", "/dev/null", "-p", "no:cacheprovider"])
_ITEM = SimpleNamespace(
    nodeid="a.py::test_a",
    location=("a.py", 1, "test_a"),
    keywords={},
    guest=SimpleNamespace(raw_nodeid="a.py::test_a"),
)


def report(data):
    """A record about a test is refused, or makes a report that terminal and JUnit show without harm."""
    try:
        record = Records().read(_record(_seeds("report"), data))
        if record.get("k") == "warning":
            warning = warning_message(parse_warning(record))
            _is_safe(f"{warning.filename}:1: {warning.message}")
            return
        made = rebuild_test_report(_CONFIG, record, _ITEM, [("microvm.outcome", "ours")])
    except ProtocolViolation:
        return
    out = io.StringIO()
    made.toterminal(TerminalWriter(out))
    _is_safe(out.getvalue() + "\n" + made.longreprtext)
    xml = LogXML("unused", None, "pytest", "all", "total", "xunit2", True)
    xml.pytest_runtest_logreport(made)
    xml.node_reporter(made)
    for reporter in xml.node_reporters_ordered:
        case = ET.fromstring(ET.tostring(reporter.to_xml(), "unicode"))  # noqa: S314 - can it be parsed?
        assert case.get("name") in {"test_a", None}  # None: nothing to say about a setup that passed
    names = [name for name, _value in made.user_properties if str(name).startswith("microvm.")]
    assert names == ["microvm.outcome"]


def collection(data):
    """The answer to ``collect`` is refused or read."""
    if data[:1] != b"{":
        records = _mutated(b"[" + b",".join(_seeds("collection")[0].splitlines()) + b"]", data)
        lines = records if isinstance(records, list) else [records]
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with contextlib.suppress(ProtocolViolation):
        for node in Collected.parse(data).nodes:
            _is_safe(f"{node.nodeid}\n{node.name}\n{node.path}\n{node.location[2].replace('.', '::')}")


def text(data):
    """What is printed moves nothing but colours and commands nothing, and can be encoded."""
    shown = data.decode("utf-8", "surrogateescape")
    _is_safe(sanitize(shown))
    _is_safe(sanitize_line(shown))
    assert "\n" not in sanitize_line(shown)
    assert len(sanitize_line(shown)) < 50_000
    if len(data) < 50_000:
        live = {"".join(_live_text(data, size)) for size in (1, 7, len(data) or 1)}
        assert len(live) == 1
        _is_safe(live.pop())


def _live_text(data, size):
    """Yield what is shown of output that comes in pieces."""
    reader = LiveText()
    for start in range(0, len(data), size):
        yield reader.feed(data[start : start + size])
    yield reader.end()


def junit(data):
    """Whatever a JUnit file says, what is written of it is XML that says of as many tests the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.xml")
        path.write_bytes(data)
        read = read_report(path)
        cases = [case for suite in read.suites for case in suite.cases]
        assert bool(read.trouble) == any(case.name == UNREADABLE for case in cases)
        for profile in PROFILES.values():
            write_report(path, read.suites, profile)
            _is_safe(ET.tostring(ET.parse(path).getroot(), encoding="unicode", method="text"))  # noqa: S314 - checked
            again = [case.outcome for suite in read_report(path, ours=True).suites for case in suite.cases]
            assert again == [case.outcome for case in cases]
            assert [found for found in check_report(path) if found.text != "it has no test"] == []


def console(data):
    """What a console's lines are taken for is safe to show, and little is kept of them."""
    reader = ConsoleReader()
    for start in range(0, len(data), 100):
        for finding in reader.feed(data[start : start + 100]):
            _is_safe(finding.text)
            assert len(finding.text) < 5000
    assert len(reader.findings) <= 20
    assert len(reader._line) <= 1024


def layer(data):
    """A layer's archive is refused, or rewritten as one whose paths stay in the image."""
    source, out = io.BytesIO(data), io.BytesIO()
    try:
        contents = inspect(source)
        rewrite(out, source, contents, {})
    except PullError as error:
        _is_safe(str(error))
        return
    paths = set()
    with tarfile.open(fileobj=io.BytesIO(out.getvalue()), errors="surrogateescape") as clean:
        for member in clean:
            assert not {"", ".", ".."} & set(member.name.split("/")), member.name
            assert not member.islnk() or member.linkname in paths
            assert all(key in _HEADERS or _ATTRIBUTE.fullmatch(key) for key in member.pax_headers)
            paths.add(member.name)
    assert len(paths) == contents.entries


_HEADERS = {
    "path",
    "linkpath",
    "uid",
    "gid",
    "size",
    "mtime",
    "hdrcharset",
    "SCHILY.xattr.trusted.overlay.opaque",
}
_ATTRIBUTE = re.compile(r"SCHILY\.xattr\.(security\.capability|user\.(?!overlay\.).+)", re.DOTALL)


def image(data):
    """Documents of a container image are refused, or have what they must have."""
    with contextlib.suppress(PullError):
        document = parse_document(data, "the document")
        for parse in (parse_index, parse_manifest, lambda value: parse_configuration(value, 1)):
            try:
                parse(document)
            except PullError as error:
                _is_safe(str(error))


def _is_safe(shown):
    shown.encode()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufffe\uffff]", plain), (
        ascii(plain)
    )
    assert not re.search(r"^\s*::|##(vso|teamcity)?\[", plain, re.MULTILINE), ascii(plain)


def client_hello(data):
    """Whole or in pieces, the same comes of what TLS begins with, and no more is kept than that may have."""
    verdicts = []
    for size in (1, 7, len(data) or 1):
        reader = HelloReader()
        try:
            found = (reader.feed(data[start : start + size]) for start in range(0, len(data), size))
            verdicts.append(next((hello for hello in found if hello), None))
        except BadHello as error:
            verdicts.append(str(error))
        assert len(reader.data) <= MAX_BYTES + size
    assert len(set(verdicts)) == 1, verdicts
    name = getattr(verdicts[0], "server_name", None)
    assert name is None or re.fullmatch(r"[a-z0-9._-]+", name)


def proxy(data):
    """Whatever a guest sends to its proxy, no other name is looked up than the one it may reach."""
    asked, log = [], NetworkLog()
    asyncio.run(asyncio.wait_for(_served(data, asked, log), GUARD))
    assert set(asked) <= {"a.example"}
    allowed = [entry for entry in log.list() if entry.allowed]
    assert {entry.host for entry in allowed} <= {"a.example"}
    for entry in log.list():
        _is_safe(str(entry))


async def _served(data, asked, log):
    async def resolve(host, _port):
        asked.append(host)
        raise OSError

    problems = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
    access = Access(parse_rules(["a.example", "GET https://a.example:8443/open/*"], "fuzz"))
    proxy = Proxy(access, log, Meter(None, None, None, problems.append), resolve=resolve)
    ours, theirs = socket.socketpair()
    served = asyncio.ensure_future(proxy.serve(*await asyncio.open_connection(sock=theirs)))
    reader, writer = await asyncio.open_connection(sock=ours)
    writer.write(data)
    writer.write_eof()
    answer = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(CHUNK):
            answer += piece
    writer.close()
    await served
    await proxy.close()
    assert not problems
    assert bytes(answer[:9]) in {b"", b"HTTP/1.1 "}, bytes(answer)


def fuse(data):
    """Requests of a live mount leave everything but the directory alone; each begins with its length."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top:
        inside = Path(top) / "inside"
        (inside / "sub").mkdir(parents=True)
        (inside / "a").write_text("a")
        server = Server(Folder(os.open(inside, os.O_RDONLY), Growth(10**6), writable=True))
        with contextlib.suppress(BadRequest):
            while data:
                size = LENGTH.unpack(data[:4])[0] if len(data) >= 4 else 0
                answer = server.answer(data[: max(size, 1)])
                assert answer is None or LENGTH.unpack(answer[:4])[0] == len(answer)
                data = data[max(size, 1) :]
        server.close()
        assert [path.name for path in Path(top).iterdir()] == ["inside"]
        for path in inside.rglob("*"):
            with contextlib.suppress(OSError, RuntimeError):  # it leads nowhere
                assert path.resolve(strict=True).is_relative_to(inside.resolve())


def _seeds(name):
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*.json*"))]


TARGETS = {
    function.__name__: function
    for function in (
        frames,
        channel,
        link,
        tar,
        report,
        junit,
        collection,
        text,
        console,
        client_hello,
        proxy,
        fuse,
        layer,
        image,
    )
}
