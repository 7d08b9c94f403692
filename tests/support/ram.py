"""RAM in shared files: filled with a pattern, compared byte by byte.

The files are memfds made by the test and opened again by the program under
test, so that the test sees the guest's bytes without asking anybody. While a
destination waits for missing pages the test must keep its hands off: reading a
hole of a shared file fills it.
"""

from __future__ import annotations

import mmap
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

KIB = 1024
MIB = 1024 * KIB
PAGE = 4 * KIB
HUGE_PAGE = 2 * MIB

_MFD_HUGE_2MB = 21 << 26  # log2 of the page size, from linux/memfd.h
_COMPARE_AT_ONCE = MIB


@dataclass(frozen=True)
class Block:
    """What a RAM block is: its name, and bytes."""

    name: str = "ram"
    size: int = 64 * MIB
    page_size: int = PAGE


class SharedRam:
    """One RAM block in a memfd, mapped by the test."""

    def __init__(self, block: Block) -> None:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if block.page_size == HUGE_PAGE:
            flags |= os.MFD_HUGETLB | _MFD_HUGE_2MB
        self.block = block
        self.fd = os.memfd_create(block.name, flags)
        os.ftruncate(self.fd, block.size)
        self.bytes = mmap.mmap(self.fd, block.size)

    def close(self) -> None:
        self.bytes.close()
        os.close(self.fd)

    def fill(self, seed: int, start: int = 0) -> None:
        """Write runs of data, zero, untouched and nearly empty pages."""
        chance = random.Random(seed)
        pool = chance.randbytes(64 * KIB)
        page = start // PAGE
        while page * PAGE < self.block.size:
            write = chance.choice(_PAGE_WRITERS)
            last = min(page + chance.randint(1, 64), self.block.size // PAGE)
            for number in range(page, last):
                write(self.bytes, number, chance, pool)
            page = last


def _data(ram: mmap.mmap, page: int, chance: random.Random, pool: bytes) -> None:
    start = chance.randrange(len(pool) - PAGE)
    # The page number makes every page differ from every other.
    body = page.to_bytes(8, "little") + pool[start : start + PAGE - 8]
    ram[page * PAGE : (page + 1) * PAGE] = body


def _zero(ram: mmap.mmap, page: int, _chance: random.Random, _pool: bytes) -> None:
    ram[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)


def _untouched(ram: mmap.mmap, page: int, chance: random.Random, pool: bytes) -> None:
    pass


def _sparse(ram: mmap.mmap, page: int, chance: random.Random, _pool: bytes) -> None:
    ram[page * PAGE + chance.randrange(PAGE)] = chance.randint(1, 255)


_PAGE_WRITERS = (_data, _data, _data, _zero, _untouched, _sparse)


def difference(ours: SharedRam, theirs: SharedRam) -> str | None:
    """Say where two blocks differ first, or None."""
    name, size = ours.block.name, ours.block.size
    if size != theirs.block.size:
        return f"{name}: {size} and {theirs.block.size} bytes"
    for start in range(0, size, _COMPARE_AT_ONCE):
        one = ours.bytes[start : start + _COMPARE_AT_ONCE]
        two = theirs.bytes[start : start + _COMPARE_AT_ONCE]
        if one != two:
            pairs = enumerate(zip(one, two, strict=True))
            at = next(i for i, (a, b) in pairs if a != b)
            return (
                f"{name} differs first at {start + at:#x}: "
                f"{one[at : at + 16].hex()} and {two[at : at + 16].hex()}"
            )
    return None


def assert_equal_ram(ours: Iterable[SharedRam], theirs: Iterable[SharedRam]) -> None:
    """Fail at the first byte that differs; two empty lists differ, too."""
    pairs = list(zip(ours, theirs, strict=True))
    assert pairs, "there is no RAM to compare"
    found = [text for one, two in pairs if (text := difference(one, two))]
    assert not found, "; ".join(found)
    assert any(one.bytes[:].count(0) < one.block.size for one, _ in pairs), (
        "the RAM is equal because it is empty"
    )
