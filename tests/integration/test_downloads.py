"""Many machines and many connections: each reaches what it may and gets it whole; quotas of the network."""

import concurrent.futures
import contextlib
import hashlib
import http.server
import json
import time

import pytest

from pytest_microvm.errors import QuotaExceeded
from pytest_microvm.host.host import Host
from support.local_servers import LocalServer

MACHINES = 20
CONNECTIONS = 200
SIZE = 16 * 1024  # bytes of one download
BANDWIDTH = 100 * 1024  # bytes a second

# Opens all connections, asks on all of them, then reads what comes on whichever: tells the digest of each.
FETCH = """
import hashlib, json, selectors, socket, sys

urls = json.load(sys.stdin)
selector = selectors.DefaultSelector()
got = {url: b"" for url in urls}
asked = []
for url in urls:
    sock = socket.create_connection(("127.0.0.1", 3128))
    asked.append((sock, url))
for sock, url in asked:
    host = url.split("/")[2]
    sock.sendall(f"GET {url} HTTP/1.1\\r\\nHost: {host}\\r\\nConnection: close\\r\\n\\r\\n".encode())
    selector.register(sock, selectors.EVENT_READ, url)
while selector.get_map():
    for key, _ in selector.select():
        data = key.fileobj.recv(65536)
        got[key.data] += data
        if not data:
            selector.unregister(key.fileobj)
            key.fileobj.close()
told = {}
for url, data in got.items():
    head, _, body = data.partition(b"\\r\\n\\r\\n")
    told[url] = [int(head.split()[1]), len(body), hashlib.sha256(body).hexdigest()]
print(json.dumps(told))
"""


def content(path, size):
    """Return what the server has at a path, unlike what it has at any other."""
    word = hashlib.sha256(path.encode()).digest()
    return (word * (size // len(word) + 1))[:size]


def expected(urls, size=SIZE):
    digests = {url: hashlib.sha256(content("/" + url.split("/", 3)[3], size)).hexdigest() for url in urls}
    return {url: [200, size, digest] for url, digest in digests.items()}


class Files(LocalServer):
    def __init__(self, size=SIZE):
        super().__init__(_Handler)
        self.size = size


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(self.server.size))
        self.end_headers()
        self.wfile.write(content(self.path, self.server.size))

    def log_message(self, *_):
        pass


def download(vm, urls):
    done = vm.run(["python3", "-c", FETCH], input=json.dumps(urls), check=True, timeout=300)
    return json.loads(done.stdout)


def granted(server, *names, **limits):
    hosts = dict.fromkeys(("a.test", "b.test"), f"127.0.0.1:{server.port}")
    return {"image": "python", "network": list(names), "hosts": hosts, **limits}


def test_many_connections_of_one_machine(host):
    urls = [f"http://a.test/{number}" for number in range(CONNECTIONS)]
    with Files() as server, host.start(**granted(server, "a.test")) as vm:
        assert download(vm, urls) == expected(urls)
        requests = vm.network.requests
    assert sorted(entry.path for entry in requests) == sorted(f"/{number}" for number in range(CONNECTIONS))
    assert {(entry.allowed, entry.status) for entry in requests} == {(True, 200)}


@pytest.mark.thorough
def test_many_machines_at_once(host, monkeypatch):
    """Each a copy of one template: their network processes woke from the same sleep."""
    monkeypatch.setenv("PYTEST_MICROVM_BUDGET", f"cpus={MACHINES + 8},memory=100G")
    with contextlib.ExitStack() as stack:
        computer = Host(cache=host.cache, say=print)
        stack.callback(computer.close)
        server = stack.enter_context(Files())
        vms = [stack.enter_context(computer.start(**granted(server, "a.test"))) for _ in range(MACHINES)]
        own = {vm: [f"http://a.test/{vm.id}/{number}" for number in range(3)] for vm in vms}
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(MACHINES))
        got = list(threads.map(lambda vm: download(vm, own[vm]), vms))
        assert got == [expected(own[vm]) for vm in vms]
        for vm in vms:
            asked = sorted(f"http://{entry.host}{entry.path}" for entry in vm.network.requests)
            assert asked == own[vm]


def test_two_machines_with_different_grants(host):
    urls = ["http://a.test/x", "http://b.test/x"]
    with (
        Files() as server,
        host.start(**granted(server, "a.test")) as one,
        host.start(**granted(server, "b.test")) as other,
        concurrent.futures.ThreadPoolExecutor(2) as threads,
    ):
        got = list(threads.map(lambda vm: download(vm, urls), (one, other)))
        assert [[told[url][0] for url in urls] for told in got] == [[200, 403], [403, 200]]
        assert [entry.host for entry in one.network.denied] == ["b.test"]
        assert [entry.host for entry in other.network.denied] == ["a.test"]


@pytest.mark.parametrize(
    ("limits", "quota", "limit"),
    [({"network_bytes": "100K"}, "network_bytes", 100 * 1024), ({"connections": 5}, "connections", 5)],
)
def test_a_quota_of_the_network_ends_the_machine(host, limits, quota, limit):
    few, many = ([f"http://a.test/{number}" for number in range(count)] for count in (5, 20))
    with Files() as server:
        with host.start(**granted(server, "a.test", **limits)) as vm:
            assert download(vm, few) == expected(few)
            with pytest.raises(QuotaExceeded) as caught:
                download(vm, many)
            assert [event.kind for event in vm.events].count("quota") == 1
        assert (caught.value.quota, caught.value.limit) == (quota, limit)
        assert caught.value.observed > limit
        with host.start(**granted(server, "a.test")) as vm:
            assert download(vm, many) == expected(many)


def test_bandwidth_slows_down_and_ends_nothing(host):
    urls = [f"http://a.test/{number}" for number in range(3)]
    size = BANDWIDTH
    with Files(size) as server, host.start(**granted(server, "a.test", bandwidth=BANDWIDTH)) as vm:
        begin = time.monotonic()
        assert download(vm, urls) == expected(urls, size)
        assert time.monotonic() - begin > 0.9 * len(urls) * size / BANDWIDTH  # a slow computer takes longer
