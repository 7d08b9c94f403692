"""What has changed on the disk does not get into a guest: it is named instead.

Every bit of a directory is under a checksum; tests/unit/store flips them by the
thousand. Here they are flipped under a srcd that serves to a QEMU without a CPU,
whose memory the test maps.
"""

from __future__ import annotations

import os
import random
import re
from typing import TYPE_CHECKING

import pytest
from support.damage import flip
from support.parking import (
    CRAWL,
    FAST,
    OUT,
    Workshop,
    both_complete,
    recover,
    wait_for_pages,
    wait_status,
)
from support.qemu import Qemu
from support.ram import MIB, PAGE, Block

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.userfaultfd]

BLOCK = Block("ram", 4 * MIB)
FLIPS = {"full": 24, "lazy": 8, "preempt": 8}


@pytest.fixture
def shop(private_dir: Path) -> Iterator[Workshop]:
    """With 4 MiB in its directory, a part of them zero."""
    with Workshop(private_dir) as shop:
        with Qemu(BLOCK) as qemu, shop.parker() as dstd:
            qemu.fill(seed=1)
            qemu.ram[0].bytes[: BLOCK.size // 4] = bytes(BLOCK.size // 4)
            qemu.set_capabilities("return-path")
            qemu.migrate(dstd.listen())
            qemu.wait_status("completed")
        yield shop


def wrong_pages(found: memoryview | bytes, right: bytes) -> list[int]:
    """Pages that are neither as they should be nor still empty."""
    pages = range(0, len(right), PAGE)
    nothing = bytes(PAGE)
    return [
        at
        for at in pages
        if bytes(found[at : at + PAGE]) not in (right[at : at + PAGE], nothing)
    ]


@pytest.mark.parametrize("out", FLIPS)
def test_flipped_page_is_not_sent(shop: Workshop, out: str) -> None:
    options, capabilities = OUT[out]
    file = shop.parked / "ram-0000"
    right = file.read_bytes()
    seeded = random.Random(out)
    for _ in range(FLIPS[out]):
        bit = seeded.randrange(len(right) * 8)
        flip(file, bit)
        with (
            Qemu(BLOCK, incoming=True) as qemu,
            shop.server("--clone", *options) as srcd,
        ):
            qemu.set_capabilities(*capabilities)
            srcd.migrate(qemu.listen())
            # A QEMU that may run the guest already waits for what is missing.
            stopped = "failed" if out == "full" else "postcopy-paused"
            assert srcd.wait_status("completed", "failed", stopped) == stopped
            said = srcd.query()["error-desc"]
            assert not wrong_pages(qemu.ram[0].bytes, right)
        flip(file, bit)
        offset = re.search(r"ram\b.*offset (0x[0-9a-f]+)", said)
        assert offset, said
        assert int(offset[1], 16) == bit // 8 // 65536 * 65536, said


@pytest.mark.parametrize("out", ["lazy", "preempt"])
def test_guest_goes_on_when_the_file_is_right_again(shop: Workshop, out: str) -> None:
    options, capabilities = OUT[out]
    file = shop.parked / "ram-0000"
    right = file.read_bytes()
    flip(file, len(right) * 6)
    with Qemu(BLOCK, incoming=True) as qemu, shop.server(*options) as srcd:
        qemu.set_capabilities(*capabilities)
        srcd.migrate(qemu.listen())
        wait_status((srcd, qemu), "postcopy-paused")
        flip(file, len(right) * 6)
        recover(srcd, qemu)
        both_complete(srcd, qemu)
        assert bytes(qemu.ram[0].bytes) == right


@pytest.mark.parametrize("out", OUT)
def test_file_is_cut_off_meanwhile(shop: Workshop, out: str) -> None:
    """srcd lives on, says where, and goes on once the file is whole again."""
    options, capabilities = OUT[out]
    file = shop.parked / "ram-0000"
    right = file.read_bytes()
    with shop.server(*options) as srcd:
        with Qemu(BLOCK, incoming=True) as qemu:
            qemu.set_capabilities(*capabilities)
            srcd.set_parameters(max_bandwidth=CRAWL, max_postcopy_bandwidth=CRAWL)
            srcd.migrate(qemu.listen())
            srcd.wait_status("active" if out == "full" else "postcopy-active")
            wait_for_pages(srcd)
            end = len(right) // 2 + 77
            os.truncate(file, end)
            srcd.set_parameters(max_bandwidth=FAST, max_postcopy_bandwidth=FAST)
            stopped = "failed" if out == "full" else "postcopy-paused"
            assert srcd.wait_status("completed", "failed", stopped) == stopped
            place = f"{file}: RAM block ram, offset {end // 65536 * 65536:#x}: "
            assert f"{place}stored RAM is cut off" in srcd.query()["error-desc"]
            # Not through a mapping: it would fill the pages that QEMU waits for.
            assert not wrong_pages(os.pread(qemu.ram[0].fd, len(right), 0), right)
            with file.open("r+b") as opened:
                opened.write(right)
            if out != "full":
                qemu.wait_status("postcopy-paused")
                recover(srcd, qemu)
                both_complete(srcd, qemu)
                assert bytes(qemu.ram[0].bytes) == right
        if out == "full":
            with Qemu(BLOCK, incoming=True) as qemu:
                srcd.migrate(qemu.listen())
                both_complete(srcd, qemu)
                assert bytes(qemu.ram[0].bytes) == right
