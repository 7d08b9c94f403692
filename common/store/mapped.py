"""RAM's setup in a file of QEMU's mapped-ram, and the RAM that it points to.

In the block list each block is followed by a header and by its pages, so the
stream goes on behind them:

    be64 total | MEM_SIZE
    per block: name, be64 length,
               be32 1, be64 page size, be64 place of the bitmap, be64 place of page 0
               bitmap: of each page whether it is data, in u64 little-endian
               the pages
    be64 EOS

Places count from the beginning of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.errors import HostError, StreamError
from common.native._native import ffi, lib
from common.native.loop import Stop, check, run_loop
from common.stream import bitmap, fields
from common.stream import constants as c

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.native import CData
    from common.store.reading import FileReader

VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedBlock:
    """Page 0 is at `start` of the file; `data` has a bit for each page."""

    name: str
    length: int
    start: int
    data: bytes


def read_setup_untrusted(file: FileReader) -> tuple[MappedBlock, ...]:
    """The body of RAM's START section; `file` stands behind it afterwards."""
    word = fields.be64_untrusted(file)
    flags = word % c.TARGET_PAGE_SIZE
    fields.expect("RAM setup", c.RAM_SAVE_FLAG_MEM_SIZE, flags)
    left = fields.bounded("RAM", word - flags, c.MAX_RAM_BYTES)
    blocks: dict[str, MappedBlock] = {}
    while left:
        fields.bounded("number of RAM blocks", len(blocks) + 1, c.MAX_BLOCKS)
        block = _block_untrusted(file, left)
        if block.name in blocks:
            raise StreamError("repeated RAM block", got=block.name)
        blocks[block.name] = block
        left -= block.length
    fields.expect("end of RAM setup", c.RAM_SAVE_FLAG_EOS, fields.be64_untrusted(file))
    return tuple(blocks.values())


def _block_untrusted(file: FileReader, left: int) -> MappedBlock:
    name = fields.name_untrusted(file)
    length = fields.be64_untrusted(file)
    if length == 0 or length % c.TARGET_PAGE_SIZE:
        raise StreamError(f"RAM block {name} is not made of whole pages", got=length)
    fields.bounded(f"RAM block {name}", length, left)
    fields.expect("mapped-ram version", VERSION, fields.be32_untrusted(file))
    page_size = fields.be64_untrusted(file)
    fields.expect("mapped-ram page size", c.TARGET_PAGE_SIZE, page_size)
    at = fields.be64_untrusted(file)
    start = fields.be64_untrusted(file)
    fields.expect(f"place of the bitmap of RAM block {name}", file.offset, at)
    pages = length // c.TARGET_PAGE_SIZE
    size = bitmap.size_of(pages)
    if start % c.TARGET_PAGE_SIZE or start < at + size:
        raise StreamError(f"pages of RAM block {name} at an odd place", got=start)
    if start + length > file.size:
        raise StreamError(
            f"the pages of RAM block {name} are cut off", start + length, file.size
        )
    data = fields.take_untrusted(file, size)
    if int.from_bytes(data[-8:], "little") >> ((pages - 1) % 64 + 1):
        raise StreamError(f"the bitmap of RAM block {name} has pages past its end")
    file.seek(start + length)
    return MappedBlock(name=name, length=length, start=start, data=data)


# --- the pages -----------------------------------------------------------------------


async def copy(fd: int, block: MappedBlock, to: int) -> None:
    """Its data to the file `to`, which is one hole; the blocks shared if possible."""
    await _run(fd, block, lambda native, stop: lib.mapped_copy(native, to, stop.fd))


async def stale_pages(fd: int, block: MappedBlock, *, punch: bool = False) -> int:
    """How many pages are zero and have other bytes in the file.

    `punch`: they are holes afterwards; `fd` is writable then.
    """
    pages = ffi.new("uint64_t *")
    await _run(
        fd, block, lambda native, stop: lib.mapped_stale(native, punch, pages, stop.fd)
    )
    return int(pages[0])


async def _run(
    fd: int, block: MappedBlock, loop: Callable[[CData, Stop], CData]
) -> None:
    bits = ffi.new("struct bitmap *")
    stop = Stop()
    try:
        check(lib.bitmap_open(bits, block.length // c.TARGET_PAGE_SIZE))
        try:
            ffi.memmove(bits.words, block.data, len(block.data))
            native = ffi.new(
                "struct mapped *", {"fd": fd, "start": block.start, "data": bits}
            )
            await run_loop(lambda: loop(native, stop), stop)
        finally:
            lib.bitmap_close(bits)
    except HostError as error:
        raise HostError(
            f"RAM block {block.name}: {error.message}", errno=error.errno
        ) from None
    finally:
        stop.close()
