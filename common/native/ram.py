"""The C table of RAM blocks, made from a guest's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from common.errors import HostError
from common.native._native import ffi, lib
from common.native.loop import check

if TYPE_CHECKING:
    from collections.abc import Sequence


class Block(Protocol):
    """What the table needs to know of a guest's RAM block; sizes in bytes."""

    @property
    def idstr(self) -> str: ...

    @property
    def length(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    @property
    def base(self) -> int: ...

    @property
    def fd(self) -> int: ...

    @property
    def start(self) -> int: ...


class Ram:
    """Owns the table and its bitmaps; the descriptors stay the guest's.

    Without blocks it is empty until they are known, and `open` is called.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.native = ffi.new("struct ram *")
        if blocks:
            self.open(blocks)

    def open(self, blocks: Sequence[Block]) -> None:
        check(lib.ram_open(self.native, len(blocks)))
        try:
            for block in blocks:
                _add(self.native, block)
        except HostError:
            self.close()
            raise

    def close(self) -> None:
        lib.ram_close(self.native)


def _add(native: object, block: Block) -> None:
    try:
        check(
            lib.ram_add(
                native,
                block.idstr.encode(),
                block.length,
                block.page_size,
                block.base,
                block.fd,
            )
        )
        if block.start:
            check(lib.ram_start_at(native, block.start))
    except HostError as error:
        raise HostError(f"RAM block {block.idstr}: {error}") from None


def negotiate(userfaultfd: int) -> int:
    """Abilities of a userfaultfd that was never used, as a UFFD_CAN_… mask."""
    abilities = ffi.new("uint32_t *")
    check(lib.uffd_negotiate(userfaultfd, abilities))
    return int(abilities[0])
