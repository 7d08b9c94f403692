"""JSON text to Python values and back; the only module that imports ujson.

ujson is a fast parser and not the protocol. On the way in it only sees what
`lexer` has checked and rewritten. On the way out its text is brought into
QEMU's form: ASCII only, upper-case escapes, one line, CR LF.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import ujson

from common.qmp.lexer import Lexer, LexError, Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Json: TypeAlias = (
    "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
)

# A backslash is consumed together with what it escapes, so that the text of
# an escaped backslash followed by `u00e9` is left alone.
_ESCAPE: Final = re.compile(r"\\(?:u[0-9a-f]{4}|.)")


def decode(text: Text) -> Json:
    """The value of a text that came out of the lexer."""
    return cast("Json", ujson.loads(text.json))


def decode_packet(packet: bytes) -> Json:
    """The value of a packet that must hold exactly one JSON text.

    Raises ValueError with the lexer's description, whatever the bytes are.
    """
    # The line feed completes a scalar, which has no end of its own.
    events = Lexer().feed(packet + b"\n")
    if len(events) != 1:
        raise ValueError(f"{len(events)} JSON texts in one packet, expected 1")
    if isinstance(events[0], LexError):
        raise ValueError(events[0].desc)
    return decode(events[0])


def encode(value: Json) -> bytes:
    """One line for the wire. Raises TypeError or ValueError for what is not JSON."""
    return encode_text(value).encode("ascii") + b"\r\n"


def encode_text(value: Json) -> str:
    """`value` in printable ASCII, without a line end."""
    text = ujson.dumps(
        value,
        ensure_ascii=True,
        escape_forward_slashes=False,
        allow_nan=False,
        separators=(", ", ": "),
    )
    return _ESCAPE.sub(_upper_case, text).replace("\x7f", "\\u007F")


def _upper_case(escape: re.Match[str]) -> str:
    found = escape[0]
    return "\\u" + found[2:].upper() if len(found) > 2 else found
