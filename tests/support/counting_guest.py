"""A guest of thirty bytes for QEMU that writes to its RAM all the time.

It is the machine's firmware: one loop in real mode that goes over the pages
from 64 KiB to 576 KiB and adds one to the first word of each. So the counters
of two neighbours differ by at most one step of the loop: a page that was lost,
or replaced by an older one, shows.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from support.ram import KIB, PAGE, Block

if TYPE_CHECKING:
    import mmap

FIRMWARE = Block("pc.bios", 64 * KIB)
FIRST = 64 * KIB
LAST = 576 * KIB  # not included

_LOOP = bytes.fromhex(
    "b80010"  # outer: mov ax, 0x1000
    "8ed8"  #   inner: mov ds, ax
    "ff060000"  #      inc word [0]
    "050001"  #        add ax, 0x100
    "3d0090"  #        cmp ax, 0x9000
    "72f2"  #          jb inner
    "ebed"  #          jmp outer
)
_RESET = bytes.fromhex("ea000000f0")  # jmp 0xf000:0


def firmware() -> bytes:
    """The image; the CPU starts sixteen bytes before its end."""
    image = bytearray(FIRMWARE.size)
    image[: len(_LOOP)] = _LOOP
    image[-16 : -16 + len(_RESET)] = _RESET
    return bytes(image)


@functools.cache
def firmware_path() -> Path:
    """The image in a file that lasts as long as the test session."""
    folder = tempfile.mkdtemp(prefix="counting-guest-")
    atexit.register(shutil.rmtree, folder)
    path = Path(folder) / "firmware"
    path.write_bytes(firmware())
    return path


def counters(ram: mmap.mmap | bytes) -> list[int]:
    """What the pages have counted, modulo 65536."""
    pages = range(FIRST, LAST, PAGE)
    return [int.from_bytes(ram[at : at + 2], "little") for at in pages]


def assert_consistent(ram: mmap.mmap) -> None:
    """Check the counters of a stopped guest: one step down at most."""
    counted = counters(ram)
    steps = [
        (FIRST + index * PAGE, (one - two) % 65536)
        for index, (one, two) in enumerate(itertools.pairwise(counted), start=1)
        if one != two
    ]
    assert [step for _, step in steps] in ([], [1]), f"pages out of step: {steps}"
