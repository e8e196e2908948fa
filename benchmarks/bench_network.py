"""What an allowed download costs in a machine, against the same one on the host; and what a grant costs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import http.server
import json
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trustme
from measure import Samples, promise

from pytest_microvm.host.host import Host
from pytest_microvm.machine.microvm import MicroVM

DOWNLOAD = Path(__file__).with_name("download.py")
CLIENT = "/run/download.py"  # in a machine
PROXY = ("127.0.0.1", 3128)
NAME = "files.test"
SMALL = 30
LARGE = 64 * 1024 * 1024  # bytes
TOGETHER = 200
MACHINES = 20
PAIRS = 40
KINDS = {"plain": (0.05, 5.0), "TLS": (0.12, 2.0), "TLS looked into": (0.2, 2.0)}
"""Of each way to download: the most seconds a small one may take, and the least MB/s of a large one."""


def main() -> list[dict[str, object]]:
    """Measure, print, and return what was promised."""
    authority = trustme.CA()
    with tempfile.TemporaryDirectory() as folder, served(authority) as ports:
        certificate = Path(folder, "authority.pem")
        authority.cert_pem.write_to_path(str(certificate))
        os.environ["SSL_CERT_FILE"] = str(certificate)  # as a company's: machines are told of it
        os.environ.setdefault("PYTEST_MICROVM_BUDGET", f"cpus={MACHINES + 8},memory=100G")
        host = Host(say=print)
        try:
            return [
                *downloads(host, ports, certificate.read_text()),
                *at_once(host, ports),
                *starts(host, ports),
            ]
        finally:
            host.close()


def downloads(host: Host, ports: dict[str, int], certificate: str) -> list[dict[str, object]]:
    """Compare each kind of download in a machine with the same one here."""
    results = []
    for kind, (latency, least) in KINDS.items():
        tls = kind != "plain"
        asked = {"host": NAME, "path": "/ok", "small": SMALL, "large": LARGE, "together": 0}
        target = ("127.0.0.1", ports["https" if tls else "http"])
        here = json.loads(
            subprocess.run(
                [sys.executable, str(DOWNLOAD)],
                input=json.dumps(
                    {**asked, "proxy": None, "target": target, "tls": certificate if tls else None}
                ),
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        with granted(host, ports, kind) as vm:
            there = download(vm, {**asked, "tls": "system" if tls else None})
        ours, theirs = statistics.median(here["small"]), statistics.median(there["small"])
        speed, host_speed = (LARGE / 1e6 / told["large"] for told in (there, here))
        print(f"{kind}: small {theirs * 1000:.1f} ms against {ours * 1000:.1f} ms on the host;", end=" ")
        print(f"64 MiB {speed:.1f} MB/s against {host_speed:.0f} MB/s")
        results += [
            promise(f"{kind}: latency of a small download", theirs, latency, " s"),
            promise(f"{kind}: 64 MiB", speed, least, " MB/s", at_least=True),
        ]
    return results


def at_once(host: Host, ports: dict[str, int]) -> list[dict[str, object]]:
    """Many downloads through one machine, and through many machines."""
    asked = {"host": NAME, "path": "/ok", "small": 0, "large": 0, "together": TOGETHER, "tls": None}
    with granted(host, ports, "plain") as vm:
        one = download(vm, asked)["together"]
    with contextlib.ExitStack() as stack:
        vms = [stack.enter_context(granted(host, ports, "plain")) for _ in range(MACHINES)]
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(MACHINES))
        begin = time.perf_counter()
        list(threads.map(functools.partial(download, asked={**asked, "together": 10}), vms))
        many = time.perf_counter() - begin
    print(f"{TOGETHER} downloads of 16 KiB at once, one machine: {one:.2f} s")
    print(f"10 each in {MACHINES} machines at once, Python's start included: {many:.2f} s")
    return [promise(f"{TOGETHER} downloads at once through one machine", one, 10, " s")]


def starts(host: Host, ports: dict[str, int]) -> list[dict[str, object]]:
    """From asking for a machine to the result of ``run(["true"])``, in turn with and without a grant."""
    without, plain, looked = Samples(), Samples(), Samples()
    for number in range(PAIRS + 1):
        for samples, start in (
            (without, host.start),
            (plain, functools.partial(granted, host, ports, "plain")),
            (looked, functools.partial(granted, host, ports, "TLS looked into")),
        ):
            begin = time.perf_counter()
            with start() as vm:
                vm.run(["true"], check=True)
                taken = time.perf_counter() - begin
            if number:  # the first ones load what is loaded once
                samples.values.append(taken)
    print(f"without a grant         {without} s")
    print(f"with one                {plain} s")
    print(f"with one for paths      {looked} s")
    shares = [
        statistics.median(ours - none for ours, none in zip(each.values, without.values, strict=True))
        for each in (plain, looked)
    ]
    return [
        promise("a grant's share in a machine's start (paired)", shares[0], 0.05, " s"),
        promise("that of one for paths", shares[1], 0.06, " s"),
    ]


def granted(host: Host, ports: dict[str, int], kind: str) -> MicroVM:
    """Start a machine that may download in one way."""
    rule = f"https://{NAME}/ok/*" if kind == "TLS looked into" else NAME
    port = ports["http" if kind == "plain" else "https"]
    return host.start(image="python", network=[rule], hosts={NAME: f"127.0.0.1:{port}"})


def download(vm: MicroVM, asked: dict[str, Any]) -> dict[str, Any]:
    """Run the client in a machine."""
    vm.push(DOWNLOAD, CLIENT)
    told = json.dumps({**asked, "proxy": PROXY, "target": None})
    found: dict[str, Any] = json.loads(
        vm.run(["python3", CLIENT], input=told, check=True, timeout=600).stdout
    )
    return found


@contextlib.contextmanager
def served(authority: trustme.CA) -> Iterator[dict[str, int]]:
    """Serve in a process of its own, which does not share this one's time; gives the ports."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _serve(authority, write)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        ports = json.loads(pipe.readline())
    try:
        yield ports
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def _serve(authority: trustme.CA, write: int) -> None:
    plain, secure = (_Server(("127.0.0.1", 0), _Handler) for _ in range(2))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME).configure_cert(context)
    secure.socket = context.wrap_socket(secure.socket, server_side=True, do_handshake_on_connect=False)
    ports = {"http": plain.server_address[1], "https": secure.server_address[1]}
    os.write(write, json.dumps(ports).encode() + b"\n")
    os.close(write)
    threading.Thread(target=plain.serve_forever).start()
    secure.serve_forever()


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        size = int(self.path.rpartition("/")[2])
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        piece = bytes(1 << 18)
        for start in range(0, size, len(piece)):
            self.wfile.write(piece[: size - start])

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    main()
