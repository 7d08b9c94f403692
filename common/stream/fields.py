"""The fields that all records are made of: integers, names, and plain bytes.

All integers are big-endian and unsigned. A name is one length byte and as many
bytes of printable UTF-8: names reach logs, replies, and C code where a zero
byte would end them early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.errors import StreamError
from common.stream import constants as c

Read = Callable[[int], bytes]


class Reader:
    """A `read` that knows where in the stream it stands.

    `offset` counts the bytes handed out so far. Inside ``with reader.located():``
    a StreamError without an offset gets the one of the field read last.
    """

    def __init__(self, read: Read, offset: int = 0) -> None:
        self._read = read
        self._last = offset
        self.offset = offset

    def __call__(self, size: int) -> bytes:
        self._last = self.offset
        piece = self._read(size)
        self.offset += len(piece)
        return piece

    @contextmanager
    def located(self) -> Iterator[None]:
        try:
            yield
        except StreamError as error:
            if error.offset is None:
                error.offset = self._last
            raise


def over(data: bytes) -> Reader:
    """Read from bytes in memory; past their end is a short piece."""
    view = memoryview(data)
    position = 0

    def read(size: int) -> bytes:
        nonlocal position
        piece = bytes(view[position : position + size])
        position += len(piece)
        return piece

    return Reader(read)


def be16(value: int) -> bytes:
    return _unsigned(value, 2)


def be32(value: int) -> bytes:
    return _unsigned(value, 4)


def be64(value: int) -> bytes:
    return _unsigned(value, 8)


def name(text: str) -> bytes:
    """A length byte and the name; ValueError unless it has 1 to 255 bytes."""
    raw = text.encode()
    if not 1 <= len(raw) <= c.MAX_NAME or not text.isprintable():
        raise ValueError(f"not a name of the stream: {text!r}")
    return bytes([len(raw)]) + raw


def take_untrusted(read: Read, size: int) -> bytes:
    """Exactly `size` bytes; the caller has checked `size` against a limit."""
    piece = read(size) if size else b""
    if len(piece) != size:
        raise StreamError("the stream ends early", expected=size, got=len(piece))
    return piece


def u8_untrusted(read: Read) -> int:
    return take_untrusted(read, 1)[0]


def be16_untrusted(read: Read) -> int:
    return int.from_bytes(take_untrusted(read, 2), "big")


def be32_untrusted(read: Read) -> int:
    return int.from_bytes(take_untrusted(read, 4), "big")


def be64_untrusted(read: Read) -> int:
    return int.from_bytes(take_untrusted(read, 8), "big")


def name_untrusted(read: Read) -> str:
    raw = take_untrusted(read, u8_untrusted(read))
    if not raw:
        raise StreamError("a name is empty")
    return text_untrusted(raw)


def text_untrusted(raw: bytes) -> str:
    """Printable UTF-8; nothing is said about its length."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise StreamError("a text is not UTF-8", got=raw) from None
    if not text.isprintable():
        raise StreamError("a text is not printable", got=raw)
    return text


def expect(what: str, expected: object, got: object) -> None:
    """Raise StreamError unless the peer sent what it had to."""
    if got != expected:
        raise StreamError(f"wrong {what}", expected=expected, got=got)


def bounded(what: str, value: int, limit: int) -> int:
    """`value` if it is within `limit`; the check before any allocation."""
    if value > limit:
        raise StreamError(
            f"{what} is too large", expected=f"at most {limit}", got=value
        )
    return value


def _unsigned(value: int, size: int) -> bytes:
    try:
        return value.to_bytes(size, "big")
    except OverflowError:
        raise ValueError(f"{value} does not fit in {size} bytes") from None
