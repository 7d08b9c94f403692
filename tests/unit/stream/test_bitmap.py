"""The received bitmap: sizes, padding, the end mark."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StreamError
from common.stream import bitmap, fields


@pytest.mark.parametrize(
    ("pages", "size"),
    [(0, 0), (1, 8), (64, 8), (65, 16), (16384, 2048)],
)
def test_size(pages, size):
    assert bitmap.size_of(pages) == size


@given(st.sets(st.integers(0, 299)), st.integers(1, 300))
def test_round_trip(received, pages):
    received = {page for page in received if page < pages}
    bits = bytearray(bitmap.size_of(pages))
    for page in received:
        bits[page // 8] |= 1 << (page % 8)
    wire = bitmap.encode(bytes(bits), pages)
    assert len(wire) == 16 + bitmap.size_of(pages)
    assert bitmap.read_untrusted(fields.over(wire), pages) == bits


@pytest.mark.parametrize("pages", [1, 7, 8, 63, 64, 65, 200])
def test_padding_is_cleared_both_ways(pages):
    full = b"\xff" * bitmap.size_of(pages)
    sent = bitmap.encode(full, pages)[8:-8]
    assert sum(byte.bit_count() for byte in sent) == pages
    wire = fields.be64(len(full)) + full + bytes.fromhex("0123456789abcdef")
    assert bitmap.read_untrusted(fields.over(wire), pages) == sent
    assert sent == ((1 << pages) - 1).to_bytes(len(full), "little")


def test_a_wrong_size_is_not_read():
    asked = []

    def read(size: int) -> bytes:
        asked.append(size)
        return fields.be64(1 << 40)

    with pytest.raises(StreamError, match="size of a received bitmap"):
        bitmap.read_untrusted(read, 64)
    assert asked == [8]


def test_wrong_end_mark():
    wire = bitmap.encode(bytes(8), 1)
    with pytest.raises(StreamError, match="end mark"):
        bitmap.read_untrusted(fields.over(wire[:-1] + b"\xee"), 1)


def test_bits_of_another_size_cannot_be_said():
    with pytest.raises(ValueError, match="bytes of bitmap"):
        bitmap.encode(bytes(16), 64)
