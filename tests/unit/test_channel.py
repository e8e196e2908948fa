"""Channel: hello, messages, streams with credit; honest peers never violate, liars always end."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pytest_microvm.wire.channel import (
    GRANT,
    MAX_STREAMS,
    VERSION,
    WINDOW,
    Channel,
    Closed,
    Credit,
    Data,
    Hello,
    Message,
)
from pytest_microvm.wire.frames import HEADER, MAX_PAYLOAD, MAX_STREAM, Kind, WireError, encode

HELLO = encode(Kind.HELLO, 0, json.dumps({"version": VERSION, "role": "agent"}).encode())


def credit(size):
    return struct.pack("!I", size)


def greeted(stream=None):
    """Return a channel whose peer has said hello, with ``stream`` open."""
    channel = Channel("host")
    list(channel.receive(HELLO))
    channel.take()
    if stream is not None:
        channel.open(stream)
    return channel


def test_each_end_learns_who_the_other_is():
    host, guest = Channel("host"), Channel("agent")
    assert list(guest.receive(host.take())) == [Hello(VERSION, "host")]
    assert list(host.receive(guest.take())) == [Hello(VERSION, "agent")]
    assert host.peer == Hello(VERSION, "agent")
    assert host.take() == b""


def conversation():
    guest = Channel("agent")
    guest.send({"id": 1, "result": {"text": "ä\n"}})
    guest.open(1)
    guest.write(1, b"some bytes")
    guest.close(1)
    return guest.take()


CONVERSATION_EVENTS = [
    Hello(VERSION, "agent"),
    Message({"id": 1, "result": {"text": "ä\n"}}),
    Data(1, b"some bytes"),
    Closed(1),
]


def test_a_conversation_whole():
    host = Channel("host")
    host.open(1)
    assert list(host.receive(conversation())) == CONVERSATION_EVENTS


def test_a_conversation_byte_by_byte():
    host = Channel("host")
    host.open(1)
    events = [event for byte in conversation() for event in host.receive(bytes([byte]))]
    assert events == CONVERSATION_EVENTS
    assert host.pending == 0


def test_a_conversation_with_trailing_bytes():
    host = Channel("host")
    host.open(1)
    assert list(host.receive(conversation() + b"\x02\x00")) == CONVERSATION_EVENTS
    assert host.pending == 2


def test_stream_can_be_opened_between_its_message_and_its_data():
    host, guest = Channel("host"), Channel("agent")
    host.open(5)
    host.send({"id": 1, "stdin": 5})
    host.write(5, b"input")
    seen = []
    for event in guest.receive(host.take()):
        seen.append(event)
        if isinstance(event, Message):
            guest.open(event.body["stdin"])
    assert seen[2:] == [Data(5, b"input")]


def test_more_than_the_window_is_not_sent_until_it_is_granted():
    host, guest = greeted(1), greeted(1)
    assert host.room(1) == WINDOW
    assert host.write(1, bytes(WINDOW + 10)) == WINDOW
    assert host.write(1, b"x") == 0
    assert host.room(1) == 0
    received = sum(len(event.data) for event in guest.receive(host.take()))
    assert received == WINDOW
    guest.consumed(1, GRANT - 1)
    assert guest.take() == b""
    guest.consumed(1, 1)
    assert list(host.receive(guest.take())) == [Credit(1)]
    assert host.write(1, bytes(WINDOW)) == GRANT


def test_credit_for_single_bytes_is_batched():
    """A peer that reads nothing would have it grow without limit."""
    host = greeted(1)
    frame = encode(Kind.DATA, 1, b"x")
    for _ in range(WINDOW * 2):
        for event in host.receive(frame):
            host.consumed(1, len(event.data))
    assert len(host.take()) <= 2 * WINDOW // GRANT * 13


def test_data_frames_respect_their_limit():
    channel = greeted(1)
    channel.write(1, bytes(MAX_PAYLOAD[Kind.DATA] + 1))
    assert channel.take() == encode(Kind.DATA, 1, bytes(MAX_PAYLOAD[Kind.DATA])) + encode(Kind.DATA, 1, b"\0")


def test_flush_writes_what_is_accepted_and_keeps_the_rest():
    channel = greeted(1)
    channel.write(1, bytes(range(200)))
    expected = encode(Kind.DATA, 1, bytes(range(200)))
    written, pieces = bytearray(), []

    def write(piece):
        pieces.append(piece)  # a reference that outlives the call does not lock the queue
        if len(written) == 100:
            raise BlockingIOError
        written.extend(piece[:50])
        return min(len(piece), 50)

    assert not channel.flush(write)
    assert (written, channel.queued) == (expected[:100], len(expected) - 100)
    channel.close(1)
    written.extend(b"accepts more")
    assert channel.flush(write)
    assert written == expected[:100] + b"accepts more" + expected[100:] + encode(Kind.CLOSE, 1)
    assert channel.queued == 0


def test_flush_of_a_broken_connection_can_be_dropped():
    channel = greeted(1)
    channel.write(1, b"abc")

    def write(piece):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        channel.flush(write)
    assert channel.take() == encode(Kind.DATA, 1, b"abc")
    assert channel.flush(write)


def test_a_stream_is_forgotten_when_both_ends_have_closed():
    host, guest = greeted(1), greeted(1)
    host.close(1)
    host.close(1)
    assert host.is_open(1)
    assert host.room(1) is None
    assert list(guest.receive(host.take())) == [Closed(1)]
    guest.write(1, b"the other direction goes on")
    guest.close(1)
    assert list(host.receive(guest.take())) == [Data(1, b"the other direction goes on"), Closed(1)]
    assert not host.is_open(1)
    assert not guest.is_open(1)
    assert host.open_streams == guest.open_streams == 0


def test_a_grant_for_a_stream_that_is_gone_is_ignored():
    assert list(greeted().receive(encode(Kind.CREDIT, 9, credit(1)))) == [Credit(9)]


def test_nothing_is_granted_to_a_peer_that_has_closed():
    host = greeted(1)
    list(host.receive(encode(Kind.DATA, 1, b"abc") + encode(Kind.CLOSE, 1)))
    host.consumed(1, 3)
    host.consumed(99, 3)
    assert host.take() == b""


def test_misuse_on_this_end_is_a_value_error():
    channel = greeted(1)
    with pytest.raises(ValueError, match="open already"):
        channel.open(1)
    channel.close(1)
    with pytest.raises(ValueError, match="closed for writing"):
        channel.write(1, b"x")
    with pytest.raises(ValueError, match="MESSAGE payload"):
        channel.send({"data": "x" * MAX_PAYLOAD[Kind.MESSAGE]})
    for number in range(2, MAX_STREAMS + 1):
        channel.open(number)
    with pytest.raises(ValueError, match=f"more than {MAX_STREAMS}"):
        channel.open(MAX_STREAMS + 1)


VIOLATIONS = {
    "data of nothing": (HELLO, encode(Kind.DATA, 1), "DATA without data"),
    "credit of nothing": (HELLO, encode(Kind.CREDIT, 1, credit(0)), "CREDIT without credit"),
    "message before hello": (b"", encode(Kind.MESSAGE, 0, b"{}"), "MESSAGE frame before hello"),
    "data before hello": (b"", encode(Kind.DATA, 1, b""), "DATA frame before hello"),
    "second hello": (HELLO, HELLO, "a second hello"),
    "hello of another version": (
        b"",
        encode(Kind.HELLO, 0, b'{"version":2,"role":"a"}'),
        "version 2, this end 1",
    ),
    "hello with a boolean version": (
        b"",
        encode(Kind.HELLO, 0, b'{"version":true,"role":"a"}'),
        "without version",
    ),
    "hello without role": (b"", encode(Kind.HELLO, 0, b'{"version":1}'), "without version and role"),
    "message that is not JSON": (HELLO, encode(Kind.MESSAGE, 0, b"{"), "not JSON"),
    "message that is not UTF-8": (HELLO, encode(Kind.MESSAGE, 0, b'{"a":"\xff"}'), "not JSON"),
    "message that is nested without end": (HELLO, encode(Kind.MESSAGE, 0, b"[" * 100_000), "not JSON"),
    "message with a number without end": (HELLO, encode(Kind.MESSAGE, 0, b"9" * 10_000), "not JSON"),
    "message that is a list": (HELLO, encode(Kind.MESSAGE, 0, b"[]"), "not a JSON object"),
    "data on a stream that is not open": (HELLO, encode(Kind.DATA, 2, b"x"), "stream 2, which is not open"),
    "close of a stream that is not open": (HELLO, encode(Kind.CLOSE, 2), "stream 2, which is not open"),
    "data after close": (
        HELLO,
        encode(Kind.CLOSE, 1) + encode(Kind.DATA, 1, b"x"),
        "stream 1, which is not open",
    ),
    "second close": (HELLO, encode(Kind.CLOSE, 1) * 2, "stream 1, which is not open"),
    "credit beyond the window": (HELLO, encode(Kind.CREDIT, 1, credit(1)), "credit beyond the window"),
    "short credit": (HELLO, encode(Kind.CREDIT, 1, b"\0\0\0"), "wrong size"),
    "more data than granted": (
        HELLO,
        encode(Kind.DATA, 1, bytes(65536)) * (WINDOW // 65536) + encode(Kind.DATA, 1, b"x"),
        "more bytes than were granted",
    ),
}


@pytest.mark.parametrize(("before", "data", "message"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_violations(before, data, message):
    channel = Channel("host")
    channel.open(1)
    list(channel.receive(before))
    with pytest.raises(WireError, match=message):
        list(channel.receive(data))


raw_frames = st.builds(
    lambda kind, stream, payload: HEADER.pack(kind, stream, len(payload)) + payload,
    st.integers(0, 7),
    st.sampled_from([0, 1, 2, 3, MAX_STREAM, MAX_STREAM + 1]),
    st.one_of(
        st.binary(max_size=64),
        st.integers(0, 2**32 - 1).map(credit),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ).map(lambda value: json.dumps(value).encode()),
    ),
)


@given(st.booleans(), st.lists(st.one_of(raw_frames, st.binary(max_size=64))))
def test_arbitrary_guest_bytes_raise_only_wire_errors(greet, pieces):
    channel = Channel("host")
    channel.open(1)
    channel.open(2)
    channel.close(2)
    try:
        if greet:
            list(channel.receive(HELLO))
        for piece in pieces:
            for event in channel.receive(piece):
                assert isinstance(event, (Hello, Message, Data, Credit, Closed))
    except WireError:
        pass


@given(
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()))
)
def test_messages_survive_the_way(body):
    host, guest = greeted(), greeted()
    host.send(body)
    assert list(guest.receive(host.take())) == [Message(body)]


class HonestPeers(RuleBasedStateMachine):
    """Two channels, bytes under way in both directions, delivered in pieces at any time."""

    @initialize()
    def meet(self):
        self.ends = [Channel("host"), Channel("agent")]
        self.under_way = [bytearray(), bytearray()]  # [i]: sent by i, not yet received
        self.sent = [bytearray(), bytearray()]
        self.received = [bytearray(), bytearray()]
        self.unconsumed = [0, 0]
        for end in self.ends:
            end.open(1)

    def collect(self, side):
        self.under_way[side] += self.ends[side].take()

    @rule(side=st.integers(0, 1), data=st.binary(max_size=100), repeat=st.sampled_from([1, 700, 5000]))
    def write(self, side, data, repeat):
        if self.ends[side].room(1) is not None:
            data = data * repeat
            sent = self.ends[side].write(1, data)
            self.sent[side] += data[:sent]
            self.collect(side)

    @rule(side=st.integers(0, 1), size=st.sampled_from([1, 8, 9, 100, 70_000, 10**6]))
    def deliver(self, side, size):
        piece = bytes(self.under_way[side][:size])
        del self.under_way[side][:size]
        for event in self.ends[1 - side].receive(piece):
            if isinstance(event, Data):
                self.received[side] += event.data
                self.unconsumed[1 - side] += len(event.data)

    @rule(side=st.integers(0, 1))
    def consume(self, side):
        self.ends[side].consumed(1, self.unconsumed[side])
        self.unconsumed[side] = 0
        self.collect(side)

    @rule(side=st.integers(0, 1))
    @precondition(lambda self: len(self.sent[0]) + len(self.sent[1]) > 1000)
    def close(self, side):
        self.ends[side].close(1)
        self.collect(side)

    @invariant()
    def nothing_is_lost_changed_or_kept_beyond_the_window(self):
        for side in (0, 1):
            assert self.sent[side].startswith(self.received[side])
            assert self.unconsumed[side] <= WINDOW

    def teardown(self):
        for side in (0, 1):
            self.deliver(side, len(self.under_way[side]))
            assert self.sent[side] == self.received[side]


test_honest_peers_never_violate = HonestPeers.TestCase
