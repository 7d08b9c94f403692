"""Encoding is QEMU's: ASCII, one line, exact numbers, any legal depth."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.qmp import message
from common.qmp.lexer import MAX_NESTING, Lexer

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


def decode(data: bytes):
    [text] = Lexer().feed(data + b"\n")
    return message.decode(text)


@given(JSON_VALUES)
def test_round_trip_on_one_ascii_line(value):
    line = message.encode(value)
    assert line.endswith(b"\r\n")
    assert all(0x20 <= byte < 0x7F for byte in line[:-2])
    assert decode(line) == value
    assert json.loads(line) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('\b\f\n\r\t"\\', r'"\b\f\n\r\t\"\\"'),
        ("/", '"/"'),
        ("\x00\x1f\x7f", r'"\u0000\u001F\u007F"'),
        ("\u00e9\uabcd", r'"\u00E9\uABCD"'),
        ("\U0001f600", r'"\uD83D\uDE00"'),
        (r"\u00e9", r'"\\u00e9"'),
        ("\\\u00e9", r'"\\\u00E9"'),
        (2**64 - 1, "18446744073709551615"),
        (-(2**63), "-9223372036854775808"),
        ({"status": "active"}, '{"status": "active"}'),
        ([1, 2], "[1, 2]"),
        (None, "null"),
    ],
)
def test_exact_text(value, text):
    assert message.encode_text(value) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: b""}])
def test_what_is_not_json_is_refused(value):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        message.encode(value)


def test_an_id_of_legal_depth_is_echoed():
    deep = b"[" * (MAX_NESTING - 1) + b"]" * (MAX_NESTING - 1)
    request = decode(b'{"id":' + deep + b"}")
    assert message.encode({"return": {}, "id": request["id"]}).count(b"[") == 1023


def test_packet_is_exactly_one_text():
    assert message.decode_packet(b'{"attach": 1}') == {"attach": 1}
    assert message.decode_packet(b"42") == 42
    for packet in (b"", b"{", b"{}{}", b"{]", b"\xff"):
        with pytest.raises(ValueError, match="JSON"):
            message.decode_packet(packet)
