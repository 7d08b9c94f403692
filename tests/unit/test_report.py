"""query-migrate's figures, where a wrong one once showed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.guest.base import RamBlock
from common.native._native import ffi, lib
from srcd.pump import Pump

if TYPE_CHECKING:
    from pathlib import Path

    from common.native import CData

SIZE = 1 << 20


def test_what_remains_in_postcopy_is_what_is_owed(tmp_path: Path) -> None:
    """Not what was dirty when the guest stopped, once all of it has been sent."""
    path = tmp_path / "ram"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file:
        block = RamBlock(
            idstr="ram",
            length=SIZE,
            page_size=4096,
            base=0,
            guest_address=0,
            fd=file.fileno(),
        )
        pump = Pump((block,))
        _set(pump, "dirty", SIZE)
        assert pump.remaining_bytes() == SIZE
        pump.owe_dirty()
        assert pump.remaining_bytes() == SIZE
        _clear(pump, "owed", SIZE)
        assert pump.dirty_bytes() == SIZE
        assert pump.remaining_bytes() == 0
        pump.close()
        assert pump.remaining_bytes() == 0


def _set(pump: Pump, bitmap: str, size: int) -> None:
    lib.bitmap_set_range(_bitmap(pump, bitmap), 0, size // 4096)


def _clear(pump: Pump, bitmap: str, size: int) -> None:
    lib.bitmap_clear_range(_bitmap(pump, bitmap), 0, size // 4096)


def _bitmap(pump: Pump, name: str) -> CData:
    return ffi.addressof(pump.ram.native.blocks[0], name)
