"""Download as the network's benchmark asks for it, here or in a machine; needs the standard library alone.

Reads from stdin, as JSON: ``proxy`` (host and port, or null), ``tls`` (the authority's certificate,
``system``, or null), ``target`` (host and port to connect to without a proxy), ``host``, ``path``, ``small``
(how many small answers), ``large`` (bytes), ``together`` (how many at once). Writes seconds, as JSON.
"""

from __future__ import annotations

import json
import selectors
import socket
import ssl
import sys
import time
from typing import Any


def main() -> None:
    """Do what is asked for on stdin."""
    asked = json.load(sys.stdin)
    small = [timed(asked, f"{asked['path']}/1") for _ in range(asked["small"])]
    told: dict[str, Any] = {"small": small[1:]}  # what is done first is translated then, under emulation
    if asked["large"]:
        told["large"] = timed(asked, f"{asked['path']}/{asked['large']}")
    if asked["together"]:
        told["together"] = together(asked)
    sys.stdout.write(json.dumps(told))


def timed(asked: dict[str, Any], path: str) -> float:
    """Return how long one download takes, its connection included."""
    begin = time.perf_counter()
    with connected(asked) as sock:
        sock.sendall(request(asked, path))
        take(sock, int(path.rpartition("/")[2]))
    return time.perf_counter() - begin


def connected(asked: dict[str, Any]) -> socket.socket:
    """Return a connection to the server."""
    sock = socket.create_connection(asked["proxy"] or asked["target"])
    if asked["tls"] is None:
        return sock
    if asked["proxy"]:
        sock.sendall(f"CONNECT {asked['host']}:443 HTTP/1.1\r\nHost: {asked['host']}:443\r\n\r\n".encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
    return tls_context(asked["tls"]).wrap_socket(sock, server_hostname=asked["host"])


_contexts: dict[str, ssl.SSLContext] = {}


def tls_context(certificate: str) -> ssl.SSLContext:
    """Return the context that trusts an authority; ``system``: those of the system, as clients use them."""
    if certificate not in _contexts:
        cadata = None if certificate == "system" else certificate
        _contexts[certificate] = ssl.create_default_context(cadata=cadata)
    return _contexts[certificate]


def request(asked: dict[str, Any], path: str) -> bytes:
    """Return the request for a path, as the proxy or the server gets it."""
    whole = f"http://{asked['host']}" if asked["proxy"] and asked["tls"] is None else ""
    return f"GET {whole}{path} HTTP/1.1\r\nHost: {asked['host']}\r\nConnection: close\r\n\r\n".encode()


def take(sock: socket.socket, size: int) -> None:
    """Read an answer to its end, and make sure that it is whole."""
    buffer = bytearray(1 << 18)
    got = sock.recv_into(buffer)
    head = bytes(buffer[:got])
    while b"\r\n\r\n" not in head:
        got = sock.recv_into(buffer)
        if not got:
            break
        head += buffer[:got]
    begin, _, body = head.partition(b"\r\n\r\n")
    received = len(body)
    while piece := sock.recv_into(buffer):
        received += piece
    if b" 200 " not in begin or received != size:
        raise SystemExit(f"{received} bytes of {size}: {begin!r}")


def together(asked: dict[str, Any]) -> float:
    """Return how long many downloads of 16 KiB take, all at the same time."""
    size = 16 * 1024
    begin = time.perf_counter()
    selector = selectors.DefaultSelector()
    left: dict[socket.socket, int] = {}
    for _ in range(asked["together"]):
        sock = connected(asked)
        sock.sendall(request(asked, f"{asked['path']}/{size}"))
        selector.register(sock, selectors.EVENT_READ)
        left[sock] = 0
    sizes = []
    while left:
        for key, _events in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            data = sock.recv(65536)
            left[sock] += len(data)
            if not data:
                selector.unregister(sock)
                sizes.append(left.pop(sock))
                sock.close()
    if min(sizes) < size:
        raise SystemExit(f"{sum(got < size for got in sizes)} of {len(sizes)} downloads were not whole")
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
