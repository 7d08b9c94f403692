"""Integers, names, and the reader that knows where it stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_integers(small, middle, large):
    read = fields.over(fields.be16(small) + fields.be32(middle) + fields.be64(large))
    assert fields.be16_untrusted(read) == small
    assert fields.be32_untrusted(read) == middle
    assert fields.be64_untrusted(read) == large


@pytest.mark.parametrize("encode", [fields.be16, fields.be32, fields.be64])
@pytest.mark.parametrize("value", [-1, 2**64])
def test_integers_that_do_not_fit(encode, value):
    with pytest.raises(ValueError, match="fit"):
        encode(value)


def test_name_limits():
    longest = "n" * c.MAX_NAME
    assert fields.name_untrusted(fields.over(fields.name(longest))) == longest
    for text in ("", longest + "n", "a\0b", "a\nb", "ü" * 128):
        with pytest.raises(ValueError, match="not a name"):
            fields.name(text)


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        (b"\0", "empty"),
        (b"\1\xff", "UTF-8"),
        (b"\3a\0b", "printable"),
        (b"\3a\nb", "printable"),
        (b"\3ab", "ends early"),
    ],
)
def test_names_refused(wire, complaint):
    with pytest.raises(StreamError, match=complaint):
        fields.name_untrusted(fields.over(wire))


def test_nothing_is_read_for_nothing():
    def read(size: int) -> bytes:
        raise AssertionError(size)

    assert fields.take_untrusted(read, 0) == b""


def test_reader_counts_from_where_it_is_put():
    read = fields.Reader(fields.over(bytes(20)), offset=100)
    read(8)
    assert read.offset == 108
    read(4)
    with pytest.raises(StreamError) as caught, read.located():
        fields.expect("something", 1, fields.be32_untrusted(read))
    assert caught.value.offset == 112


def test_an_offset_that_is_known_stays():
    read = fields.over(b"")
    with pytest.raises(StreamError) as caught, read.located():
        raise StreamError("known", offset=7)
    assert caught.value.offset == 7


def test_bounded():
    assert fields.bounded("thing", 5, 5) == 5
    with pytest.raises(StreamError, match="thing is too large"):
        fields.bounded("thing", 6, 5)
