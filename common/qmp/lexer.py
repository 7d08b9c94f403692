"""Bytes to whole JSON texts, framed and refused the way QEMU's monitor does it.

A control socket is not a stream of lines. A message ends where its brackets
balance, strings may be in single quotes, and a control character or the byte
0xFF brings a confused stream back to its start. So three steps stand between
the socket and the JSON parser, all in this file and none of them with I/O:

1. the *scanner*, a table of states, cuts the bytes into tokens;
2. the *grammar*, a stack of open brackets, says whether the tokens so far are
   JSON, one token at a time, so that nothing is ever parsed twice;
3. the *message* counts brackets and sizes, and decides when to speak.

What comes out is a `Text`, which any JSON parser reads without surprises
(double quotes, integers within 64 bits, no duplicate keys, no white space), or
a `LexError` with QEMU's words. Bytes from a client can cause nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

MAX_NESTING: Final = 1024  # braces plus brackets open at the same time
MAX_TOKENS: Final = 2 << 20  # tokens in one message
MAX_TOKEN_BYTES: Final = 64 << 20  # bytes of token text in one message

INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**64 - 1
_INT_DIGITS: Final = 20  # longer tokens are out of range without looking


@dataclass(frozen=True, slots=True)
class Text:
    """One well-formed JSON text, rewritten to plain JSON in UTF-8."""

    json: bytes


@dataclass(frozen=True, slots=True)
class LexError:
    """One message, or the beginning of one, that was not JSON."""

    desc: str


# --- the scanner -------------------------------------------------------------


class State(Enum):
    """What the scanner is in the middle of; the last three are verdicts."""

    START = auto()
    SKIP = auto()  # after a stray byte, up to the next reset byte
    DOUBLE = auto()
    DOUBLE_ESCAPE = auto()
    SINGLE = auto()
    SINGLE_ESCAPE = auto()
    MINUS = auto()
    ZERO = auto()
    INTEGER = auto()
    POINT = auto()
    FRACTION = auto()
    EXPONENT = auto()
    EXPONENT_SIGN = auto()
    EXPONENT_DIGITS = auto()
    KEYWORD = auto()

    DONE = auto()  # the byte completes the token
    BEFORE = auto()  # the token was complete, the byte belongs to what follows
    STRAY = auto()  # the byte fits nowhere


@dataclass(frozen=True, slots=True)
class _Rule:
    """How one state goes on: bytes that keep it, bytes that change it."""

    stay: re.Pattern[bytes]
    to: dict[int, State]
    otherwise: State


def _rule(
    to: dict[bytes, State], *, stay: bytes = b"", otherwise: State = State.STRAY
) -> _Rule:
    expanded = {byte: state for group, state in to.items() for byte in group}
    return _Rule(re.compile(stay), expanded, otherwise)


_DIGITS: Final = b"0123456789"
_LETTERS: Final = b"abcdefghijklmnopqrstuvwxyz"
_IN_STRING: Final = bytes(range(0x20, 0xFE))

# Every transition of the scanner. `stay` is matched with a pattern rather than
# byte by byte because strings of many kilobytes are ordinary.
_RULES: Final = {
    State.START: _rule(
        {
            b"{}[]:,": State.DONE,
            b'"': State.DOUBLE,
            b"'": State.SINGLE,
            b"-": State.MINUS,
            b"0": State.ZERO,
            b"123456789": State.INTEGER,
            _LETTERS: State.KEYWORD,
        },
        stay=rb"[ \t\r\n]*+",
    ),
    State.SKIP: _rule(
        {},
        stay=rb"[^{}\[\]:,\x00-\x1f\xfe\xff]*+",
        otherwise=State.BEFORE,
    ),
    State.DOUBLE: _rule(
        {b'"': State.DONE, b"\\": State.DOUBLE_ESCAPE},
        stay=rb'(?:[^"\\\x00-\x1f\xfe\xff]++|\\[\x20-\xfd])*+',
    ),
    State.DOUBLE_ESCAPE: _rule({_IN_STRING: State.DOUBLE}),
    State.SINGLE: _rule(
        {b"'": State.DONE, b"\\": State.SINGLE_ESCAPE},
        stay=rb"(?:[^'\\\x00-\x1f\xfe\xff]++|\\[\x20-\xfd])*+",
    ),
    State.SINGLE_ESCAPE: _rule({_IN_STRING: State.SINGLE}),
    State.MINUS: _rule({b"0": State.ZERO, b"123456789": State.INTEGER}),
    State.ZERO: _rule(
        {_DIGITS: State.STRAY, b".": State.POINT, b"eE": State.EXPONENT},
        otherwise=State.BEFORE,
    ),
    State.INTEGER: _rule(
        {b".": State.POINT, b"eE": State.EXPONENT},
        stay=rb"[0-9]*+",
        otherwise=State.BEFORE,
    ),
    State.POINT: _rule({_DIGITS: State.FRACTION}),
    State.FRACTION: _rule(
        {b"eE": State.EXPONENT}, stay=rb"[0-9]*+", otherwise=State.BEFORE
    ),
    State.EXPONENT: _rule({b"+-": State.EXPONENT_SIGN, _DIGITS: State.EXPONENT_DIGITS}),
    State.EXPONENT_SIGN: _rule({_DIGITS: State.EXPONENT_DIGITS}),
    State.EXPONENT_DIGITS: _rule({}, stay=rb"[0-9]*+", otherwise=State.BEFORE),
    State.KEYWORD: _rule({}, stay=rb"[a-z]*+", otherwise=State.BEFORE),
}

_SILENT: Final = frozenset({State.START, State.SKIP})  # bytes kept here are dropped


class Lexer:
    """Feed it what the socket gives, in any pieces; get whole messages back."""

    def __init__(self) -> None:
        self._state = State.START
        self._token = bytearray()
        self._message = _Message()
        self._events: list[Text | LexError] = []

    def feed(self, data: bytes) -> list[Text | LexError]:
        """The messages that `data` completes, in order; never raises."""
        pos = 0
        while pos < len(data):
            pos = self._advance(data, pos)
        events, self._events = self._events, []
        return events

    def _advance(self, data: bytes, pos: int) -> int:
        """Take one run of bytes and the byte that ends it; return where it got."""
        rule = _RULES[self._state]
        run = rule.stay.match(data, pos)
        stop = run.end() if run else pos
        if self._state not in _SILENT:
            self._token += data[pos:stop]
        if stop == len(data):
            self._check_size()
            return stop
        target = rule.to.get(data[stop], rule.otherwise)
        if target is not State.BEFORE:
            self._token.append(data[stop])
            stop += 1
        self._enter(target)
        return stop

    def _enter(self, target: State) -> None:
        if target is State.STRAY:
            self._stray()
        elif target is State.DONE or target is State.BEFORE:
            self._complete()
        else:
            self._state = target

    def _complete(self) -> None:
        state, self._state = self._state, State.START
        if state is State.SKIP:
            return
        token = bytes(self._token)
        self._token.clear()
        event = self._message.add(state, token)
        if event is not None:
            self._restart(event)

    def _stray(self) -> None:
        text = self._token.decode("utf-8", "replace")
        self._restart(LexError(f"JSON parse error, stray '{text}'"))
        self._state = State.SKIP

    def _check_size(self) -> None:
        # Tokens are measured when they are complete; this bounds one that
        # never ends.
        if self._message.size + len(self._token) > MAX_TOKEN_BYTES:
            self._state = State.START
            self._restart(LexError("JSON token size limit exceeded"))

    def _restart(self, event: Text | LexError) -> None:
        self._events.append(event)
        self._token.clear()
        self._message = _Message()


# --- the message -------------------------------------------------------------


class _Message:
    """The tokens of one message: counts, sizes, and the text to hand over.

    Braces and brackets are only counted, apart from each other; whether they
    match is the grammar's business. That is QEMU's rule for where a message
    ends, and clients resynchronise by it.
    """

    def __init__(self) -> None:
        self.size = 0
        self._tokens = 0
        self._braces = 0
        self._brackets = 0
        self._grammar = _Grammar()
        self._text: list[bytes] = []

    def add(self, state: State, token: bytes) -> Text | LexError | None:
        """Take one token; the event if the message ends with it."""
        self.size += len(token)
        self._tokens += 1
        if state is State.START:
            self._count(token)
        return self._limit_exceeded() or self._check(state, token)

    def _count(self, bracket: bytes) -> None:
        self._braces += (bracket == b"{") - (bracket == b"}")
        self._brackets += (bracket == b"[") - (bracket == b"]")

    def _limit_exceeded(self) -> LexError | None:
        if self.size > MAX_TOKEN_BYTES:
            return LexError("JSON token size limit exceeded")
        if self._tokens > MAX_TOKENS:
            return LexError("JSON token count limit exceeded")
        if self._braces + self._brackets > MAX_NESTING:
            return LexError("JSON nesting depth limit exceeded")
        return None

    def _check(self, state: State, token: bytes) -> Text | LexError | None:
        # After the first error the rest of the message is only counted.
        if self._grammar.error is None:
            self._text.append(self._grammar.take(state, token))
        if self._open():
            return None
        if self._grammar.error is not None:
            return LexError(f"JSON parse error, {self._grammar.error}")
        return Text(b"".join(self._text))

    def _open(self) -> bool:
        lowest = min(self._braces, self._brackets)
        return lowest >= 0 and self._braces + self._brackets > 0


# --- the grammar -------------------------------------------------------------


class _Expect(Enum):
    """What may come next inside the innermost bracket."""

    FIRST = auto()  # a value (in an object: a key), or the end
    VALUE = auto()
    KEY = auto()
    COLON = auto()
    SEPARATOR = auto()  # a comma, or the end


@dataclass(slots=True)
class _Open:
    """An open bracket, and how far its contents have come."""

    closing: bytes
    expect: _Expect = _Expect.FIRST
    key: str | None = None  # the pair being read; None while its key is
    keys: set[str] = field(default_factory=set)

    @property
    def is_object(self) -> bool:
        return self.closing == b"}"


class _Malformed(Exception):
    """The token does not fit; the argument is QEMU's reason."""


class _Grammar:
    """Checks tokens against JSON; remembers the first error and stops there."""

    def __init__(self) -> None:
        self.error: str | None = None
        self._stack: list[_Open] = []

    def take(self, state: State, token: bytes) -> bytes:
        """The token as plain JSON; `error` is set if it does not fit here."""
        try:
            return self._take(state, token)
        except _Malformed as reason:
            self.error = str(reason)
            return b""

    def _take(self, state: State, token: bytes) -> bytes:
        inner = self._stack[-1] if self._stack else None
        match inner.expect if inner else _Expect.VALUE:
            case _Expect.COLON:
                self._colon(token)
            case _Expect.SEPARATOR:
                self._separator(token)
            case _:
                return self._value(state, token)
        return token

    def _colon(self, token: bytes) -> None:
        if token != b":":
            raise _Malformed("missing : in object pair")
        self._stack[-1].expect = _Expect.VALUE

    def _separator(self, token: bytes) -> None:
        inner = self._stack[-1]
        if token == b",":
            inner.expect = _Expect.KEY if inner.is_object else _Expect.VALUE
            inner.key = None
        elif token == inner.closing:
            self._close()
        else:
            kind = "dict" if inner.is_object else "list"
            raise _Malformed(f"expected separator in {kind}")

    def _value(self, state: State, token: bytes) -> bytes:
        if state is State.START:
            self._bracket(token)
            return token
        plain = _PLAIN[state](token)
        is_string = state is State.DOUBLE or state is State.SINGLE
        self._finish_value(plain if is_string else None)
        return plain

    def _bracket(self, token: bytes) -> None:
        inner = self._stack[-1] if self._stack else None
        if token in _CLOSING:
            self._stack.append(_Open(_CLOSING[token]))
        elif inner and inner.expect is _Expect.FIRST and token == inner.closing:
            self._close()
        else:
            raise _Malformed("expecting value")

    def _close(self) -> None:
        self._stack.pop()
        self._finish_value(None)

    def _finish_value(self, string: bytes | None) -> None:
        """A value is complete; `string` is its text if it can be a key."""
        if not self._stack:
            return
        inner = self._stack[-1]
        if not inner.is_object:
            inner.expect = _Expect.SEPARATOR
        elif inner.expect is _Expect.VALUE:
            self._finish_pair(inner)
        elif string is None:
            raise _Malformed("key is not a string in object")
        else:
            inner.key = _unescape(string[1:-1])
            inner.expect = _Expect.COLON

    def _finish_pair(self, inner: _Open) -> None:
        # Only now, because an error in the value is reported before this one.
        assert inner.key is not None
        if inner.key in inner.keys:
            raise _Malformed("duplicate key")
        inner.keys.add(inner.key)
        inner.expect = _Expect.SEPARATOR


_CLOSING: Final = {b"{": b"}", b"[": b"]"}


# --- scalars, checked and rewritten to plain JSON ----------------------------

_PLAIN_STRING: Final = re.compile(rb"[\x20-\x7e]*+")
_HEX: Final = rb"[0-9A-Fa-f]"
_ESCAPE: Final = (
    rb"(?:[\"'\\/bfnrt]"
    rb"|u(?![dD][89A-Fa-f])" + _HEX + rb"{4}"
    rb"|u[dD][89ABab]" + _HEX + rb"{2}\\u[dD][C-Fc-f]" + _HEX + rb"{2})"
)
_WELL_ESCAPED: Final = re.compile(rb"(?:[^\\]++|\\" + _ESCAPE + rb")*+")
_ONE_ESCAPE: Final = re.compile(r"\\(u.{4}|.)", re.DOTALL)
_SHORT_ESCAPES: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def _keyword(token: bytes) -> bytes:
    if token not in (b"true", b"false", b"null"):
        raise _Malformed(f"invalid keyword '{token.decode('ascii')}'")
    return token


def _integer(token: bytes) -> bytes:
    """An integer as it is; beyond 64 bits it becomes a floating-point number."""
    if len(token) <= _INT_DIGITS and INT_MIN <= int(token) <= INT_MAX:
        return b"%d" % int(token)  # -0 is 0
    return _float(token)


def _float(token: bytes) -> bytes:
    # QEMU lets these through and echoes `inf`, which no client can read.
    value = float(token)
    if value in (float("inf"), float("-inf")):
        raise _Malformed("number out of range")
    return repr(value).encode("ascii")


def _double_quoted(token: bytes) -> bytes:
    _check_string(token)
    return _REQUOTE_DOUBLE.sub(_requote, token) if rb"\'" in token else token


def _single_quoted(token: bytes) -> bytes:
    _check_string(token)
    return b'"' + _REQUOTE_SINGLE.sub(_requote, token[1:-1]) + b'"'


# An escape is looked at as a whole: in an escaped backslash followed by a quote
# there is no escaped quote.
_REQUOTE_DOUBLE: Final = re.compile(rb"\\.", re.DOTALL)
_REQUOTE_SINGLE: Final = re.compile(rb"\\.|\"", re.DOTALL)


def _requote(found: re.Match[bytes]) -> bytes:
    return {b'"': rb"\"", rb"\'": b"'"}.get(found[0], found[0])


def _check_string(token: bytes) -> None:
    """Check escapes and UTF-8; of several faults the first one is reported."""
    body = token[1:-1]
    if b"\\" not in body and body.isascii():
        return
    escapes = _WELL_ESCAPED.match(body)
    bad_escape = escapes.end() if escapes else 0
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < bad_escape:
            raise _Malformed("invalid UTF-8 sequence in string") from None
    if bad_escape < len(body):
        raise _Malformed(_bad_escape(token[1 + bad_escape :]))


def _bad_escape(rest: bytes) -> str:
    if not rest.startswith(rb"\u"):
        return "invalid escape sequence in string"
    shown = rest[:32].decode("utf-8", "replace")[:6]
    return f"{shown} is not a valid Unicode character"


def _unescape(body: bytes) -> str:
    """The characters of a checked string; two spellings of a key are one key."""
    text = body.decode("utf-8")
    if "\\" not in text:
        return text
    text = _ONE_ESCAPE.sub(_character, text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def _character(found: re.Match[str]) -> str:
    name = found[1]
    if len(name) > 1:
        return chr(int(name[1:], 16))
    return _SHORT_ESCAPES.get(name, name)


_PLAIN: Final = {
    State.DOUBLE: _double_quoted,
    State.SINGLE: _single_quoted,
    State.ZERO: _integer,
    State.INTEGER: _integer,
    State.FRACTION: _float,
    State.EXPONENT_DIGITS: _float,
    State.KEYWORD: _keyword,
}
