"""The received bitmap of a RAM block, as a recovery carries it.

It follows the return path message RECV_BITMAP: be64 size, the bits, be64 end
mark. One bit for each target page, least significant first, set for a page
that has been placed. The size is rounded up to 8 bytes, so in memory of a
little-endian machine the bits are 64-bit words as they stand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.stream import constants as c
from common.stream import fields

if TYPE_CHECKING:
    from common.stream.fields import Read


def size_of(pages: int) -> int:
    """Bytes that the bits of so many target pages take on the wire."""
    return -(-pages // 64) * 8


def encode(bits: bytes, pages: int) -> bytes:
    """Frame the bits of a block; ValueError unless they are `size_of` bytes."""
    if len(bits) != size_of(pages):
        raise ValueError(f"{len(bits)} bytes of bitmap for {pages} pages")
    return (
        fields.be64(len(bits))
        + without_padding(bits, pages)
        + fields.be64(c.RAMBLOCK_RECV_BITMAP_ENDING)
    )


def read_untrusted(read: Read, pages: int) -> bytes:
    """Decode the bits of a block that has so many target pages.

    The peer's size must be the one we know, so it never decides what is
    allocated. Bits behind the last page come out as 0.
    """
    size = fields.be64_untrusted(read)
    fields.expect("size of a received bitmap", size_of(pages), size)
    bits = fields.take_untrusted(read, size)
    mark = fields.be64_untrusted(read)
    fields.expect("end mark of a received bitmap", c.RAMBLOCK_RECV_BITMAP_ENDING, mark)
    return without_padding(bits, pages)


def without_padding(bits: bytes, pages: int) -> bytes:
    """Clear the bits behind the last page, where the peer's complement would set."""
    whole, rest = divmod(pages, 8)
    if whole == len(bits):
        return bits
    last = bits[whole] & ((1 << rest) - 1)
    return bits[:whole] + bytes([last]) + bytes(len(bits) - whole - 1)
