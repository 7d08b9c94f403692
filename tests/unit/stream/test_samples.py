"""Every record in both directions, cut at every byte, and with changed bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stream_samples import SAMPLES, Sample, whole

from common.errors import StreamError
from common.stream import fields

samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


def decode_or_refuse(sample: Sample, wire: bytes) -> object:
    """A value or StreamError; any other exception fails the test."""
    try:
        return sample.decode(wire)
    except StreamError as error:
        return error


@samples
def test_decodes(sample):
    assert sample.decode(sample.wire) == sample.value


@samples
def test_encodes(sample):
    assert sample.encode(sample.value) == sample.wire


@samples
def test_cut_at_every_byte(sample):
    for size in range(len(sample.wire)):
        result = decode_or_refuse(sample, sample.wire[:size])
        if sample.delimited:
            assert isinstance(result, StreamError), size
            assert result.offset is not None
            assert str(result)


@samples
def test_every_byte_flipped(sample):
    for at in range(len(sample.wire)):
        wire = bytearray(sample.wire)
        wire[at] ^= 0xFF
        decode_or_refuse(sample, bytes(wire))


@given(st.sampled_from(SAMPLES), st.data())
def test_one_byte_changed(sample, data):
    wire = bytearray(sample.wire)
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] = data.draw(st.integers(0, 255))
    decode_or_refuse(sample, bytes(wire))


@given(st.sampled_from(SAMPLES), st.binary(max_size=300))
def test_any_bytes(sample, wire):
    decode_or_refuse(sample, wire)


@given(
    st.sampled_from([sample for sample in SAMPLES if sample.delimited]),
    st.binary(min_size=1, max_size=20),
)
def test_bytes_behind_a_record_are_left_alone(sample, behind):
    """A decoder that takes a read function never reads into what follows."""
    error = decode_or_refuse(sample, sample.wire + behind)
    assert isinstance(error, StreamError)
    assert error.message == "bytes are left over"
    assert error.offset == len(sample.wire)


def test_whole_tells_where():
    with pytest.raises(StreamError) as caught:
        whole(lambda read: (fields.be16_untrusted(read), fields.be32_untrusted(read)))(
            b"\0\0\0\0\0"
        )
    assert caught.value.offset == 2
    assert (caught.value.expected, caught.value.got) == (4, 3)
