"""How much memory a guest can make the host use: ``python benchmarks/hostile_bytes.py --mib 10240``.

For each way to send, a process with the host's real code on one end of a socket, and one that plays the
guest on the other. Told is by how much the first one's peak memory (VmHWM) grew over what it had before
the first byte. No machine is needed: what counts is what arrives.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from pytest_microvm.agent.drain import Drain
from pytest_microvm.agent.link import Link
from pytest_microvm.agent.transfer import pull, read_file
from pytest_microvm.errors import MachineError
from pytest_microvm.guest.port import Port
from pytest_microvm.settings.spec import DEFAULT_OUTPUT
from pytest_microvm.suite.backend import CollectPlan, TestLimits
from pytest_microvm.suite.collected import Collected
from pytest_microvm.suite.session import RunnerSession
from pytest_microvm.wire.channel import Credit, Message
from pytest_microvm.wire.frames import Kind, encode

MIB = 1024**2
PIECE = 65536
LIMITS = TestLimits(None, DEFAULT_OUTPUT)
KEPT = 64 * MIB
"""Bytes that are asked to be kept, where some are."""

# The host's side: takes what comes, returns what became of it


def drained(sock: socket.socket) -> str:
    """Take a console."""
    ended = threading.Event()
    drain = Drain(sock, lambda data: None if data else ended.set())
    ended.wait()
    return f"{drain.received} bytes heard, {len(drain.tail())} kept"


def unread(sock: socket.socket, *, discard: bool = False) -> str:
    """Open a stream and read nothing of it."""
    link = Link(sock)
    stream = link.open_stream()
    request = link.request("anything", stream=stream.number)
    if discard:
        stream.discard()
    with link.changed:
        link.changed.wait_for(lambda: request.done)
    return f"{link.bytes_received} bytes taken: {link.failure or 'fine'}"


def discarded(sock: socket.socket) -> str:
    """Throw a stream away."""
    return unread(sock, discard=True)


def answered(work: Callable[[Link], object]) -> Callable[[socket.socket], str]:
    """Do ``work`` over a link."""

    def host(sock: socket.socket) -> str:
        link = Link(sock)
        try:
            came = f"fine: {work(link)}"
        except MachineError as error:
            came = error.brief
        return f"{link.bytes_received} bytes taken: {came}"

    return host


def reports(link: Link) -> str:
    """Keep the records about a test."""
    return f"{len(list(RunnerSession(link).run(0, None, LIMITS)))} records"


def collected(link: Link) -> str:
    """Read a collection."""
    here = Path("/")
    plan = CollectPlan(arguments=(), directory=here, rootdir=here, workspace=here)
    return f"{len(Collected.parse(RunnerSession(link).collect(plan)).nodes)} nodes"


def read_some(link: Link) -> str:
    """Read a file into memory."""
    return f"{len(read_file(link, '/x', KEPT))} bytes"


def unpacked(link: Link) -> str:
    """Pull a folder."""
    with tempfile.TemporaryDirectory() as folder:
        pull(link, PurePosixPath("/x"), Path(folder, "x"))
    return "unpacked"


# The guest's side: sends for as long as it can, at most so many bytes


def flood(piece: bytes, first: bytes = b"") -> Callable[[socket.socket, int], None]:
    """Send ``piece`` again and again, whatever the other side says."""

    def guest(sock: socket.socket, amount: int) -> None:
        block = piece * max(1, 4 * PIECE // len(piece))
        asked = b"" if first else b'"op"'
        while b'"op"' not in asked:
            asked += sock.recv(4096)
        sock.sendall(first)
        for _ in range(amount // len(block) + 1):
            sock.sendall(block)

    return guest


def stream(piece: bytes, first: bytes = b"") -> Callable[[socket.socket, int], None]:
    """Answer requests as an honest guest does, and send ``piece`` again and again on the last stream."""
    block = piece * max(1, PIECE // len(piece))

    def guest(sock: socket.socket, amount: int) -> None:
        port = Port(sock.fileno(), "runner")
        number, rest, left = 0, first, amount
        port.flush()
        while True:
            for event in port.receive():
                if isinstance(event, Message) and "stream" in event.body:
                    number, request = event.body["stream"], event.body["id"]
                    port.channel.open(number)
                    if event.body.get("op") == "run":  # a runner answers first, the reports follow
                        port.channel.send({"id": request, "result": {}})
                        request = None
                elif isinstance(event, Message):
                    port.channel.send(
                        {"id": event.body["id"], "result": {"kind": "directory", "mode": 0o755}}
                    )
                elif not isinstance(event, Credit):
                    continue
                while number and (sent := port.channel.write(number, rest or block)):
                    rest = (rest or block)[sent:]
                    left -= sent
                    port.flush()
                    if left <= 0:
                        port.channel.close(number)
                        if request is not None:
                            port.channel.send({"id": request, "result": {}})
                        number = 0
                port.flush()

    return guest


HELLO = encode(Kind.HELLO, 0, b'{"version":1,"role":"runner"}')
REPORT = (
    json.dumps({"k": "report", "data": {"sections": [["Captured stdout call", "x" * 900]]}}).encode() + b"\n"
)
NODE = (
    b'{"k":"node","parent":0,"kind":"item","class":"F","name":"","nodeid":"","path":"","marks":[],"extra":[],'
)
NODE += b'"location":["",0,""]}\n'
VALUES = b'{"k":[' + b"[]," * 300_000 + b"[]]}\n"


def member(name: bytes, size: int) -> bytes:
    """Return a tar header."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    block[136:148] = b"00000000000\0"
    block[156:157] = b"0"
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@dataclass(frozen=True)
class Way:
    """One way to send.

    Args:
        host: What receives.
        guest: What sends.
        bound: MiB by which the host may grow.
        share: The part of the bytes that is sent, where Python needs long for each.
        most: Bytes that are sent at most.
    """

    host: Callable[[socket.socket], str]
    guest: Callable[[socket.socket, int], None]
    bound: int = 64
    share: float = 1.0
    most: int = 2**63


WAYS = {
    "console": Way(drained, flood(b"a line of the console\n")),
    "console-one-line": Way(drained, flood(b"x" * PIECE)),
    "stream-nobody-reads": Way(unread, flood(encode(Kind.DATA, 1, bytes(PIECE)), HELLO)),
    "stream-thrown-away": Way(discarded, stream(b"x" * PIECE)),
    "thrown-away-in-bytes": Way(discarded, flood(encode(Kind.DATA, 1, b"x"), HELLO), share=0.02),
    "answers-nobody-asked-for": Way(unread, flood(encode(Kind.MESSAGE, 0, b'{"id":7}'), HELLO)),
    "frames-of-nothing": Way(discarded, flood(encode(Kind.DATA, 1), HELLO), share=0.02),
    "file-too-long": Way(answered(read_some), stream(b"x" * PIECE), bound=2 * KEPT // MIB + 64),
    "reports": Way(answered(reports), stream(REPORT), bound=512),
    "report-of-one-line": Way(answered(reports), stream(b"x" * PIECE), bound=512),
    "report-of-values": Way(answered(reports), stream(VALUES), bound=512),
    "collection": Way(answered(collected), stream(NODE), bound=512),
    "collection-in-its-limit": Way(answered(collected), stream(NODE), bound=1536, most=250 * MIB),
    "tar-member": Way(answered(unpacked), stream(b"x" * PIECE, member(b"big", 2**35)), share=0.2),
    "tar-members": Way(answered(unpacked), stream(member(b"again", 0)), share=0.2),
    "tar-large-members": Way(answered(unpacked), stream(member(b"again", MIB) + b"x" * MIB)),
}


def peak() -> int:
    """Return the peak of this process's memory in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(name: str, amount: int) -> dict[str, object]:
    """Let this process be the host, and a copy of it the guest; say what it took."""
    way = WAYS[name]
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        ours.close()
        with contextlib.suppress(OSError, EOFError):
            way.guest(theirs, min(way.most, int(amount * way.share)))
        os._exit(0)
    theirs.close()
    before, started = peak(), time.monotonic()
    outcome = way.host(ours)
    grown = peak() - before
    ours.close()
    os.waitpid(pid, 0)
    return asdict(Measured(name, grown / MIB, way.bound, time.monotonic() - started, outcome))


@dataclass(frozen=True)
class Measured:
    """By how many MiB the host grew, how many it may, how long it took, and what came of it."""

    name: str
    grown: float
    bound: int
    seconds: float
    outcome: str


def in_own_process(name: str, amount: int) -> Measured:
    """Measure one way in a process that has done nothing before."""
    command = [sys.executable, __file__, "--one", name, "--mib", str(amount // MIB)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return Measured(**json.loads(done.stdout))


def main() -> int:
    """Measure what was asked for; return 1 if the host grew by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="what each guest sends, at most")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("ways", nargs="*", help="which; all if omitted")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.mib * MIB)))
        return 0
    worst = 0
    for name in options.ways or WAYS:
        found = in_own_process(name, options.mib * MIB)
        worst |= found.grown > found.bound
        print(
            f"{name:25}{found.grown:7.1f} MiB of {found.bound:3} {found.seconds:6.1f} s  {found.outcome[:99]}"
        )
    return worst


if __name__ == "__main__":
    sys.exit(main())
