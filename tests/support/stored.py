"""Parked VMs for tests: small, with data, holes and every file there can be."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Final

from common.store.directory import Parking
from common.stream import constants as c
from common.stream import section, vmdesc

if TYPE_CHECKING:
    from pathlib import Path

PAGE: Final = 4096
LENGTH: Final = 16 * 65536 + 3 * PAGE
BLOCKS: Final = (("pc.ram", LENGTH), ('a/rom@"x"', 5 * PAGE), ("empty", PAGE))
CONFIGURATION: Final = section.encode_configuration(
    section.Configuration(machine="pc-i440fx-10.0")
)
STATE: Final = section.encode_section(
    section.Full(section_id=5, name="thing", instance=0, version=1),
    section.encode_device_state(b"opaque" * 50),
)
TEXT: Final = vmdesc.describe([vmdesc.device_state("thing", 1, 300)])
ORIGIN: Final = "a test"
DESCRIPTION: Final = {"command-line": ["qemu-system-x86_64", "-M", "pc"]}


def fill(fd: int, length: int, seed: int = 1) -> None:
    """Data in every third page, the rest holes."""
    dice = random.Random(seed)
    for at in range(0, length, 3 * PAGE):
        os.pwrite(fd, dice.randbytes(PAGE), at)


def begin(path: Path) -> Parking:
    """Everything but `commit`."""
    parking = Parking.create(path)
    parking.set_configuration(CONFIGURATION, advised=True)
    for name, length in BLOCKS:
        fd = parking.add_block(name, length, c.TARGET_PAGE_SIZE)
        if name != "empty":
            fill(fd, length)
    parking.set_early(b"early")
    parking.set_description(DESCRIPTION)
    return parking


async def park(path: Path) -> Path:
    """A complete one."""
    with begin(path) as parking:
        await parking.commit(STATE, TEXT, "running", ORIGIN)
    return path
