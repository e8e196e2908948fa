"""What is said to packets that have nowhere to go: judged by value, checksums verified independently."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.guest.packets import NetworkAttempt, checksum, judge

SOURCE_4, TARGET_4 = "192.0.0.8", "198.51.100.7"
SOURCE_6, TARGET_6 = "fd6d:6963:726f:766d::1", "2001:db8::7"
TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
SYN, RST, ACK, FIN = 2, 4, 16, 1


def ip4(protocol, payload, *, source=SOURCE_4, target=TARGET_4, options=b"", fragment=0, length=None):
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x40 | (5 + len(options) // 4),
        0,
        20 + len(options) + len(payload) if length is None else length,
        7,
        fragment,
        64,
        protocol,
        0,
        socket.inet_aton(source),
        socket.inet_aton(target),
    )
    return header + options + payload


def ip6(protocol, payload, *, source=SOURCE_6, target=TARGET_6, length=None):
    size = len(payload) if length is None else length
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    return struct.pack("!IHBB", 6 << 28, size, protocol, 64) + ends + payload


def tcp(flags, *, port=443, number=1000, acknowledged=0, data=b"", options=b""):
    words = 5 + len(options) // 4
    return (
        struct.pack("!HHIIBBHHH", 40000, port, number, acknowledged, words << 4, flags, 0, 0, 0)
        + options
        + data
    )


def udp(data, port=9):
    return struct.pack("!HHHH", 40000, port, 8 + len(data), 0) + data


def query(name, kind=1, flags=0x0100, questions=1):
    labels = b"".join(bytes([len(label)]) + label for label in name.split(b".") if label)
    return (
        struct.pack("!HHHHHH", 0x1234, flags, questions, 0, 0, 0)
        + labels
        + b"\0"
        + struct.pack("!HH", kind, 1)
    )


def read(answer):
    """Return (source, target, protocol, payload) of an answer whose checksums hold."""
    if answer[0] >> 4 == 4:
        assert checksum(answer[:20]) == 0
        assert struct.unpack_from("!H", answer, 2)[0] == len(answer)
        source, target = socket.inet_ntoa(answer[12:16]), socket.inet_ntoa(answer[16:20])
        protocol, payload = answer[9], answer[20:]
        pseudo = b"" if protocol == ICMP else answer[12:20] + struct.pack("!BBH", 0, protocol, len(payload))
    else:
        assert struct.unpack_from("!H", answer, 4)[0] == len(answer) - 40
        source, target = (socket.inet_ntop(socket.AF_INET6, answer[at : at + 16]) for at in (8, 24))
        protocol, payload = answer[6], answer[40:]
        pseudo = answer[8:40] + struct.pack("!II", len(payload), protocol)
    assert checksum(pseudo + payload) == 0
    return source, target, protocol, payload


BOTH = pytest.mark.parametrize(
    ("ip", "source", "target", "icmp"),
    [(ip4, SOURCE_4, TARGET_4, ICMP), (ip6, SOURCE_6, TARGET_6, ICMP6)],
    ids=["IPv4", "IPv6"],
)


def test_checksum_is_the_rfcs():
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2  # RFC 1071, section 3
    assert checksum(b"\x01") == 0xFEFF


@BOTH
def test_a_connection_is_refused(ip, source, target, icmp):
    attempt, answer = judge(ip(TCP, tcp(SYN, number=0xFFFFFFFF, options=bytes(20))))
    assert attempt == NetworkAttempt("TCP", target, 443)
    said_by, said_to, protocol, segment = read(answer)
    assert (said_by, said_to, protocol) == (target, source, TCP)
    ports_and_numbers = struct.unpack("!HHIIBB", segment[:14])
    assert ports_and_numbers == (443, 40000, 0, 0, 5 << 4, RST | ACK)  # the number after the last one is 0


@BOTH
def test_a_segment_of_no_connection_is_reset_and_no_attempt(ip, source, target, icmp):
    attempt, answer = judge(ip(TCP, tcp(ACK, acknowledged=77, data=b"hello")))
    assert attempt is None
    assert struct.unpack("!IIBB", read(answer)[3][4:14]) == (77, 0, 5 << 4, RST)
    attempt, answer = judge(ip(TCP, tcp(FIN, number=10, data=b"hello")))
    assert attempt is None
    assert struct.unpack("!II", read(answer)[3][4:12]) == (0, 16)
    assert judge(ip(TCP, tcp(RST))) == (None, None)


@BOTH
def test_a_datagram_has_no_port_to_go_to(ip, source, target, icmp):
    packet = ip(UDP, udp(bytes(1400)))
    attempt, answer = judge(packet)
    assert attempt == NetworkAttempt("UDP", target, 9)
    said_by, said_to, protocol, message = read(answer)
    assert (said_by, said_to, protocol) == (target, source, icmp)
    assert tuple(message[:2]) == ((3, 3) if icmp == ICMP else (1, 4))
    assert packet.startswith(message[8:])
    assert len(answer) <= (576 if icmp == ICMP else 1280)


@BOTH
def test_an_echo_is_prohibited(ip, source, target, icmp):
    attempt, answer = judge(ip(icmp, bytes([8 if icmp == ICMP else 128, 0, 0, 0, 0, 1, 0, 1])))
    assert attempt == NetworkAttempt("ICMP", target, 0)
    assert tuple(read(answer)[3][:2]) == ((3, 13) if icmp == ICMP else (1, 1))


@BOTH
def test_another_protocol_is_prohibited_and_named(ip, source, target, icmp):
    attempt, answer = judge(ip(47, b"tunnel"))
    assert attempt == NetworkAttempt("IP/47", target, 0)
    assert read(answer)[2] == icmp


@pytest.mark.parametrize("kind", [0, 3, 5, 11])
def test_icmp_errors_and_replies_get_no_answer(kind):
    assert judge(ip4(ICMP, bytes([kind]) + bytes(30))) == (None, None)


@pytest.mark.parametrize("kind", [1, 3, 129, 133, 135, 143])
def test_automatic_packets_of_a_kernel_get_no_answer(kind):
    assert judge(ip6(ICMP6, bytes([kind]) + bytes(30))) == (None, None)
    assert judge(ip6(UDP, udp(b""), source="::")) == (None, None)


def test_groups_are_ignored_and_a_broadcast_is_not_answered():
    assert judge(ip4(UDP, udp(b"x", 5353), target="224.0.0.251")) == (None, None)
    assert judge(ip6(UDP, udp(b"x", 5353), target="ff02::fb")) == (None, None)
    assert judge(ip4(UDP, udp(b"x", 67), target="255.255.255.255")) == (
        NetworkAttempt("UDP", "255.255.255.255", 67),
        None,
    )


@BOTH
def test_a_name_does_not_exist(ip, source, target, icmp):
    asked = query(b"secret.example.com", kind=28)
    attempt, answer = judge(ip(UDP, udp(asked, 53)), "vm-1")
    assert attempt == NetworkAttempt("DNS", target, 53, "secret.example.com")
    said_by, said_to, protocol, datagram = read(answer)
    assert (said_by, said_to, protocol) == (target, source, UDP)
    assert struct.unpack("!HHH", datagram[:6]) == (53, 40000, len(datagram))
    response = datagram[8:]
    assert struct.unpack("!HHHHHH", response[:12]) == (0x1234, 0x8183, 1, 0, 0, 0)  # NXDOMAIN
    assert response[12:] == asked[12:]


def test_the_machines_own_name_is_itself_and_no_attempt():
    attempt, answer = judge(ip4(UDP, udp(query(b"VM-1"), 53)), "vm-1")
    assert attempt is None
    response = read(answer)[3][8:]
    assert struct.unpack("!HHH", response[2:8]) == (0x8180, 1, 1)
    assert response[-4:] == bytes([127, 0, 0, 1])
    attempt, answer = judge(ip4(UDP, udp(query(b"vm-1", kind=28), 53)), "vm-1")
    assert attempt is None
    assert struct.unpack("!HHH", read(answer)[3][10:16]) == (0x8180, 1, 0)  # no IPv6 address, but no error
    assert judge(ip4(UDP, udp(query(b"vm-1.evil.example"), 53)), "vm-1")[0].name == "vm-1.evil.example"
    assert judge(ip4(UDP, udp(query(b""), 53)), "")[0] == NetworkAttempt("DNS", TARGET_4, 53, ".")


def test_special_bytes_and_dots_in_dns_labels_are_escaped():
    attempt, _answer = judge(ip4(UDP, udp(query(b"a\x1b\xff\\b.com"), 53)))
    assert attempt.name == "a\\027\\255\\\\b.com"
    labels = bytes([3]) + b"a.b" + b"\0"
    head = struct.pack("!HHHHHH", 1, 0, 1, 0, 0, 0)
    assert judge(ip4(UDP, udp(head + labels + bytes(4), 53)))[0].name == "a\\.b"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 12,
        query(b"a.b", questions=2),
        query(b"a.b", flags=0x8000),
        query(b"a.b", flags=0x2800),
        query(b"a.b")[:14],
        struct.pack("!HHHHHH", 1, 0, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1",
        struct.pack("!HHHHHH", 1, 0, 1, 0, 0, 0) + b"\x3f" + b"x" * 63 + (b"\x3f" + b"x" * 63) * 5 + b"\0",
    ],
)
def test_what_is_no_question_is_a_datagram_like_others(data):
    attempt, answer = judge(ip4(UDP, udp(data, 53)))
    assert attempt == NetworkAttempt("UDP", TARGET_4, 53)
    assert read(answer)[2] == ICMP


def test_options_and_extension_headers_are_stepped_over():
    assert judge(ip4(TCP, tcp(SYN), options=bytes(12)))[0] == NetworkAttempt("TCP", TARGET_4, 443)
    options = bytes([60, 0]) + bytes(6)  # hop-by-hop, then destination options
    more = bytes([44, 1]) + bytes(14)  # of 16 bytes, then a fragment header
    fragment = bytes([TCP, 0, 0, 1, 0, 0, 0, 9])  # the first fragment, more follow
    assert judge(ip6(0, options + more + fragment + tcp(SYN)))[0] == NetworkAttempt("TCP", TARGET_6, 443)


def test_fragments_but_the_first_are_ignored():
    assert judge(ip4(UDP, udp(b"x"), fragment=0x2000))[0] == NetworkAttempt("UDP", TARGET_4, 9)
    assert judge(ip4(UDP, udp(b"x"), fragment=0x2001)) == (None, None)
    assert judge(ip6(44, bytes([UDP, 0, 0, 8, 0, 0, 0, 9]) + udp(b"x"))) == (None, None)


def test_what_is_cut_off_or_lies_about_its_length_is_ignored():
    whole = ip4(TCP, tcp(SYN))
    assert [judge(whole[:size]) for size in range(len(whole))] == [(None, None)] * len(whole)
    whole = ip6(TCP, tcp(SYN))
    assert [judge(whole[:size]) for size in range(len(whole))] == [(None, None)] * len(whole)
    assert judge(ip4(TCP, tcp(SYN), length=2000)) == (None, None)
    assert judge(ip4(TCP, tcp(SYN), length=10)) == (None, None)
    assert judge(ip4(UDP, udp(b"")[:7])) == (None, None)
    assert judge(ip4(TCP, tcp(SYN)[:19])) == (None, None)
    assert judge(ip4(TCP, struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 15 << 4, SYN, 0, 0, 0))) == (None, None)
    assert judge(ip6(0, bytes([0, 0]) + bytes(6))) == (None, None)
    assert judge(ip6(0, (bytes([0, 0]) + bytes(6)) * 20)) == (None, None)
    assert judge(b"\x50" + bytes(60)) == (None, None)


@given(
    st.binary(max_size=200),
    st.sampled_from([4, 6]),
    st.sampled_from([TCP, UDP, ICMP, ICMP6, 0, 43, 44, 60, 47]),
)
def test_any_bytes_are_answered_soundly_or_not_at_all(data, version, protocol):
    packet = ip4(protocol, data) if version == 4 else ip6(protocol, data)
    for sent in (data, packet):
        attempt, answer = judge(sent, "vm-1")
        assert attempt is None or 0 <= attempt.port <= 65535
        if answer is not None:
            assert len(answer) <= 1500
            read(answer)
