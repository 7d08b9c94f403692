"""The file `working-set`: what an earlier destination asked for, in that order.

A u64 for each page, little-endian: the number of its block in the upper 16
bits, the page in the others; see csrc/working_set.h. The CRC32C of all of them
comes last. It is a hint: without it serving is only slower.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from common.errors import HostError
from common.store import files
from common.store.checksum import crc32c
from common.stream import constants as c

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from common.store.manifest import Block

NAME: Final = "working-set"
MAX_PAGES: Final = 1 << 20
_PAGE: Final = 8  # bytes of an entry
_PAGE_BITS: Final = 48
_SUM: Final = 4


def load(directory: Path, blocks: Sequence[Block]) -> tuple[int, ...]:
    """The pages; none if there is no file. HostError if it is damaged."""
    path = directory / NAME
    if not path.exists():
        return ()
    content = files.read(path, MAX_PAGES * _PAGE + _SUM)
    packed = content[:-_SUM]
    if content[-_SUM:] != _sum(packed) or len(packed) % _PAGE:
        raise HostError(f"{path} is not what it was; remove it, it is only a hint")
    pages = struct.unpack(f"<{len(packed) // _PAGE}Q", packed)
    if not _belong(pages, blocks):
        raise HostError(f"{path} is of another VM; remove it, it is only a hint")
    return pages


def save(directory: Path, blocks: Sequence[Block], pages: Sequence[int]) -> None:
    """Durably; of too many pages the first. ValueError for pages of no block."""
    pages = pages[:MAX_PAGES]
    if not _belong(pages, blocks):
        raise ValueError("a working set with pages that are not this VM's")
    packed = struct.pack(f"<{len(pages)}Q", *pages)
    files.replace(directory / NAME, packed + _sum(packed))


def _sum(packed: bytes) -> bytes:
    return crc32c(packed).to_bytes(_SUM, "little")


def _belong(pages: Sequence[int], blocks: Sequence[Block]) -> bool:
    """The C side knows their exact ends: a block may have huge pages."""
    ends = [
        number << _PAGE_BITS | block.length // c.TARGET_PAGE_SIZE
        for number, block in enumerate(blocks)
    ]
    return all(
        page >> _PAGE_BITS < len(ends) and page < ends[page >> _PAGE_BITS]
        for page in pages
    )
