"""Frames: whole, byte by byte, with trailing bytes, at every limit, and fuzzed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.wire.frames import (
    HEADER,
    MAX_PAYLOAD,
    MAX_STREAM,
    Frame,
    FrameReader,
    Kind,
    WireError,
    encode,
)

EXAMPLES = [
    Frame(Kind.HELLO, 0, b'{"version":1,"role":"host"}'),
    Frame(Kind.MESSAGE, 0, b"{}"),
    Frame(Kind.DATA, 7, b"\x00\xff" * 10),
    Frame(Kind.DATA, MAX_STREAM, b""),
    Frame(Kind.CREDIT, 7, b"\x00\x00\x00\x01"),
    Frame(Kind.CLOSE, 7, b""),
]
frames = st.sampled_from(list(Kind)).flatmap(
    lambda kind: st.builds(
        Frame,
        st.just(kind),
        st.integers(0, MAX_STREAM),
        st.binary(max_size=min(MAX_PAYLOAD[kind], 300)),
    )
)


@pytest.mark.parametrize("frame", EXAMPLES)
def test_whole(frame):
    assert FrameReader().feed(encode(*frame)) == [frame]


@pytest.mark.parametrize("frame", EXAMPLES)
def test_byte_by_byte(frame):
    reader = FrameReader()
    data = encode(*frame)
    for size, byte in enumerate(data[:-1], 1):
        assert reader.feed(bytes([byte])) == []
        assert reader.pending == size
    assert reader.feed(data[-1:]) == [frame]
    assert reader.pending == 0


@pytest.mark.parametrize("frame", EXAMPLES)
def test_trailing_bytes_wait_for_the_rest(frame):
    reader = FrameReader()
    data = encode(*frame)
    assert reader.feed(data + data[:5]) == [frame]
    assert reader.pending == 5
    assert reader.feed(data[5:]) == [frame]


@given(st.lists(frames), st.data())
def test_any_cut_gives_the_same_frames(sent, data):
    stream = b"".join(encode(*frame) for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    reader = FrameReader()
    received = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += reader.feed(stream[start:end])
    assert received == sent
    assert reader.pending == 0


def test_the_header_is_nine_bytes_in_network_order():
    assert encode(Kind.DATA, 0x01020304, b"ab") == b"\x03\x01\x02\x03\x04\x00\x00\x00\x02ab"


@pytest.mark.parametrize("kind", Kind)
def test_the_largest_payload_passes_and_one_byte_more_does_not(kind):
    largest = bytes(MAX_PAYLOAD[kind])
    assert FrameReader().feed(encode(kind, 0, largest)) == [Frame(kind, 0, largest)]
    with pytest.raises(ValueError, match=f"at most {MAX_PAYLOAD[kind]}"):
        encode(kind, 0, largest + b"x")


@pytest.mark.parametrize("kind", Kind)
def test_frame_length_beyond_the_limit_is_refused_by_its_header(kind):
    with pytest.raises(WireError, match=f"{kind.name} frame of"):
        FrameReader().feed(HEADER.pack(kind, 0, MAX_PAYLOAD[kind] + 1))


@pytest.mark.parametrize("stream", [-1, MAX_STREAM + 1])
def test_a_stream_number_beyond_its_limit_is_not_sent(stream):
    with pytest.raises(ValueError, match="stream number"):
        encode(Kind.DATA, stream)


def test_a_stream_number_beyond_its_limit_is_refused():
    with pytest.raises(WireError, match="stream number"):
        FrameReader().feed(HEADER.pack(Kind.DATA, MAX_STREAM + 1, 0))


@pytest.mark.parametrize("number", [0, 6, 255])
def test_an_unknown_kind_is_refused(number):
    with pytest.raises(WireError, match=f"unknown frame kind {number}"):
        FrameReader().feed(HEADER.pack(number, 0, 0))


@given(st.lists(st.binary(max_size=200)))
def test_garbage_raises_only_wire_errors_in_bounded_memory(pieces):
    reader = FrameReader()
    try:
        for piece in pieces:
            reader.feed(piece)
            assert reader.pending <= HEADER.size + max(MAX_PAYLOAD.values())
    except WireError:
        pass
