"""Inside a machine, as root: nothing gets out but what is allowed, and what was tried is in the log.

The ways are a table in ``support/ways_out.py``. One machine tries them all; then it is looked at what came
of it: listeners of this computer that must have got nothing, and the machine's log. Where the host cannot
see an attempt, the table says why, and it must fail all the same.
"""

import contextlib
import dataclasses
import http.server
import json
import selectors
import socket
import threading
from pathlib import Path

import pytest

from support import ways_out
from support.network import PUBLIC, Server
from support.ways_out import COUNTERPARTS, LEAD_TO, PLACES, TURNS, WAYS, filled

GUEST = Path(ways_out.__file__)
RESOLVE = socket.getaddrinfo
SENT_TO_NOBODY = ("multicast", "loopback-card")
"""Ways that the guest's kernel takes for sent, and drops."""


class Trap:
    """Listens for TCP and datagrams on one port of several addresses, and keeps what comes."""

    def __init__(self, addresses):
        self.got = []
        self._selector = selectors.DefaultSelector()
        self.port = 0
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                sock = socket.socket(family, kind)
                sock.setblocking(False)
                sock.bind((address, self.port))
                self.port = sock.getsockname()[1]
                if kind == socket.SOCK_STREAM:
                    sock.listen(64)
                self._selector.register(sock, selectors.EVENT_READ, kind)

    def look(self):
        """Take in what has come by now: the kernel has kept it."""
        for key, _ in self._selector.select(0):
            with contextlib.suppress(OSError):
                if key.data == socket.SOCK_DGRAM:
                    self.got.append(key.fileobj.recv(65536))
                    continue
                while True:
                    sock, address = key.fileobj.accept()
                    sock.setblocking(False)
                    self.got.append(f"connection from {address}".encode())
                    with sock, contextlib.suppress(OSError):
                        self.got.append(sock.recv(65536))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()


class Silent(Server):
    """Takes connections of tunnels, keeps the bytes that come, and says nothing."""

    def finish_request(self, request, client_address):
        with request, contextlib.suppress(OSError):
            request.settimeout(30)
            while data := request.recv(65536):
                self.heads.append(data)


class Resolver:
    """What the host asks for when it looks up a name: answers for names of the tests, and for no others."""

    def __init__(self, first):
        self.asked = []
        self._first = first

    def __call__(self, host, port, *args, **kwargs):
        self.asked.append(host)
        name, _, rest = host.partition(".")
        if rest != "rebind.test":
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        turned = name.startswith("turns") and self.asked.count(host) > 1
        found = ("127.0.0.1",) if turned else LEAD_TO.get(name, (self._first,))
        return [answer for address in found for answer in RESOLVE(address, port, *args, **kwargs)]


class Hello(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.heads.append(self.path.encode())
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def hello(address, port):
    """A server that is allowed, on the trap's port."""
    with http.server.ThreadingHTTPServer((address, port), Hello) as server:
        server.heads, server.bodies = [], []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@dataclasses.dataclass
class Outcome:
    """What is left when all has been tried."""

    said: dict
    requests: list
    facts: dict
    delivered: list
    trapped: list
    asked: list

    def __post_init__(self):
        self.shown = {}
        denied = [entry for entry in self.requests if not entry.allowed]
        for way in WAYS:
            if way.shown is not None:
                facts = {**self.facts, "name": way.name, "leak": f"leak-{way.name}"}
                method, host, port = (filled(part, facts) for part in way.shown)
                found = next(
                    (one for one in denied if (one.method, one.host, one.port) == (method, host, int(port))),
                    None,
                )
                self.shown[way.name] = found
                if found is not None:
                    denied.remove(found)
        self.unexplained = denied


def own_address(family, public):
    """Return the address by which this computer would reach others; nothing is sent for that."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((public, 9))
            return sock.getsockname()[0]
        except OSError:
            return None


@pytest.fixture(scope="module")
def outcome(host, tmp_path_factory):
    """All ways tried by one machine, which has ended."""
    certificate = tmp_path_factory.mktemp("ca") / "ca.pem"
    PUBLIC.cert_pem.write_to_path(certificate)
    own = own_address(socket.AF_INET, "203.0.113.1") or "198.51.100.9"
    own6 = own_address(socket.AF_INET6, "2001:db8::1") or "2001:db8::9"
    with contextlib.ExitStack() as stack:
        trap = stack.enter_context(Trap(filter(is_ours, ("127.0.0.1", "::1", own, own6))))
        first = stack.enter_context(hello("127.0.0.2", trap.port))
        plain = stack.enter_context(Server())
        secure = stack.enter_context(Server("secure.test", "looked.test"))
        silent = stack.enter_context(Silent())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SSL_CERT_FILE", str(certificate))
        leads = {"secure.test": secure, "looked.test": secure, "ok.plain.test": plain}
        for way in WAYS:
            leads |= {f"{way.name}.plain.test": plain, f"{way.name}.secure.test": silent}
        rules = ["*.plain.test", "*.secure.test", "secure.test", "https://looked.test/ok/*"]
        rules += [f"*.rebind.test:{trap.port}", f"127.0.0.2:{trap.port}"]
        hosts = {name: f"127.0.0.1:{server.port}" for name, server in leads.items()}
        vm = stack.enter_context(host.start(image="python", network=rules, hosts=hosts))
        resolver = Resolver("127.0.0.2")
        patch.setattr(socket, "getaddrinfo", resolver)
        facts = {"own": own, "own6": own6, "trap": trap.port}
        said = try_out(vm, facts)
        requests = vm.network.requests
        vm.close()
        trap.look()
        servers = [plain, secure, silent, first]
        delivered = [data for server in servers for data in [*server.heads, *server.bodies]]
        yield Outcome(said, requests, facts, delivered, silent.heads + trap.got, resolver.asked)


def try_out(vm, facts):
    vm.push(GUEST, "/tmp/ways_out.py")
    done = vm.run(["python3", "/tmp/ways_out.py"], input=json.dumps(facts), timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def is_ours(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as sock, contextlib.suppress(OSError):
        sock.bind((address, 0))
        return True
    return False


def test_it_was_tried_as_root(outcome):
    assert outcome.said["user"] == 0
    assert len(outcome.said["ways"]) == len(WAYS) == len({way.name for way in WAYS})


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_no_way_leads_out(outcome, way):
    said = outcome.said["ways"][way.name]
    assert [data for data in outcome.delivered if f"leak-{way.name}".encode() in data] == [], way.why
    assert "hello" not in said
    if way.shown is None:
        assert way.name in SENT_TO_NOBODY or "Error" in said
    else:
        assert outcome.shown[way.name] is not None, (said, outcome.unexplained)


def test_nothing_came_where_nothing_is_allowed(outcome):
    assert outcome.trapped == []


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_what_is_allowed_works(outcome, name):
    assert "hello" in outcome.said["counterparts"][name]


def test_nothing_else_is_in_the_log(outcome):
    assert outcome.unexplained == []


def test_only_names_that_are_allowed_are_looked_up(outcome):
    assert {name.partition(".")[2] for name in outcome.asked} == {"rebind.test"}


def test_all_is_every_public_host_and_no_other(host, monkeypatch):
    """Loopback and the metadata address, however they are written and whatever name leads to them."""
    ways = [*PLACES, *(way for way in TURNS if way.name in LEAD_TO)]
    own = {
        "own": own_address(socket.AF_INET, "203.0.113.1"),
        "own6": own_address(socket.AF_INET6, "2001:db8::1"),
    }
    ways = [way for way in ways if way.name != "loopback-own" or own["own"]]
    ways = [way for way in ways if way.name != "loopback-own-6" or own["own6"]]
    ours = filter(None, ("127.0.0.1", "::1", *own.values()))
    with Trap(filter(is_ours, ours)) as trap, host.start(network=["all"]) as vm:
        monkeypatch.setattr(socket, "getaddrinfo", Resolver("127.0.0.2"))
        facts = {**own, "trap": trap.port, "only": [way.name for way in ways]}
        said = try_out(vm, facts)["ways"]
        assert len(said) == len(ways)
        assert [name for name, what in said.items() if "HTTP/1.1 40" not in what] == []
        assert [entry for entry in vm.network.requests if entry.allowed] == []
        assert len(vm.network.denied) == len(ways)
        trap.look()
        assert trap.got == []
