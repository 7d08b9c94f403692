"""The commands that a source puts into its stream.

Each is the type byte QEMU_VM_COMMAND, a be16 command, a be16 length, and that
many bytes. A QEMU destination ends the migration at a command it does not know
and at a length that is not the command's own, and so do we.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from common.stream.fields import Read


@dataclass(frozen=True, slots=True)
class OpenReturnPath:
    """The destination may talk from now on; without it no PING is allowed."""


@dataclass(frozen=True, slots=True)
class Ping:
    """A milestone; the destination answers with a PONG of the same value."""

    value: int


@dataclass(frozen=True, slots=True)
class Advise:
    """Postcopy may follow. A destination throws away all RAM it has.

    `page_sizes` is the OR of the host page sizes of all blocks.
    """

    page_sizes: int
    target_page: int = c.TARGET_PAGE_SIZE


@dataclass(frozen=True, slots=True)
class AdviseEmpty:
    """Postcopy of dirty bitmaps only may follow, not of RAM."""


@dataclass(frozen=True, slots=True)
class Listen:
    """What follows behind the package are pages for a running guest."""


@dataclass(frozen=True, slots=True)
class Run:
    """The guest runs at the destination from here on."""


@dataclass(frozen=True, slots=True)
class RamDiscard:
    """Drop these ranges, (start, length) in bytes; they will be sent again."""

    block: str
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Packaged:
    """`size` bytes follow the command, to be read whole before any is used."""

    size: int


@dataclass(frozen=True, slots=True)
class Resume:
    """End of the recovery handshake; pages follow once it is acknowledged."""


@dataclass(frozen=True, slots=True)
class RecvBitmap:
    """Asks a paused destination what it has received of `block`."""

    block: str


@dataclass(frozen=True, slots=True)
class Layout:
    """What chunks of `block` hold, from number `first` on: one byte for each.

    0: mixed; 1: nothing, and nothing will be sent; 2: data. Ours: only for a
    destination that has said HELLO_ACK.
    """

    block: str
    first: int
    kinds: bytes


@dataclass(frozen=True, slots=True)
class SwitchoverStart:
    """The guest has been stopped. QEMU before 10.0 does not know this command."""


Command = (
    OpenReturnPath
    | Ping
    | Advise
    | AdviseEmpty
    | Listen
    | Run
    | RamDiscard
    | Packaged
    | Resume
    | RecvBitmap
    | SwitchoverStart
    | Layout
)

_Empty = OpenReturnPath | Listen | Run | Resume | SwitchoverStart
_EMPTY: Final[dict[int, type[_Empty]]] = {
    c.MIG_CMD_OPEN_RETURN_PATH: OpenReturnPath,
    c.MIG_CMD_POSTCOPY_LISTEN: Listen,
    c.MIG_CMD_POSTCOPY_RUN: Run,
    c.MIG_CMD_POSTCOPY_RESUME: Resume,
    c.MIG_CMD_SWITCHOVER_START: SwitchoverStart,
}
_EMPTY_IDS: Final[dict[type[Command], int]] = {
    kind: number for number, kind in _EMPTY.items()
}


def encode(command: Command) -> bytes:
    """The command with its type byte; ValueError for values that do not fit."""
    number, payload = _parts(command)
    return (
        bytes([c.QEMU_VM_COMMAND])
        + fields.be16(number)
        + fields.be16(len(payload))
        + payload
    )


def _parts(command: Command) -> tuple[int, bytes]:
    match command:
        case Ping(value):
            return c.MIG_CMD_PING, fields.be32(value)
        case Advise(page_sizes, target_page):
            payload = fields.be64(page_sizes) + fields.be64(target_page)
            return c.MIG_CMD_POSTCOPY_ADVISE, payload
        case AdviseEmpty():
            return c.MIG_CMD_POSTCOPY_ADVISE, b""
        case RamDiscard():
            return c.MIG_CMD_POSTCOPY_RAM_DISCARD, _encode_discard(command)
        case Packaged(size):
            if size > c.MAX_PACKAGE:
                raise ValueError(f"a package of {size} bytes is too large")
            return c.MIG_CMD_PACKAGED, fields.be32(size)
        case RecvBitmap(block):
            return c.MIG_CMD_RECV_BITMAP, fields.name(block)
        case Layout():
            return c.MIG_CMD_X_LAYOUT, _encode_layout(command)
        case _:
            return _EMPTY_IDS[type(command)], b""


def _encode_discard(command: RamDiscard) -> bytes:
    if not command.ranges:
        raise ValueError("a discard needs at least one range")
    return (
        bytes([c.POSTCOPY_RAM_DISCARD_VERSION])
        + fields.name(command.block)
        + b"\0"
        + b"".join(fields.be64(at) + fields.be64(size) for at, size in command.ranges)
    )


def _encode_layout(command: Layout) -> bytes:
    if not 0 < len(command.kinds) <= c.MAX_LAYOUT:
        raise ValueError(f"a layout of {len(command.kinds)} chunks")
    return (
        bytes([c.LAYOUT_VERSION])
        + fields.name(command.block)
        + fields.be64(command.first)
        + command.kinds
    )


def discards(block: str, ranges: Sequence[tuple[int, int]]) -> Iterator[RamDiscard]:
    """Spread a block's ranges over as many commands as QEMU would."""
    pending = iter(ranges)
    while batch := tuple(islice(pending, c.MAX_DISCARDS_PER_COMMAND)):
        yield RamDiscard(block, batch)


def read_untrusted(read: Read) -> Command:
    """Decode the command behind the type byte QEMU_VM_COMMAND.

    The bytes of a package are not read, only their number, which is within
    MAX_PACKAGE.
    """
    number = fields.be16_untrusted(read)
    length = fields.be16_untrusted(read)
    if number not in _LENGTHS:
        raise StreamError("unknown command", got=number)
    if length not in _LENGTHS[number]:
        raise StreamError(f"wrong length of command {number}", got=length)
    payload = fields.over(fields.take_untrusted(read, length))
    command = _payload_untrusted(payload, number, length)
    fields.expect("end of command", length, payload.offset)
    return command


_LENGTHS: Final[dict[int, range | tuple[int, ...]]] = {
    **dict.fromkeys(_EMPTY, (0,)),
    c.MIG_CMD_PING: (4,),
    c.MIG_CMD_POSTCOPY_ADVISE: (0, 16),
    c.MIG_CMD_POSTCOPY_RAM_DISCARD: range(3 + 1 + 16, 1 << 16),
    c.MIG_CMD_PACKAGED: (4,),
    c.MIG_CMD_RECV_BITMAP: range(2, 1 + c.MAX_NAME + 1),
    c.MIG_CMD_X_LAYOUT: range(1 + 2 + 8 + 1, 1 + 1 + c.MAX_NAME + 8 + c.MAX_LAYOUT + 1),
}


def _payload_untrusted(payload: fields.Reader, number: int, length: int) -> Command:
    match number:
        case c.MIG_CMD_PING:
            return Ping(fields.be32_untrusted(payload))
        case c.MIG_CMD_POSTCOPY_ADVISE if length == 0:
            return AdviseEmpty()
        case c.MIG_CMD_POSTCOPY_ADVISE:
            return Advise(
                fields.be64_untrusted(payload), fields.be64_untrusted(payload)
            )
        case c.MIG_CMD_POSTCOPY_RAM_DISCARD:
            return _discard_untrusted(payload, length)
        case c.MIG_CMD_PACKAGED:
            size = fields.be32_untrusted(payload)
            return Packaged(fields.bounded("package", size, c.MAX_PACKAGE))
        case c.MIG_CMD_RECV_BITMAP:
            return RecvBitmap(fields.name_untrusted(payload))
        case c.MIG_CMD_X_LAYOUT:
            return _layout_untrusted(payload, length)
        case _:
            return _EMPTY[number]()


def _layout_untrusted(payload: fields.Reader, length: int) -> Layout:
    version = fields.u8_untrusted(payload)
    fields.expect("layout version", c.LAYOUT_VERSION, version)
    block = fields.name_untrusted(payload)
    first = fields.be64_untrusted(payload)
    fields.bounded("first chunk of a layout", first, c.MAX_RAM_BYTES // c.LAYOUT_CHUNK)
    left = fields.bounded("chunks in a layout", length - payload.offset, c.MAX_LAYOUT)
    if left <= 0:
        raise StreamError("a layout without chunks", got=length)
    return Layout(block, first, fields.take_untrusted(payload, left))


def _discard_untrusted(payload: fields.Reader, length: int) -> RamDiscard:
    version = fields.u8_untrusted(payload)
    fields.expect("discard version", c.POSTCOPY_RAM_DISCARD_VERSION, version)
    block = fields.name_untrusted(payload)
    fields.expect("end of a block name", 0, fields.u8_untrusted(payload))
    count, rest = divmod(length - payload.offset, 16)
    if count == 0 or rest:
        raise StreamError("a discard does not hold whole ranges", got=length)
    return RamDiscard(block, tuple(_range_untrusted(payload) for _ in range(count)))


def _range_untrusted(payload: fields.Reader) -> tuple[int, int]:
    start = fields.be64_untrusted(payload)
    length = fields.be64_untrusted(payload)
    if length == 0 or start % c.TARGET_PAGE_SIZE or length % c.TARGET_PAGE_SIZE:
        raise StreamError("a discard is not made of whole pages", got=(start, length))
    fields.bounded("end of a discard", start + length, c.MAX_RAM_BYTES)
    return start, length
