"""What a server sends over a WebSocket: credentials are found in messages, in whatever fragments."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.network.proxy.credentials import Credential
from pytest_microvm.network.proxy.echoes import Echoes
from pytest_microvm.network.proxy.refusal import Refused
from pytest_microvm.network.proxy.websocket import Frames
from pytest_microvm.settings.secret_values import SecretValue

VALUE = b"s3cr3t/Tok+en"
BLANK = b"*" * len(VALUE)
FINAL, CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x80, 0, 1, 2, 8, 9, 10


def frame(content, first=FINAL | TEXT):
    size = len(content)
    if size < 126:
        length = bytes([size])
    else:
        length = b"\x7e" + struct.pack("!H", size) if size < 1 << 16 else b"\x7f" + struct.pack("!Q", size)
    return bytes([first]) + length + content


def searching():
    echoes = Echoes(
        [
            Credential(
                "api.example", 443, SecretValue(VALUE.decode(), "T"), "Authorization", None, "bearer", "X"
            )
        ]
    )
    return Frames(echoes.feed, echoes.blanked)


def fragments(content, sizes, opcode=TEXT, between=()):
    """Return the frames of a message that is cut into pieces of some sizes, with others between them."""
    pieces = []
    for size in sizes:
        pieces.append(content[:size])
        content = content[size:]
    pieces.append(content)
    frames = []
    for number, piece in enumerate(pieces):
        last = FINAL if number == len(pieces) - 1 else 0
        frames += [frame(piece, last | (CONTINUATION if number else opcode))]
        if not last:
            frames += between
    return frames


def read(data):
    """Return messages and frames for control, in the order in which they end; nothing else may be there."""
    found, message = [], None
    while data:
        first, size = data[0], data[1]
        data = data[2:]
        if size in (126, 127):
            width = 2 if size == 126 else 8
            size, data = int.from_bytes(data[:width], "big"), data[width:]
        content, data = data[:size], data[size:]
        assert len(content) == size
        opcode = first & 15
        if opcode in (CLOSE, PING, PONG):
            assert first & FINAL
            found.append((opcode, content))
            continue
        assert (message is None) == (opcode != CONTINUATION)
        message = (opcode, content) if message is None else (message[0], message[1] + content)
        if first & FINAL:
            found.append(message)
            message = None
    assert message is None
    return found


def cut(data, draw):
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start < end]


content = st.lists(st.sampled_from([VALUE, VALUE[:6], VALUE[6:], b"x", b"\xff" * 70]), max_size=6).map(
    b"".join
)
control = st.tuples(st.sampled_from([PING, PONG]), st.sampled_from([b"", b"p", VALUE, VALUE[:6]]))
message = st.tuples(
    content | st.just(b"y" * 66_000 + VALUE),
    st.lists(st.integers(0, 12), max_size=8),
    st.sampled_from([TEXT, BINARY]),
    st.lists(control, max_size=2),
)


@given(st.lists(message, max_size=4), st.data())
def test_a_value_is_blanked_across_fragments(messages, data):
    sent, expected = b"", []
    for content, sizes, opcode, between in messages:
        controls = [frame(said, FINAL | kind) for kind, said in between]
        sent += b"".join(fragments(content, sizes, opcode, controls))
        told = [(kind, said.replace(VALUE, BLANK)) for kind, said in between]
        expected += [*told * len(sizes), (opcode, content.replace(VALUE, BLANK))]
    frames = searching()
    assert read(b"".join(frames.feed(piece) for piece in cut(sent, data.draw))) == expected


@given(st.integers(1, len(VALUE) - 1))
def test_value_split_over_fragments_is_blanked_entirely(size):
    frames = searching()
    ping = frame(b"?", FINAL | PING)
    first, second = fragments(b"a " + VALUE + b" z", [2 + size])
    assert frames.feed(first) == frame(b"a ", TEXT)
    assert frames.feed(ping) == ping, "frames for control do not wait"
    assert frames.feed(second) == frame(BLANK + b" z", FINAL | CONTINUATION)


@given(st.lists(st.builds(frame, content, st.sampled_from([0x81, 0x82]))), st.data())
def test_frames_of_whole_messages_stay_as_they_are(whole, data):
    frames = searching()
    sent = b"".join(whole)
    shown = b"".join(frames.feed(piece) for piece in cut(sent, data.draw))
    assert shown == sent.replace(VALUE, BLANK)


def test_each_message_is_there_at_its_end():
    frames = searching()
    for sent in (b"hellos", b"s3cr", b"", b"Bearer s3"):
        assert frames.feed(frame(sent)) == frame(sent)


def test_a_long_frame_does_not_wait_for_its_end():
    frames = searching()
    sent = frame(b"x" * 1_000_000, FINAL | BINARY)
    assert frames.feed(sent[:500_000]) == sent[:500_000]
    frames = searching()
    assert frames.feed(frame(b"x" * 1_000_000, BINARY)[:500_000]) == frame(b"x" * 499_990, BINARY)


def test_no_more_waits_than_a_value():
    """However many fragments come that may all be its beginning."""
    frames = searching()
    came = b"".join(frames.feed(frame(b"s", CONTINUATION if number else TEXT)) for number in range(10_000))
    assert came.count(b"s") >= 10_000 - len("Bearer ") - len(VALUE)
    assert len(frames._head) + len(frames._control) == 0


FRAGMENT = frame(b"x", TEXT)


@pytest.mark.parametrize(
    "wrong",
    {
        "no frame": b"Bearer",
        "compressed": b"\xc1\x05hello",
        "opcode 3": b"\x83\x05hello",
        "opcode 11": b"\x8b\x00",
        "masked": b"\x81\x85....hello",
        "masked fragment": FRAGMENT + b"\x00\x81....x",
        "ping in fragments": b"\x09\x00",
        "long ping": frame(b"x" * 126, FINAL | PING),
        "length with a sign": b"\x82\x7f\x80" + bytes(7),
        "continues nothing": frame(b"x", FINAL | CONTINUATION),
        "continues what has ended": FRAGMENT + frame(b"x", FINAL) + frame(b"x", FINAL),
        "begins before the end": FRAGMENT + frame(b"x"),
    }.items(),
    ids=lambda wrong: wrong[0],
)
@given(st.data())
def test_what_no_server_may_send_is_refused(wrong, data):
    frames, pieces = searching(), cut(frame(b"before") + wrong[1], data.draw)
    with pytest.raises(Refused, match="the server of the WebSocket"):
        list(map(frames.feed, pieces))


@given(st.binary(max_size=300), st.data())
def test_no_bytes_lead_anywhere_else(data, draw):
    frames = searching()
    try:
        for piece in cut(data, draw.draw):
            frames.feed(piece)
    except Refused:
        pass
