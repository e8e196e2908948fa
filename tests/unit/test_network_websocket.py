"""The frames of a WebSocket: where they end, however they come."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.network.websocket import Frames


def frame(content, first=0x81):
    size = len(content)
    if size < 126:
        length = bytes([size])
    else:
        length = b"\x7e" + struct.pack("!H", size) if size < 1 << 16 else b"\x7f" + struct.pack("!Q", size)
    return bytes([first]) + length + content


class Told:
    """Keeps the pieces up to each end."""

    def __init__(self):
        self.frames = []
        self.open = b""

    def __call__(self, data):
        if data:
            self.open += data
        else:
            self.frames.append(self.open)
            self.open = b""
        return data


def cut(data, draw):
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start < end]


@given(
    st.lists(
        st.builds(
            frame, st.binary(max_size=300) | st.just(b"x" * 66_000), st.sampled_from([0x81, 0x02, 0x80, 0x8A])
        )
    ),
    st.data(),
)
def test_each_frame_ends_once_it_is_there(frames, data):
    whole, told = b"".join(frames), Told()
    reading = Frames(told)
    assert b"".join(reading.feed(piece) for piece in cut(whole, data.draw)) == whole
    assert (told.frames, told.open) == (frames, b"")


@pytest.mark.parametrize(
    "nothing", [b"Bearer", b"\xc1\x05hello", b"\x83\x05hello", b"\x81\x85....hello", b"\x81\xfe", b" \x01x"]
)
@given(st.binary(), st.data())
def test_what_is_no_frame_has_no_end(nothing, more, data):
    before, told = frame(b"before"), Told()
    reading = Frames(told)
    after = nothing + more + frame(b"after")
    assert b"".join(reading.feed(piece) for piece in cut(before + after, data.draw)) == before + after
    assert (told.frames, told.open) == ([before], after)


def test_the_end_is_told():
    told = Told()
    reading = Frames(told)
    reading.feed(frame(b"hello")[:4])
    assert reading.feed(b"") == b""
    assert told.frames == [frame(b"hello")[:4]]
