"""The JSON stream: tokens, framing, resynchronising, limits, parse errors."""

from __future__ import annotations

from support.exchanges import NEGOTIATE, exchange, request

NAME = b'{"execute":"query-name"}'


def echo(value: bytes) -> bytes:
    """A request whose id is `value`, which comes back."""
    return b'{"execute":"query-name","id":' + value + b"}"


def pieces(data: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(data[i : i + size] for i in range(0, len(data), size))


# What is sent is the message; the reply tells how it was understood.
FRAMING = [
    exchange("nothing"),
    exchange("white space only", b" \t\r\n\r\n "),
    exchange("one request, no line end", NAME),
    exchange("one request, line end", NAME + b"\n"),
    exchange("one request, CR LF", NAME + b"\r\n"),
    exchange("white space everywhere", b'\n{ "execute"\t:\r\n "query-name" \n}\n'),
    exchange("three requests in one write", NAME * 3),
    exchange("three requests on lines of their own", (NAME + b"\n") * 3),
    exchange("a hundred requests in one write", echo(b"1") * 100),
    exchange("a request in single bytes", *pieces(echo(b'"x"'), 1)),
    exchange("two requests cut in threes", *pieces(echo(b"1") + echo(b"2"), 3)),
    exchange("a character cut in two", echo(b'"\xc3')[:-1], b'\xa4"}'),
    exchange("an escape cut in two", echo(b'"\\u00')[:-1], b'e4"}'),
    exchange("a surrogate pair cut in two", echo(b'"\\ud83d')[:-1], b'\\ude00"}'),
    exchange("a number cut in two", b'{"execute":"query-name","id":12', b"34}"),
    exchange("a keyword cut in two", b'{"execute":"query-name","id":tr', b"ue}"),
    exchange("negotiation behind which a request waits", NEGOTIATE + NAME,
             negotiate=b""),
    exchange("a request that never ends", b'{"execute":"query-name"'),
    exchange("a string that never ends", b'{"execute":"query-na'),
    exchange("a request that never ends, behind one", NAME + NAME[:-1]),
    exchange("brackets are only counted", b'{"a":[1}', NAME, b"]" + NAME),
    exchange("a closing brace too many", NAME + b"}" + NAME),
    exchange("a closing bracket too many", NAME + b"]" + NAME),
    exchange("a brace and a bracket", b"{]" + NAME),
    exchange("a bracket and a brace", b"[}" + NAME),
]  # fmt: skip

# At top level: what is no object, and what is no value at all.
MESSAGES = [
    exchange(f"message {text!r}", text + b"\n" + NAME)
    for text in (
        b"null", b"true", b"false", b"42", b"-1", b"1.5", b"1e3", b'"text"', b"'text'",
        b"[]", b"[1, 2]", b'[{"execute":"query-name"}]', b"{}", b":", b",", b"{,}",
        b"[,]", b"query", b"nul", b"nulll", b"True", b"NULL",
    )
]  # fmt: skip

# A number or a keyword ends only when something else follows.
SCALARS = [
    exchange("a number with nothing behind it", b"42"),
    exchange("a keyword with nothing behind it", b"null"),
    exchange("a number with an object behind it", b"42" + NAME),
    exchange("a string with nothing behind it", b'"x"'),
    exchange("an array with nothing behind it", b"[]"),
]

STRAY = [
    exchange(f"stray {text!r}", text)
    for text in (
        b'%abc "x" 12 ' + NAME,
        b"# comment\n" + NAME,
        b"/* comment */" + NAME,
        b"\xef\xbb\xbf" + NAME,
        b"+1 " + NAME,
        b".5 " + NAME,
        b"=" + NAME,
        b"-}" + NAME,
        b"-" + NAME,
        b"1.}" + NAME,
        b"1.x" + NAME,
        b"1e" + NAME,
        b"1e+" + NAME,
        b"01" + NAME,
        b"-01" + NAME,
        b"-a" + NAME,
        b"Infinity " + NAME,
        b"\x80" + NAME,
        b"\xff" + NAME,
        b"\xfe" + NAME,
        b"\x7f" + NAME,
        b"\x01" + NAME,
        b"\x1f" + NAME,
        b"\x0b" + NAME,
        b'"que\n' + NAME,
        b'"que\t' + NAME,
        b"'que\x01" + NAME,
        b'"\xff' + NAME,
        b'"\xfe' + NAME,
        b'"\\\x01"' + NAME,
        b'"\\\xff"' + NAME,
    )
]

RESET = [
    exchange("0x01 in front of a request", b"\x01" + NAME),
    exchange("0xff in front of a request", b"\xff" + NAME),
    exchange("0x01 in a request", b'{"execute":"query-name"\x01' + NAME),
    exchange("0xff in a request", b'{"execute":"query-name"\xff' + NAME),
    exchange("0x01 in a string", b'{"execute":"query-\x01' + NAME),
    exchange("0xff in a string", b'{"execute":"query-\xff' + NAME),
    exchange("0x01 in a number", b'{"id":12\x01' + NAME),
    exchange("0x01 in a keyword", b'{"id":tru\x01' + NAME),
    exchange("0x01 in an escape", b'{"id":"\\u00\x01' + NAME),
    exchange("0x01 in many brackets", b"[[[[{" + b"\x01" + NAME),
    exchange("0xff five times", b"\xff" * 5 + NAME),
    exchange("0x01 and 0xff behind garbage", b"garbage\x01\xff" + NAME),
    exchange("0x04, which ends a line of a terminal", b"{\x04" + NAME),
    exchange("0x1b", b"{\x1b" + NAME),
    exchange("a new line in a string", b'{"execute":"que\nry-name"}' + NAME),
    exchange("a number with a leading zero", echo(b"01") + NAME),
    exchange("a word in upper case", b"QUIT\n" + NAME),
]

# One error for each message, whatever else is wrong in it.
PARSE_ERRORS = [
    exchange(f"parse {text!r}", text + b"\n" + NAME)
    for text in (
        b'{"a":}', b'{"a":1,}', b"[1,]", b"[,1]", b"[1,,2]", b"{1:2}", b"{null:2}",
        b"{[]:2}", b'{"a"}', b'{"a" "b"}', b'{"a","b"}', b'{"a":1 "b":2}', b'{"a":1]',
        b'{"a":1:2}', b"[1 2]", b"[1:2]", b'[{"a"}]', b'{"a":[1 2]}', b'{"a":nope}',
        b"[nope, [1 2]]", b'{"a":1,"a":1}', b'{"execute":"query-name","execute":"x"}',
        b'{"a":{"b":1,"b":2}}', b'{"id":1,"\\u0069d":2}', b"[[[[]]]", b"[[[[]]]]]",
        b'{"id":1,"a":}',
    )
]  # fmt: skip

# Behind `invalid`, the request shows that the next message is read again.
STRINGS = [
    exchange(f"string {text!r}", echo(text) + NAME)
    for text in (
        b"''", b"'single'", b"'with \" inside'", b'"with \' inside"',
        b"'with \\' escaped'", b'"with \\\' escaped"', b"'with \\\" escaped'",
        b'"\\"\\\\\\/\\b\\f\\n\\r\\t"', b'"/"', b'"\\u0041\\u00e4\\u20ac"',
        b'"\\u00E4\\u00e4"', b'"\\ud83d\\ude00"', b'"\\uD83D\\uDE00"',
        b'"\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80"', b'"\x7f"', b'"\\u007f"',
        b'"\\u0001"', b'"\\u001f"', b'"\\uffff"', b'"\\ufffe"', b'"\\ufdd0"',
        b'"\\ue000"',
        b'"\xef\xbf\xbd"', b'"\xef\xbb\xbf"', b'"\xee\x80\x80"', b'"\xf4\x8f\xbf\xbd"',
        # wrong escapes
        b'"\\x41"', b'"\\a"', b'"\\ "', b'"\\0"', b'"\\U0041"', b'"\\u"', b'"\\u00"',
        b'"\\u00g0"', b'"\\u 041"', b'"\\ud800"', b'"\\udc00"', b'"\\ud800x"',
        b'"\\ud800\\n"', b'"\\ud800\\u0041"', b'"\\ud800\\ud800"', b'"\\udc00\\ud800"',
        b'"\\u0000"', b'"\\uD800\\uDBFF"',
        # malformed UTF-8
        b'"\x80"', b'"\xbf"', b'"\xc3"', b'"\xc3("', b'"\xc0\xaf"', b'"\xc1\xbf"',
        b'"\xe0\x80\xaf"', b'"\xe2\x82"', b'"\xe2("', b'"\xed\xa0\x80"',
        b'"\xed\xbf\xbf"', b'"\xf0\x80\x80\xaf"', b'"\xf0\x9f\x98"',
        b'"\xf4\x90\x80\x80"', b'"\xf5\x80\x80\x80"', b'"\xf8\x88\x80\x80\x80"',
        b'"\xfc\x84\x80\x80\x80\x80"', b'"\xc0\x80"', b'"\xef\xbf\xbe"',
        b'"\xef\xbf\xbf"', b'"\xf0\x9f\xbf\xbe"',
    )
]  # fmt: skip

IDS = [
    exchange(f"id {text!r}", echo(text))
    for text in (
        b"null", b"true", b"false", b"0", b"-0", b"1", b"-1", b"9223372036854775807",
        b"9223372036854775808", b"18446744073709551615", b"18446744073709551616",
        b"-9223372036854775808", b"-9223372036854775809", b"0.1", b"-0.0", b"1.0",
        b"1e3", b"1E3", b"1e-3", b"1.5e+10", b"1e308", b"3.141592653589793238",
        b"123456789012345678901234567890", b'""', b'"text"', b"[]", b"{}",
        b"[null, [1, {}]]", b'{"a": {"b": [1, 2.5, "x"]}}', b'{"": ""}',
        b'{"class": "x", "return": 1}', b"1e400", b"-1e400", b"NaN", b"Infinity",
        b"-Infinity", b"nan", b"0x10", b"1_000", b"1.", b".1", b"+1", b"- 1", b"00",
    )
]  # fmt: skip


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


LIMITS = [
    # The request itself is one level.
    exchange("an id as deep as may be", echo(nested(1023)), asks_last=True),
    exchange("an id one too deep", echo(nested(1024)), asks_last=True),
    exchange("arrays as deep as may be", nested(1024), asks_last=True),
    exchange("arrays one too deep", nested(1025), asks_last=True),
    exchange("arrays far too deep", b"[" * 5000 + b"\x01", asks_last=True),
    exchange("objects one too deep", b'{"a":' * 1025 + b"\x01", asks_last=True),
    exchange("a string of 64 KiB", echo(b'"' + b"x" * 65536 + b'"'), asks_last=True),
    exchange("a string of 200 KiB", echo(b'"' + b"x" * 200_000 + b'"'), asks_last=True,
             ends=("source",)),
    exchange("an array of 10000", echo(b"[" + b"1," * 9999 + b"1]"), asks_last=True),
    exchange("a command name of 64 KiB", request("x" * 65536), asks_last=True),
]  # fmt: skip

EXCHANGES = [
    *FRAMING,
    *MESSAGES,
    *SCALARS,
    *STRAY,
    *RESET,
    *PARSE_ERRORS,
    *STRINGS,
    *IDS,
    *LIMITS,
]
