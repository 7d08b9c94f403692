"""The lexer frames, refuses and resynchronises as QEMU's monitor does."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.qmp import lexer
from common.qmp.lexer import Lexer, LexError, Text

NAME = b'{"execute":"query-name"}'
ANSWERED = Text(NAME)


def parse_error(rest: str) -> LexError:
    return LexError(f"JSON parse error, {rest}")


def stray(text: str) -> LexError:
    return parse_error(f"stray '{text}'")


VALUE = parse_error("expecting value")

# Input on a fresh lexer, and everything it gives.
STREAMS = {
    # lexical errors and what is skipped after them
    b'%abc "x" 12 ' + NAME: [stray("%"), ANSWERED],
    b'{"execute":"query-\x01': [stray('"query-\x01')],
    b'{"execute":"query-name","id":01}': [stray("01"), VALUE],
    b'{"execute":"query-name","id":NaN}': [stray("N"), VALUE],
    b'{"execute":"que\nry-name"}': [stray('"que\n'), VALUE],
    b"\xef\xbb\xbf" + NAME: [stray("\ufffd"), ANSWERED],
    b"query\n": [parse_error("invalid keyword 'query'")],
    b'"que\n' + NAME: [stray('"que\n'), ANSWERED],
    b"'que\t" + NAME: [stray("'que\t"), ANSWERED],
    b"-}" + NAME: [stray("-}"), ANSWERED],
    b"1.}" + NAME: [stray("1.}"), ANSWERED],
    b"1e+}" + NAME: [stray("1e+}"), ANSWERED],
    b"-01\n": [stray("-01")],
    b"[1,2,\xff" + NAME: [stray("\ufffd"), ANSWERED],
    b'["\xfe' + NAME: [stray('"\ufffd'), ANSWERED],
    b"%a\x01b{}": [stray("%"), stray("\x01"), Text(b"{}")],
    b"%a\xffb{}": [stray("%"), stray("\ufffd"), Text(b"{}")],
    b"+1 ": [stray("+")],
    b"\x7f{}": [stray("\x7f"), Text(b"{}")],
    b"kE{}": [parse_error("invalid keyword 'k'"), stray("E"), Text(b"{}")],
    # where a message ends
    NAME * 2: [ANSWERED, ANSWERED],
    b" \t\r\n" + NAME + b"\r\n": [ANSWERED],
    b"42": [],
    b"42 ": [Text(b"42")],
    b"null": [],
    b"null\n": [Text(b"null")],
    b"true{}": [Text(b"true"), Text(b"{}")],
    b'"a""b"': [Text(b'"a"'), Text(b'"b"')],
    b"[]{}": [Text(b"[]"), Text(b"{}")],
    b":,}]": [VALUE] * 4,
    b"{]": [VALUE],
    b"{]}": [VALUE, VALUE],
    b'{"a":[1}': [],
    b'{"a":[1}]{}': [parse_error("expected separator in list"), Text(b"{}")],
    b"[1}": [parse_error("expected separator in list")],
    # parse errors
    b'{"a":}': [VALUE],
    b"{,}": [VALUE],
    b"[1,]": [VALUE],
    b"[,1]": [VALUE],
    b'{"a":1,}': [VALUE],
    b"{1:2}": [parse_error("key is not a string in object")],
    b"{[]:2}": [parse_error("key is not a string in object")],
    b'{{"a":1}:2}': [parse_error("key is not a string in object")],
    b'{"a"}': [parse_error("missing : in object pair")],
    b'{"a" "b"}': [parse_error("missing : in object pair")],
    b'{"a"]': [parse_error("missing : in object pair")],
    b'{"a":1 "b":2}': [parse_error("expected separator in dict")],
    b'{"a":1]': [parse_error("expected separator in dict")],
    b"[1 2]": [parse_error("expected separator in list")],
    b"[1:2]": [parse_error("expected separator in list")],
    b'{"a":1,"a":2}': [parse_error("duplicate key")],
    b'{"a":1,"\\u0061":2}': [parse_error("duplicate key")],
    b"{'a':1,\"a\":2}": [parse_error("duplicate key")],
    b'{"\\ud83d\\ude00":1,"\xf0\x9f\x98\x80":2}': [parse_error("duplicate key")],
    b'{"a":{"a":1},"b":{"a":1}}': [Text(b'{"a":{"a":1},"b":{"a":1}}')],
    b'{"a":1,"a":nil}': [parse_error("invalid keyword 'nil'")],
    b"[nil, 1 2, %]": [stray("%"), VALUE],
    b"[nil, 1 2, [}]]": [parse_error("invalid keyword 'nil'"), VALUE, VALUE],
    b"[nil, 1 2, [{]]}": [parse_error("invalid keyword 'nil'")],
    # strings
    rb'"\"\'\\\/\b\f\n\r\t\u00e9"': [Text(rb'"\"' + rb"'" + rb'\\\/\b\f\n\r\t\u00e9"')],
    rb"""'it"s \' \" \\'""": [Text(rb'''"it\"s ' \" \\"''')],
    rb'"\\' + b"'" + b'"': [Text(rb'"\\' + b"'" + b'"')],
    rb'"\\\'"': [Text(rb'"\\' + rb"'" + rb'"')],
    b'"\xc3\xa9\x7f"': [Text(b'"\xc3\xa9\x7f"')],
    rb'"\x"': [parse_error("invalid escape sequence in string")],
    rb'"\ "': [parse_error("invalid escape sequence in string")],
    rb'"\u12"': [parse_error(r'\u12" is not a valid Unicode character')],
    rb'"\uwxyz!"': [parse_error(r"\uwxyz is not a valid Unicode character")],
    rb'"\ud800"': [parse_error(r"\ud800 is not a valid Unicode character")],
    rb'"\ud800\u0041"': [parse_error(r"\ud800 is not a valid Unicode character")],
    rb'"\uDC00"': [parse_error(r"\uDC00 is not a valid Unicode character")],
    rb'"\u0000\ud83d\ude00"': [Text(rb'"\u0000\ud83d\ude00"')],
    b'"\xc0\x80"': [parse_error("invalid UTF-8 sequence in string")],
    b'"\xed\xa0\x80"': [parse_error("invalid UTF-8 sequence in string")],
    b'"\xf4\x90\x80\x80"': [parse_error("invalid UTF-8 sequence in string")],
    b'"\\x\x80"': [parse_error("invalid escape sequence in string")],
    b'"\x80\\x"': [parse_error("invalid UTF-8 sequence in string")],
    # numbers
    b"[0,-0,10,-1]": [Text(b"[0,0,10,-1]")],
    b"[18446744073709551615,-9223372036854775808]": [
        Text(b"[18446744073709551615,-9223372036854775808]")
    ],
    b"[18446744073709551616]": [Text(b"[1.8446744073709552e+19]")],
    b"[-9223372036854775809]": [Text(b"[-9.223372036854776e+18]")],
    b"[1.0,1e3,1E+3,0.5e-1,-0.0]": [Text(b"[1.0,1000.0,1000.0,0.05,-0.0]")],
    b"[1e999]": [parse_error("number out of range")],
}


@pytest.mark.parametrize("stream", STREAMS, ids=repr)
def test_streams(stream):
    assert Lexer().feed(stream) == STREAMS[stream]


@pytest.mark.parametrize("stream", STREAMS, ids=repr)
def test_cut_anywhere(stream):
    for cut in range(len(stream) + 1):
        cutter = Lexer()
        got = cutter.feed(stream[:cut]) + cutter.feed(stream[cut:])
        assert got == STREAMS[stream], cut


@pytest.mark.parametrize("stream", STREAMS, ids=repr)
def test_byte_by_byte(stream):
    slow = Lexer()
    got = [event for byte in stream for event in slow.feed(bytes([byte]))]
    assert got == STREAMS[stream]


@given(st.sampled_from(list(STREAMS)), st.data())
def test_a_changed_byte_gives_events_only(stream, data):
    place = data.draw(st.integers(0, len(stream) - 1))
    changed = bytearray(stream)
    changed[place] = data.draw(st.integers(0, 255))
    for event in Lexer().feed(bytes(changed)):
        assert isinstance(event, Text | LexError)


@given(st.binary(), st.binary(max_size=3))
def test_any_bytes_then_a_reset_byte(noise, padding):
    """Whatever came before, 0xFF and a request give that request's text."""
    resync = Lexer()
    resync.feed(noise + padding)
    assert resync.feed(b"\xff" + NAME)[-1] == ANSWERED


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(JSON_VALUES, st.booleans())
def test_what_a_json_library_writes_is_read_back(value, escape):
    written = json.dumps(value, ensure_ascii=escape).encode() + b"\n"
    [event] = Lexer().feed(written)
    assert isinstance(event, Text)
    assert json.loads(event.json) == value


@given(st.text(st.characters(codec="utf-8", min_codepoint=32), max_size=30))
def test_single_quotes_carry_the_same_string(text):
    body = json.dumps(text)[1:-1].replace(r"\"", '"').replace("'", r"\'")
    [event] = Lexer().feed(f"'{body}'".encode())
    assert isinstance(event, Text)
    assert json.loads(event.json) == text


# --- limits, each on both sides of the bound ---


def test_nesting_up_to_the_limit():
    deep = b"[" * lexer.MAX_NESTING + b"]" * lexer.MAX_NESTING
    assert Lexer().feed(deep) == [Text(deep)]


def test_nesting_beyond_the_limit():
    deeper = b"[" * (lexer.MAX_NESTING + 1) + b"]" * 3
    limit = LexError("JSON nesting depth limit exceeded")
    assert Lexer().feed(deeper) == [limit, VALUE, VALUE, VALUE]


def test_braces_and_brackets_nest_together():
    half = lexer.MAX_NESTING // 2
    mixed = b'{"a":[' * half + b"]}" * half
    assert Lexer().feed(mixed) == [Text(mixed)]
    limit = LexError("JSON nesting depth limit exceeded")
    assert Lexer().feed(b"[" + mixed)[0] == limit


def test_token_count(monkeypatch):
    monkeypatch.setattr(lexer, "MAX_TOKENS", 7)
    assert Lexer().feed(b"[1,2,3]") == [Text(b"[1,2,3]")]
    limit = LexError("JSON token count limit exceeded")
    assert Lexer().feed(b"[1,2,3,4]") == [limit, VALUE]


def test_token_bytes_in_one_message(monkeypatch):
    monkeypatch.setattr(lexer, "MAX_TOKEN_BYTES", 10)
    assert Lexer().feed(b'["123456"]') == [Text(b'["123456"]')]
    limit = LexError("JSON token size limit exceeded")
    assert Lexer().feed(b'["1234567"]') == [limit]


def test_a_token_that_never_ends_is_bounded(monkeypatch):
    monkeypatch.setattr(lexer, "MAX_TOKEN_BYTES", 10)
    endless = Lexer()
    limit = LexError("JSON token size limit exceeded")
    assert endless.feed(b'"12345') == []
    assert endless.feed(b"67890") == [limit]
    assert endless.feed(b"\xff{}") == [stray("\ufffd"), Text(b"{}")]


def test_a_long_string_is_ordinary():
    long = b'{"execute":"' + b"x" * 65536 + rb"\n" * 1000 + b'"}'
    assert Lexer().feed(long) == [Text(long)]
