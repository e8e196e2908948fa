"""Answers to packets that bypass the proxy: RST, ICMP unreachable, NXDOMAIN; pure functions.

A machine has no network except its proxy. Packets that programs send past it are answered in a way that
makes the program fail at once, and are reported. Sources: RFC 791, 792, 1035, 4443, 8200, 9293.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
_QUOTED_4, _QUOTED_6 = 548, 1232  # bytes of the packet that an ICMP error may carry
_ECHO_4, _ECHO_6 = 8, 128
# Replies and errors, which get no answer; neighbour and group messages, which a kernel sends by itself.
_SILENT_4 = {0, 3, 4, 5, 9, 10, 11, 12, 14, 16, 18}
_SILENT_6 = {*range(128), 129, *range(130, 138), 143}
_EXTENSIONS = {0, 43, 60}  # hop-by-hop options, routing, destination options
_FRAGMENT = 44
_MAX_EXTENSIONS = 8
_DNS_PORT = 53
_MAX_NAME = 255
_TYPE_A = 1
_NXDOMAIN = 3
_PROHIBITED_4, _PORT_4 = (3, 13), (3, 3)  # ICMP type and code
_PROHIBITED_6, _PORT_6 = (1, 1), (1, 4)


class NetworkAttempt(NamedTuple):
    """A program's attempt to reach a network; ``protocol`` is TCP, UDP, ICMP, DNS or ``IP/<number>``."""

    protocol: str
    address: str
    port: int
    name: str = ""


class _Packet(NamedTuple):
    """The parts of an IP packet that answers are made from."""

    version: int
    source: bytes
    target: bytes
    protocol: int
    payload: bytes
    whole: bytes


def judge(data: bytes, own_name: str = "") -> tuple[NetworkAttempt | None, bytes | None]:
    """Classify a packet; return the attempt to report and the answer to send, each ``None`` if there is none.

    Args:
        data: One IPv4 or IPv6 packet sent by a program.
        own_name: The machine's name: a lookup of it is not reported as an attempt.
    """
    packet = _parse(data)
    if packet is None or _to_many(packet):
        return None, None
    address = socket.inet_ntop(_family(packet), packet.target)
    if packet.protocol == TCP:
        return _judge_tcp(packet, address)
    if packet.protocol == UDP:
        return _judge_udp(packet, address, own_name)
    if packet.protocol == (ICMP if packet.version == 4 else ICMP6):  # noqa: PLR2004 - IP's version
        return _judge_icmp(packet, address)
    return NetworkAttempt(f"IP/{packet.protocol}", address, 0), _unreachable(
        packet, _PROHIBITED_4, _PROHIBITED_6
    )


def checksum(data: bytes) -> int:
    """Return the Internet checksum of ``data`` (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _family(packet: _Packet) -> int:
    return socket.AF_INET if packet.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IP's version


def _to_many(packet: _Packet) -> bool:
    """Return True for a multicast target, or an unspecified source, as in a kernel's own messages."""
    if packet.version == 4:  # noqa: PLR2004 - IP's version
        return 224 <= packet.target[0] < 240  # noqa: PLR2004 - RFC 5771
    return packet.target[0] == 0xFF or not any(packet.source)  # noqa: PLR2004 - RFC 4291


def _parse(data: bytes) -> _Packet | None:
    """Parse an IP packet; return ``None`` if it is truncated, malformed, or not the first fragment."""
    if not data:
        return None
    version = data[0] >> 4
    if version == 4:  # noqa: PLR2004 - IP's version
        return _parse_4(data)
    return _parse_6(data) if version == 6 else None  # noqa: PLR2004 - IP's version


def _parse_4(data: bytes) -> _Packet | None:
    begin = (data[0] & 15) * 4
    if begin < 20 or len(data) < begin:  # noqa: PLR2004 - a header without options
        return None
    length, _number, fragment = struct.unpack_from("!HHH", data, 2)
    if not begin <= length <= len(data) or fragment & 0x1FFF:
        return None
    return _Packet(4, data[12:16], data[16:20], data[9], data[begin:length], data[:length])


def _parse_6(data: bytes) -> _Packet | None:
    if len(data) < 40:  # noqa: PLR2004 - the fixed header
        return None
    length, protocol = struct.unpack_from("!HB", data, 4)
    begin, end = 40, 40 + length
    if end > len(data):
        return None
    for _ in range(_MAX_EXTENSIONS):
        if protocol not in _EXTENSIONS and protocol != _FRAGMENT:
            return _Packet(6, data[8:24], data[24:40], protocol, data[begin:end], data[:end])
        if end - begin < 8:  # noqa: PLR2004 - the smallest extension header
            return None
        following, size = data[begin], data[begin + 1]
        if protocol == _FRAGMENT and struct.unpack_from("!H", data, begin + 2)[0] & 0xFFF8:
            return None
        begin += 8 if protocol == _FRAGMENT else 8 + size * 8
        protocol = following
    return None


def _judge_tcp(packet: _Packet, address: str) -> tuple[NetworkAttempt | None, bytes | None]:
    if len(packet.payload) < 20:  # noqa: PLR2004 - a header without options
        return None, None
    source, port, number, acknowledged, offset, flags = struct.unpack_from("!HHIIBB", packet.payload)
    if flags & _RST or offset >> 4 < 5 or len(packet.payload) < (offset >> 4) * 4:  # noqa: PLR2004 - words
        return None, None
    if flags & _ACK:  # RFC 9293, 3.5.2: the reset for a segment of no connection
        answer = struct.pack("!HHIIBBHHH", port, source, acknowledged, 0, 5 << 4, _RST, 0, 0, 0)
    else:
        length = len(packet.payload) - (offset >> 4) * 4 + bool(flags & _SYN) + bool(flags & _FIN)
        confirmed = (number + length) & 0xFFFFFFFF
        answer = struct.pack("!HHIIBBHHH", port, source, 0, confirmed, 5 << 4, _RST | _ACK, 0, 0, 0)
    opens = flags & _SYN and not flags & _ACK
    return NetworkAttempt("TCP", address, port) if opens else None, _reply(packet, TCP, answer, 16)


def _judge_udp(packet: _Packet, address: str, own_name: str) -> tuple[NetworkAttempt | None, bytes | None]:
    if len(packet.payload) < 8:  # noqa: PLR2004 - the header
        return None, None
    source, port, length = struct.unpack_from("!HHH", packet.payload)
    if port == _DNS_PORT:
        query = packet.payload[8 : max(8, length)]
        found = _question(query)
        if found is not None:
            name, end = found
            own = bool(own_name) and name.lower().rstrip(".") == own_name.lower()
            said = _dns_answer(query, end, own=own)
            answer = struct.pack("!HHHH", port, source, 8 + len(said), 0) + said
            attempt = None if own else NetworkAttempt("DNS", address, port, name)
            return attempt, _reply(packet, UDP, answer, 6)
    return NetworkAttempt("UDP", address, port), _unreachable(packet, _PORT_4, _PORT_6)


def _judge_icmp(packet: _Packet, address: str) -> tuple[NetworkAttempt | None, bytes | None]:
    silent = _SILENT_4 if packet.version == 4 else _SILENT_6  # noqa: PLR2004 - IP's version
    if len(packet.payload) < 8 or packet.payload[0] in silent:  # noqa: PLR2004 - the header
        return None, None
    return NetworkAttempt("ICMP", address, 0), _unreachable(packet, _PROHIBITED_4, _PROHIBITED_6)


def _question(query: bytes) -> tuple[str, int] | None:
    """Parse a DNS query; return the queried name and the question's end offset, or ``None`` if malformed."""
    if len(query) < 12:  # noqa: PLR2004 - the header
        return None
    flags, questions = struct.unpack_from("!HH", query, 2)
    if flags & 0xF800 or questions != 1:  # a response, or an operation other than a query
        return None
    labels: list[str] = []
    place = 12
    while place < len(query) and place < 12 + _MAX_NAME:
        size = query[place]
        if size == 0:
            return ".".join(labels) + ("" if labels else "."), place + 5
        if size > 63 or place + 1 + size > len(query):  # noqa: PLR2004 - RFC 1035, 2.3.4
            return None
        labels.append("".join(_shown(byte) for byte in query[place + 1 : place + 1 + size]))
        place += 1 + size
    return None


def _shown(byte: int) -> str:
    """Return a byte of a label as text (RFC 4343)."""
    if byte in b".\\":
        return "\\" + chr(byte)
    return chr(byte) if 0x20 < byte < 0x7F else f"\\{byte:03d}"  # noqa: PLR2004 - printable ASCII


def _dns_answer(query: bytes, end: int, *, own: bool) -> bytes:
    """Return the DNS response: NXDOMAIN, or 127.0.0.1 for the machine's own name."""
    number, flags = struct.unpack_from("!HH", query)
    question = query[12:end]
    records = b""
    if own and question[-4:-2] == struct.pack("!H", _TYPE_A):
        records = struct.pack("!HHHIH", 0xC00C, _TYPE_A, 1, 0, 4) + bytes((127, 0, 0, 1))
    said = 0x8080 | (flags & 0x0100) | (0 if own else _NXDOMAIN)
    return struct.pack("!HHHHHH", number, said, 1, int(bool(records)), 0, 0) + question + records


def _unreachable(packet: _Packet, why_4: tuple[int, int], why_6: tuple[int, int]) -> bytes | None:
    """Return an ICMP error of the given type and code, sent from the packet's target address."""
    if packet.version == 4:  # noqa: PLR2004 - IP's version
        if packet.target == b"\xff\xff\xff\xff":
            return None
        body = struct.pack("!BBHI", *why_4, 0, 0) + packet.whole[:_QUOTED_4]
        return _reply(packet, ICMP, body, 2)
    body = struct.pack("!BBHI", *why_6, 0, 0) + packet.whole[:_QUOTED_6]
    return _reply(packet, ICMP6, body, 2)


def _reply(packet: _Packet, protocol: int, body: bytes, checksum_at: int) -> bytes:
    """Return ``body`` as a packet to the sender, with its checksum at offset ``checksum_at``."""
    source, target = packet.target, packet.source
    pseudo = b""
    if packet.version == 6:  # noqa: PLR2004 - IP's version
        pseudo = source + target + struct.pack("!II", len(body), protocol)
    elif protocol != ICMP:
        pseudo = source + target + struct.pack("!BBH", 0, protocol, len(body))
    total = checksum(pseudo + body)
    if protocol == UDP and total == 0:  # 0 would mean "no checksum"
        total = 0xFFFF
    body = body[:checksum_at] + struct.pack("!H", total) + body[checksum_at + 2 :]
    if packet.version == 6:  # noqa: PLR2004 - IP's version
        return struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + source + target + body
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0) + source + target
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + body
