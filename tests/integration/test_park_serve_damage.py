"""What has changed in a parked VM is named, and no guest ever sees it."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest
from support import counting_guest
from support.damage import flip
from support.machine import MAIN
from support.parked_machine import (
    EMPTY,
    MEMORY,
    MODES,
    PAUSED,
    Place,
    assert_unharmed,
    both_modes,
    complete,
)
from support.parking import recover
from support.ram import MIB, PAGE

if TYPE_CHECKING:
    from pathlib import Path

    from support.machine import Machine

pytestmark = [pytest.mark.qemu, pytest.mark.userfaultfd]


@pytest.mark.parametrize("restore", ["lazy", "precopy"])
def test_damage_is_named_and_not_sent(place: Place, restore: str) -> None:
    at = 5 * MIB + 3 * PAGE
    flip(place.file_of(MAIN), 8 * at)
    with place.server("--restore", restore) as srcd, place.machine() as qemu:
        if restore == "lazy":
            qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        end = srcd.wait_status("completed", "failed", PAUSED)
        assert end == (PAUSED if restore == "lazy" else "failed")
        said = srcd.query()["error-desc"]
        assert MAIN in said
        assert f"{at // 65536 * 65536:#x}" in said
        assert qemu.ram[0].bytes[at : at + 1] == b"\0"
    assert place.marked == (restore == "lazy")


def unlike(qemu: Machine, right: bytes) -> list[int]:
    """Pages that came and are not as they were, but for what the CPU counts.

    Not read through a mapping: that would fill what QEMU waits for.
    """
    found = os.pread(qemu.ram[0].fd, MEMORY, 0)
    pages = [(at, found[at : at + PAGE]) for at in range(0, MEMORY, PAGE)]
    return [
        at
        for at, page in pages
        if page[2:] != right[at + 2 : at + PAGE] and page.count(0) < PAGE
    ]


@both_modes
def test_running_guest_sees_no_damaged_page(place: Place, mode: str) -> None:
    """It waits for it, wherever it is, and goes on when the file is right again."""
    file = place.file_of(MAIN)
    right = file.read_bytes()
    dice = random.Random(mode)
    # Where the CPU counts, in front of that, and behind it.
    for first, last in (
        (counting_guest.FIRST, counting_guest.LAST),
        (1, counting_guest.FIRST),
        (counting_guest.LAST, EMPTY),
    ):
        bit = 8 * dice.randrange(first, last, PAGE) + dice.randrange(16, 8 * PAGE)
        flip(file, bit)
        with place.server("--clone") as srcd, place.machine() as qemu:
            qemu.set_capabilities(*MODES[mode])
            srcd.migrate(qemu.listen())
            assert srcd.wait_status("completed", "failed", PAUSED) == PAUSED
            said = srcd.query()["error-desc"]
            assert f"offset {bit // 8 // 65536 * 65536:#x}: " in said
            qemu.wait_status(PAUSED)
            assert unlike(qemu, right) == []
            flip(file, bit)
            recover(srcd, qemu)
            complete(srcd, qemu)
            assert_unharmed(place, qemu)
            qemu.execute("stop")
            assert unlike(qemu, right) == []


def test_directory_that_is_no_parked_vm(private_dir: Path) -> None:
    place = Place(private_dir, private_dir)
    with pytest.raises(RuntimeError, match=r"manifest\.json"), place.server():
        pass
