"""Return path messages: round trips, requests, the text of a failure."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stream_samples import decode_message, hexed

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields, returnpath

names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=60)
be32s = st.integers(0, 2**32 - 1)
starts = st.integers(0, 2**30).map(lambda page: page * c.TARGET_PAGE_SIZE)
lengths = st.integers(1, 2**18).map(lambda page: page * c.TARGET_PAGE_SIZE)
sentences = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=120)

messages = st.one_of(
    st.builds(returnpath.Shut, be32s),
    st.builds(returnpath.Pong, be32s),
    st.builds(returnpath.ReqPages, starts, lengths, st.none() | names),
    st.builds(returnpath.RecvBitmap, names),
    st.builds(returnpath.ResumeAck, be32s),
    st.just(returnpath.SwitchoverAck()),
    st.builds(returnpath.Failure, sentences),
)


@given(messages)
def test_round_trip(value):
    assert decode_message(returnpath.encode(value)) == value


@given(st.text(max_size=1000))
def test_any_failure_text_can_be_sent(text):
    sent = decode_message(returnpath.encode(returnpath.Failure(text))).text
    assert len(sent.encode()) <= c.MAX_FAILURE_TEXT
    assert sent.isprintable()


def test_failure_text_limit():
    fits = returnpath.Failure("ü" * (c.MAX_FAILURE_TEXT // 2))
    assert decode_message(returnpath.encode(fits)) == fits
    cut = returnpath.encode(returnpath.Failure("x" + fits.text))
    assert len(decode_message(cut).text.encode()) == c.MAX_FAILURE_TEXT - 1
    over = fields.be16(c.RP_X_FAILURE) + fields.be16(c.MAX_FAILURE_TEXT + 1)
    with pytest.raises(StreamError, match="wrong length"):
        returnpath.read_untrusted(fields.over(over + bytes(501)))


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        ("00 00 00 00", "unknown"),
        ("00 08 00 00", "unknown"),
        ("80 02 00 00", "unknown"),
        ("00 01 00 03 00 00 00", "wrong length"),
        ("00 02 02 01", "wrong length"),
        ("00 07 00 01 00", "wrong length"),
        ("00 04 00 0c 00 00 00 00 00 00 00 01 00 00 10 00", "whole pages"),
        ("00 04 00 0c 00 00 00 00 00 00 10 00 00 00 00 00", "whole pages"),
        ("00 04 00 0c ff ff ff ff ff ff f0 00 00 00 10 00", "too large"),
        ("00 03 00 0f 00 00 00 00 00 00 00 00 00 00 10 00 01 61 61", "end of"),
        ("80 01 00 01 0a", "printable"),
        ("80 01 00 01 ff", "UTF-8"),
    ],
)
def test_refused(wire, complaint):
    with pytest.raises(StreamError, match=complaint):
        decode_message(hexed(wire))


@given(st.sampled_from([1, 2, 3, 4, 5, 6, 7, c.RP_X_FAILURE]), st.integers(0, 0xFFFF))
def test_no_message_is_longer_than_qemu_allows(number, length):
    """The length is checked before that much is asked for."""
    asked = []

    def read(size: int) -> bytes:
        asked.append(size)
        return head(size)

    head = fields.over(fields.be16(number) + fields.be16(length) + b"\1" * length)
    with contextlib.suppress(StreamError):
        returnpath.read_untrusted(read)
    assert max(asked) <= c.MAX_RP_PAYLOAD
