"""The return path: what the destination tells the source.

Every message is a be16 type, a be16 length, and that many bytes. Only the
bitmap behind RECV_BITMAP is outside the length; `bitmap` reads it. A QEMU
source that meets a message it does not understand fails and runs its guest
again, even in postcopy: `Failure`, which is ours, goes to srcd alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields

if TYPE_CHECKING:
    from common.stream.fields import Read


@dataclass(frozen=True, slots=True)
class Shut:
    """The last message; `status` is 0 only after everything has been loaded."""

    status: int


@dataclass(frozen=True, slots=True)
class Pong:
    value: int


@dataclass(frozen=True, slots=True)
class ReqPages:
    """Asks for `length` bytes at `start`: one host page.

    `block` is None for "the same as in the last request on this connection".
    """

    start: int
    length: int
    block: str | None = None


@dataclass(frozen=True, slots=True)
class RecvBitmap:
    """The received bitmap of `block` follows, not counted in the length."""

    block: str


@dataclass(frozen=True, slots=True)
class ResumeAck:
    value: int = c.MIGRATION_RESUME_ACK_VALUE


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    """No device holds up the switchover any more."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the destination gives up: one sentence, before SHUT 1. Only to srcd."""

    text: str


Message = Shut | Pong | ReqPages | RecvBitmap | ResumeAck | SwitchoverAck | Failure


def encode(message: Message) -> bytes:
    """The message; ValueError for values that do not fit.

    The text of a Failure is made to fit instead: a long one is cut, and what
    cannot be printed becomes a space.
    """
    number, payload = _parts(message)
    return fields.be16(number) + fields.be16(len(payload)) + payload


def _parts(message: Message) -> tuple[int, bytes]:
    match message:
        case Shut(status):
            return c.MIG_RP_MSG_SHUT, fields.be32(status)
        case Pong(value):
            return c.MIG_RP_MSG_PONG, fields.be32(value)
        case ReqPages(start, length, None):
            return c.MIG_RP_MSG_REQ_PAGES, fields.be64(start) + fields.be32(length)
        case ReqPages(start, length, str(block)):
            where = fields.be64(start) + fields.be32(length)
            return c.MIG_RP_MSG_REQ_PAGES_ID, where + fields.name(block)
        case RecvBitmap(block):
            return c.MIG_RP_MSG_RECV_BITMAP, fields.name(block)
        case ResumeAck(value):
            return c.MIG_RP_MSG_RESUME_ACK, fields.be32(value)
        case Failure(text):
            return c.RP_X_FAILURE, _printable(text)
        case _:
            return c.MIG_RP_MSG_SWITCHOVER_ACK, b""


def _printable(text: str) -> bytes:
    """At most MAX_FAILURE_TEXT bytes, cut between two characters."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line.encode()[: c.MAX_FAILURE_TEXT].decode(errors="ignore").encode()


def read_untrusted(read: Read) -> Message:
    """Decode one message; a RecvBitmap leaves its bitmap to be read."""
    number = fields.be16_untrusted(read)
    length = fields.be16_untrusted(read)
    if number not in _LENGTHS:
        raise StreamError("unknown return path message", got=number)
    if length not in _LENGTHS[number]:
        raise StreamError(f"wrong length of return path message {number}", got=length)
    payload = fields.over(fields.take_untrusted(read, length))
    message = _payload_untrusted(payload, number, length)
    fields.expect("end of return path message", length, payload.offset)
    return message


_LENGTHS: Final[dict[int, range | tuple[int, ...]]] = {
    c.MIG_RP_MSG_SHUT: (4,),
    c.MIG_RP_MSG_PONG: (4,),
    c.MIG_RP_MSG_REQ_PAGES_ID: range(12 + 2, 12 + 1 + c.MAX_NAME + 1),
    c.MIG_RP_MSG_REQ_PAGES: (12,),
    c.MIG_RP_MSG_RECV_BITMAP: range(2, 1 + c.MAX_NAME + 1),
    c.MIG_RP_MSG_RESUME_ACK: (4,),
    c.MIG_RP_MSG_SWITCHOVER_ACK: (0,),
    c.RP_X_FAILURE: range(c.MAX_FAILURE_TEXT + 1),
}


def _payload_untrusted(payload: fields.Reader, number: int, length: int) -> Message:
    match number:
        case c.MIG_RP_MSG_SHUT:
            return Shut(fields.be32_untrusted(payload))
        case c.MIG_RP_MSG_PONG:
            return Pong(fields.be32_untrusted(payload))
        case c.MIG_RP_MSG_REQ_PAGES_ID | c.MIG_RP_MSG_REQ_PAGES:
            return _request_untrusted(payload, number)
        case c.MIG_RP_MSG_RECV_BITMAP:
            return RecvBitmap(fields.name_untrusted(payload))
        case c.MIG_RP_MSG_RESUME_ACK:
            return ResumeAck(fields.be32_untrusted(payload))
        case c.RP_X_FAILURE:
            return Failure(
                fields.text_untrusted(fields.take_untrusted(payload, length))
            )
        case _:
            return SwitchoverAck()


def _request_untrusted(payload: fields.Reader, number: int) -> ReqPages:
    """A request for whole target pages; the block's own rules are the caller's."""
    start = fields.be64_untrusted(payload)
    length = fields.be32_untrusted(payload)
    if length == 0 or start % c.TARGET_PAGE_SIZE or length % c.TARGET_PAGE_SIZE:
        raise StreamError("a request is not for whole pages", got=(start, length))
    fields.bounded("end of a request", start + length, c.MAX_RAM_BYTES)
    if number == c.MIG_RP_MSG_REQ_PAGES:
        return ReqPages(start, length)
    return ReqPages(start, length, fields.name_untrusted(payload))
