"""Ports and Unix sockets of a machine on this computer, and what a machine sends past its proxy."""

import contextlib
import gc
import hashlib
import json
import os
import resource
import socket
import sys
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest
import requests_unixsocket

from pytest_microvm.errors import MachineCrashed, UsageError
from pytest_microvm.host.starting import machine_facts
from pytest_microvm.machine.instance import Instance
from pytest_microvm.machine.microvm import MicroVM
from pytest_microvm.network.port.forwarding import Address
from pytest_microvm.settings.spec import MachineSpec
from pytest_microvm.templates.chain import TemplateStep
from support import guards

MIB = 1024**2

# One byte says what is wanted: E echoes, U counts what comes, D sends as many bytes as a line says.
SERVER = """
import hashlib, socketserver

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        wanted = self.rfile.read(1)
        if wanted == b"E":
            while data := self.rfile.read1(65536):
                self.wfile.write(data)
        elif wanted == b"U":
            digest = hashlib.sha256()
            while data := self.rfile.read1(1 << 20):
                digest.update(data)
            self.wfile.write(digest.hexdigest().encode())
        elif wanted == b"D":
            left = int(self.rfile.readline())
            while left > 0:
                left -= self.connection.send(bytes(min(left, 1 << 20)))

class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, request_queue_size = True, True, 500

Server(("127.0.0.1", 7000), Handler).serve_forever()
"""
UNIX_SERVER = """
import http.server, os, socketserver

class Handler(http.server.BaseHTTPRequestHandler):
    def address_string(self):
        return "unix"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.path)))
        self.end_headers()
        self.wfile.write(self.path.encode())
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(201)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[::-1])

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

Server("/run/daemon.sock", Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def vm(host):
    with host.start(image="python", timeout=300) as machine:
        yield machine


@pytest.fixture(scope="module")
def served(vm):
    """Where the server of the machine is on this computer."""
    with vm.popen(["python3", "-c", SERVER]), vm.forward(7000) as address:
        vm.wait_for_port(7000, timeout=guards.MACHINE)
        yield address


def connect(address):
    return socket.create_connection((address.host, address.port), timeout=guards.MACHINE)


def fetch(url):
    with urllib.request.urlopen(url, timeout=guards.MACHINE) as response:  # noqa: S310 - of the machine
        return response.read()


def read_all(sock):
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


def test_an_http_server(vm):
    vm.path("/srv/hello").write_text("hello from the machine")
    server = ["python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", "/srv", "8080"]
    with vm.popen(server), vm.forward(8080) as address:
        vm.wait_for_port(8080, timeout=guards.MACHINE)
        assert fetch(f"{address.url}/hello") == b"hello from the machine"
    assert ("forward", "forward 8080") in [(event.kind, event.about) for event in vm.events]


def test_half_close(served):
    with connect(served) as client:
        client.sendall(b"Eone")
        assert client.recv(10) == b"one"
        client.sendall(b"two")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"two"


def test_a_hundred_connections_at_once(served):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(served)) for _ in range(100)]
        for number, client in enumerate(clients):
            client.sendall(b"E%d" % number)
            client.shutdown(socket.SHUT_WR)
        assert [read_all(client) for client in clients] == [b"%d" % number for number in range(100)]


def test_large_bodies_need_no_memory_of_this_computer(served):
    block, blocks = os.urandom(MIB), 64
    digest = hashlib.sha256()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with connect(served) as client:
        client.sendall(b"U")
        for _ in range(blocks):
            digest.update(block)
            client.sendall(block)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == digest.hexdigest().encode()
    with connect(served) as client:
        client.sendall(b"D%d\n" % (blocks * MIB))
        received = 0
        while data := client.recv(1 << 20):
            received += len(data)
        assert received == blocks * MIB
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 24 * MIB


def test_a_daemon_on_a_unix_socket(vm):
    with vm.popen(["python3", "-c", UNIX_SERVER]), vm.forward("/run/daemon.sock") as address:
        vm.wait_for_port("/run/daemon.sock", timeout=guards.MACHINE)
        with requests_unixsocket.Session() as session:
            session.trust_env = False
            answer = session.get(f"{address.url}/containers/json", timeout=guards.MACHINE)
            assert answer.text == "/containers/json"
            answer = session.post(f"{address.url}/", data=b"body", timeout=guards.MACHINE)
            assert (answer.status_code, answer.content) == (201, b"ydob")
    other = vm.popen(["python3", "-c", UNIX_SERVER.replace("daemon", "other")])
    with other, vm.forward("/run/other.sock", unix=False) as address:  # a Unix socket there, a port here
        vm.wait_for_port("/run/other.sock", timeout=guards.MACHINE)
        assert fetch(f"{address.url}/x") == b"/x"


def test_waiting_for_a_port(vm):
    with pytest.raises(TimeoutError, match=rf"machine {vm.id}, waiting for 9: Connection refused, for 0.5 s"):
        vm.wait_for_port(9, timeout=0.5)
    late = "sleep 1; exec python3 -c 'import socket; socket.create_server((\"::1\", 9), family=10).accept()'"
    with vm.popen(late) as server:
        vm.wait_for_port(9, timeout=guards.MACHINE)
        assert server.wait(guards.MACHINE) == 0


@pytest.mark.parametrize("target", [0, 65536, "relative", "/" + "x" * 107])
def test_what_is_no_port(vm, target):
    with pytest.raises(UsageError), vm.forward(target):
        pass
    with pytest.raises(UsageError):
        vm.wait_for_port(target, timeout=1)


def test_ports_under_their_own_numbers(vm):
    server = ["python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", "/srv", "8081"]
    with vm.popen(server), vm.forward_ports(range(8080, 8090)) as host:
        vm.wait_for_port(8081, timeout=guards.MACHINE)
        assert b"Directory listing" in fetch(f"http://{host}:8081/")
        with pytest.raises(ConnectionResetError), connect(Address(host, 8082)) as client:
            client.recv(1)


@pytest.mark.parametrize("targets", [[80, 0], [65536], range(1, 300)])
def test_ports_that_cannot_be_forwarded(vm, targets):
    with pytest.raises(UsageError), vm.forward_ports(targets):
        pass


def test_docker_without_the_extra(vm, monkeypatch):
    monkeypatch.delitem(sys.modules, "pytest_microvm.machine.docker", raising=False)
    monkeypatch.setitem(sys.modules, "requests_unixsocket", None)
    with pytest.raises(UsageError, match=r"pip install 'pytest-microvm\[docker\]'"):
        vm.docker  # noqa: B018 - reading it is the test


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_machine_ending_during_a_transfer_leaves_no_descriptors(host, how):
    gc.collect()
    with contextlib.ExitStack() as stack:
        vm = stack.enter_context(host.start(image="python", timeout=300))
        stack.enter_context(vm.popen(["python3", "-c", SERVER]))
        address = stack.enter_context(vm.forward(7000))
        vm.wait_for_port(7000, timeout=guards.MACHINE)
        before = descriptors()
        clients = [stack.enter_context(connect(address)) for _ in range(2)]
        for client in clients:
            client.sendall(b"D%d\n" % 10**9)
            client.recv(1)
        if how == "closed":
            vm.close()
        else:
            vm.instance.vmm.kill()
        for client in clients:
            with pytest.raises(ConnectionResetError):
                read_all(client)
        with pytest.raises(ConnectionRefusedError):
            connect(address)
        with pytest.raises(UsageError if how == "closed" else MachineCrashed):
            vm.wait_for_port(7000, timeout=guards.MACHINE)
    gc.collect()
    assert descriptors() < before
    assert [thread.name for thread in threading.enumerate()].count("microvm-network") == 1


def descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


DIRECT = """
import json, select, socket, sys, time

def attempt(work):
    begin = time.monotonic()
    try:
        work()
        return ["reached", 0]
    except OSError as error:
        return [type(error).__name__, time.monotonic() - begin]

def datagram(family, address):
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(60)
    sock.connect(address)
    sock.send(b"secret")
    sock.recv(1)

def echo(family, protocol, kind, address):
    sock = socket.socket(family, socket.SOCK_RAW, protocol)
    sock.setsockopt(socket.IPPROTO_IP if family == socket.AF_INET else socket.IPPROTO_IPV6,
                    11 if family == socket.AF_INET else 25, 1)  # IP_RECVERR: errors are told
    sock.settimeout(60)
    sock.sendto(bytes([kind, 0, 0, 0, 0, 1, 0, 1]), (address, 0))
    sock.recv(1)

four, six = socket.AF_INET, socket.AF_INET6
print(json.dumps([
    attempt(lambda: socket.create_connection(("198.51.100.7", 443), 60)),
    attempt(lambda: socket.create_connection(("2001:db8::7", 443), 60)),
    attempt(lambda: socket.create_connection(("169.254.169.254", 80), 60)),
    attempt(lambda: datagram(four, ("198.51.100.7", 9))),
    attempt(lambda: datagram(six, ("2001:db8::7", 9))),
    attempt(lambda: socket.getaddrinfo("secret.example.com", 80)),
    attempt(lambda: echo(four, 1, 8, "198.51.100.7")),
]))
"""


def test_traffic_past_the_proxy_fails_at_once_and_is_logged(host):
    with host.start(image="python", timeout=300) as vm:
        assert vm.network.silent
        quiet = json.loads(vm.run(["python3", "-c", COUNT], check=True).stdout)
        found = json.loads(vm.run(["python3", "-c", DIRECT], check=True).stdout)
        kinds = [kind for kind, _seconds in found]
        assert kinds == ["ConnectionRefusedError"] * 5 + ["gaierror", "OSError"]
        assert max(seconds for _kind, seconds in found) < 30  # none waited for an answer that never comes
        assert quiet == [0, 0]  # and the machine by itself says nothing
        told = {(request.method, request.host, request.port) for request in vm.network.denied}
        assert told == {
            ("TCP", "198.51.100.7", 443),
            ("TCP", "2001:db8::7", 443),
            ("TCP", "169.254.169.254", 80),
            ("UDP", "198.51.100.7", 9),
            ("UDP", "2001:db8::7", 9),
            ("DNS", "secret.example.com", 53),
            ("ICMP", "198.51.100.7", 0),
        }
        assert all(request.seen_by == "guest" for request in vm.network.requests)
        name = vm.run(["python3", "-c", "import socket; print(socket.gethostbyname(socket.gethostname()))"])
        assert name.stdout == "127.0.0.1\n"
        assert len(vm.network.requests) == len(told)  # its own name is no attempt


COUNT = """
import json
with open("/proc/net/dev") as file:
    counts = next(line.split(":")[1].split() for line in file if "nowhere" in line)
print(json.dumps([int(counts[1]), int(counts[9])]))
"""


def test_a_machine_whose_network_process_is_ended_goes_on(host):
    with host.start(image="python", timeout=300) as vm:
        vm.run("kill -9 $(grep -l microvm-network /proc/[0-9]*/comm | cut -d/ -f3)", check=True)
        assert vm.run(["echo", "alive"]).stdout == "alive\n"
        refused = "import socket; print(socket.socket().connect_ex(('127.0.0.1', 3128)))"
        assert vm.run(["python3", "-c", refused]).stdout == "111\n"


# A daemon that asks for the proxy all the time, also while its machine is frozen.
ASKS = """
import os, socket, sys
if os.fork() == 0:
    os.setsid()
    while True:
        try:
            with socket.create_connection(("127.0.0.1", 3128)) as sock:
                sock.sendall(b"GET http://example.com/ HTTP/1.0\\r\\n\\r\\n")
                sock.makefile("rb").read()
        except OSError:
            pass
"""


def test_copies_of_a_machine_that_uses_its_network(host):
    base = host.base(MachineSpec(image="python", timeout=300))

    def work(instance: Instance):
        instance.adopt("agent", {"hostname": "template", "machine_id": "0" * 32})
        machine = MicroVM(instance, machine_facts(base, "template", 0.0))
        machine.run(f"python3 -c '{ASKS}' >/dev/null 2>&1 </dev/null", check=True)
        while len(machine.network.requests) < 3:
            machine.run(["true"])
        return {}

    step = TemplateStep("prepared", (str(time.time_ns()),), work, "preparing")
    template = host.template(base, [step])
    for _ in range(2):
        copied = host.copy(template, base, "agent")
        with MicroVM(copied.instance, copied.facts, on_close=partial(host.release, copied)) as vm:
            while len(vm.network.requests) < 3:
                assert vm.run(["true"]).returncode == 0
            assert {request.host for request in vm.network.denied} == {"example.com"}
