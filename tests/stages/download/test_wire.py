"""Catches an answer of the child that is cut or joined with the next: rows would get each other's pictures."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.stages.download.wire import pack, unpack


def exactly(stream):
    def read(count):
        data = stream.read(count)
        if len(data) < count:
            raise EOFError
        return data

    return read


MESSAGES = st.dictionaries(
    st.text(max_size=5), st.one_of(st.none(), st.integers(), st.text(max_size=9)), max_size=4
)


@settings(max_examples=25)
@given(st.lists(st.tuples(MESSAGES, st.binary(max_size=50)), max_size=6))
def test_frames_come_out_as_they_went_in_one_by_one(frames):
    read = exactly(io.BytesIO(b"".join(piece for frame in frames for piece in pack(*frame))))
    assert [unpack(read) for _ in frames] == frames
    with pytest.raises(EOFError):
        unpack(read)


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_frame_that_is_cut_anywhere_is_none(cut):
    data = b"".join(pack({"row": 7}, b"picture"))
    with pytest.raises(EOFError):
        unpack(exactly(io.BytesIO(data[:-cut])))


def test_the_lengths_are_those_that_the_other_side_reads():
    head, payload = pack({"a": "\u00e9"}, b"xyz")
    text, size = struct.unpack(">II", head[:8])
    assert (len(head) - 8, len(payload)) == (text, size)
