"""RAM records: what the body of a RAM section is made of.

A record begins with a be64 of which the bits below the page size are flags and
the others a byte offset. CONTINUE stands for the block of the page record
before it on the same channel, across section boundaries; a preempt channel has
a memory of its own. This is the readable twin of csrc/wire.c: both encode the
same records to the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from common.errors import StreamError
from common.stream import constants as c
from common.stream import fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.stream.fields import Read


@dataclass(frozen=True, slots=True)
class Zero:
    """A page of zeroes; `block` is None for "as in the record before"."""

    offset: int
    block: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """A page with its bytes, one target page of them."""

    offset: int
    block: str | None
    data: bytes


@dataclass(frozen=True, slots=True)
class Eos:
    """The end of a section's body."""


@dataclass(frozen=True, slots=True)
class MemSize:
    """Begins the block list in the setup body, which `section` reads."""

    total: int


@dataclass(frozen=True, slots=True)
class MultifdFlush:
    """Nothing to do without multifd."""


Record = Zero | Page | Eos | MemSize | MultifdFlush

_REFUSED: Final = {
    c.RAM_SAVE_FLAG_XBZRLE: "an XBZRLE page, and xbzrle is off",
    c.RAM_SAVE_FLAG_HOOK: "an RDMA hook, and there is no RDMA",
    c.RAM_SAVE_FLAG_COMPRESS_PAGE: "a compressed page, and compress is off",
}


def encode(record: Record) -> bytes:
    """One record as it stands; ValueError for an offset inside a page."""
    match record:
        case Zero(offset, block):
            return _page_header(offset, block, c.RAM_SAVE_FLAG_ZERO) + b"\0"
        case Page(offset, block, data):
            if len(data) != c.TARGET_PAGE_SIZE:
                raise ValueError(f"a page has no {len(data)} bytes")
            return _page_header(offset, block, c.RAM_SAVE_FLAG_PAGE) + data
        case MemSize(total):
            return fields.be64(_aligned(total) | c.RAM_SAVE_FLAG_MEM_SIZE)
        case MultifdFlush():
            return fields.be64(c.RAM_SAVE_FLAG_MULTIFD_FLUSH)
        case Eos():
            return fields.be64(c.RAM_SAVE_FLAG_EOS)


def _page_header(offset: int, block: str | None, flag: int) -> bytes:
    if block is None:
        return fields.be64(_aligned(offset) | flag | c.RAM_SAVE_FLAG_CONTINUE)
    return fields.be64(_aligned(offset) | flag) + fields.name(block)


def _aligned(offset: int) -> int:
    if offset % c.TARGET_PAGE_SIZE:
        raise ValueError(f"offset {offset:#x} is inside a page")
    return offset


def read_untrusted(read: Read) -> Record:
    """Decode one record as it stands, with None for a block that continues."""
    word = fields.be64_untrusted(read)
    flags = word % c.TARGET_PAGE_SIZE
    offset = word - flags
    match flags & ~c.RAM_SAVE_FLAG_CONTINUE:
        case c.RAM_SAVE_FLAG_ZERO:
            block = _block_untrusted(read, flags)
            fields.expect("fill byte of a zero page", 0, fields.u8_untrusted(read))
            return Zero(offset, block)
        case c.RAM_SAVE_FLAG_PAGE:
            block = _block_untrusted(read, flags)
            return Page(offset, block, fields.take_untrusted(read, c.TARGET_PAGE_SIZE))
        case c.RAM_SAVE_FLAG_MEM_SIZE if flags == c.RAM_SAVE_FLAG_MEM_SIZE:
            return MemSize(fields.bounded("RAM", offset, c.MAX_RAM_BYTES))
        case c.RAM_SAVE_FLAG_EOS if word == c.RAM_SAVE_FLAG_EOS:
            return Eos()
        case c.RAM_SAVE_FLAG_MULTIFD_FLUSH if word == c.RAM_SAVE_FLAG_MULTIFD_FLUSH:
            return MultifdFlush()
        case kind:
            what = _REFUSED.get(kind, "a RAM record of an unknown kind")
            raise StreamError(f"the source sent {what}", got=flags)


def _block_untrusted(read: Read, flags: int) -> str | None:
    return None if flags & c.RAM_SAVE_FLAG_CONTINUE else fields.name_untrusted(read)


class RecordWriter:
    """Encodes page records of one channel, naming a block only when it changes."""

    def __init__(self) -> None:
        self._block: str | None = None

    def zero(self, block: str, offset: int) -> bytes:
        return encode(Zero(offset, self._named(block)))

    def page(self, block: str, offset: int, data: bytes) -> bytes:
        return encode(Page(offset, self._named(block), data))

    def forget(self) -> None:
        """Name the block again: at the switch to postcopy and after a recovery."""
        self._block = None

    def _named(self, block: str) -> str | None:
        if block == self._block:
            return None
        self._block = block
        return block


class RecordReader:
    """Decodes records of one channel and fills in the block that continues.

    `blocks` are the lengths of the RAM blocks in bytes; a page must be in one
    of them.
    """

    def __init__(self, read: Read, blocks: Mapping[str, int]) -> None:
        self._read = read
        self._blocks = blocks
        self._block: str | None = None

    def next_untrusted(self) -> Record:
        """The next record; a Zero or Page always has its block."""
        record = read_untrusted(self._read)
        if isinstance(record, Zero | Page):
            return self._placed(record)
        return record

    def _placed(self, record: Zero | Page) -> Zero | Page:
        block = record.block or self._block
        if block is None:
            raise StreamError("the first page record does not name its RAM block")
        if block not in self._blocks:
            raise StreamError("unknown RAM block", got=block)
        if record.offset >= self._blocks[block]:
            raise StreamError(
                f"a page is past the end of RAM block {block}",
                expected=f"below {self._blocks[block]:#x}",
                got=record.offset,
            )
        self._block = block
        return replace(record, block=block)
