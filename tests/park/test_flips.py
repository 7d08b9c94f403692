"""One bit of a parked VM is changed, and it is served: no wrong page arrives.

Each time to a destination that takes every page, and whose files are compared
with those that are right.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import stored
from support.served import Served, serve

from common.store import manifest
from common.store.directory import Parked, Parking

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of each way to serve: a thousand in all; `SEEDS=50` for a quick look.
SEEDS = int(os.environ.get("SEEDS") or 500)
PAGE = stored.PAGE
# In precopy 2 MiB are gathered before any of them is sent.
BLOCKS = (("pc.ram", 5 << 20), ("pc.bios", 3 * PAGE))
# Each has a checksum of its own, and is left unused if that is wrong.
UNUSED = ("description.json", "working-set")


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: nothing here is about disks."""
    with tempfile.TemporaryDirectory(prefix="flips-", dir="/dev/shm") as path:
        yield Path(path)


class Original:
    """A parked VM and all of its files as they should be."""

    def __init__(self, path: Path) -> None:
        with Parked.open(path) as parked:
            parked.save_working_set([3, 2, 1])
            self.blocks = parked.manifest.blocks
        self.path = path
        self.files = {file.name: file.read_bytes() for file in sorted(path.iterdir())}

    def flip(self, dice: random.Random, *, everywhere: bool) -> tuple[str, int]:
        """A bit of any file, or of any byte: most of these are RAM."""
        names = [name for name, content in self.files.items() if content]
        weights = None if everywhere else [len(self.files[name]) for name in names]
        (name,) = dice.choices(names, weights)
        changed = bytearray(self.files[name])
        at = dice.randrange(len(changed))
        changed[at] ^= 1 << dice.randrange(8)
        (self.path / name).write_bytes(changed)
        return name, at

    def restore(self, name: str) -> None:
        (self.path / name).write_bytes(self.files[name])

    def wrong_pages(self, into: Path) -> list[tuple[str, int]]:
        """Of what arrived: pages that are neither right nor still empty."""
        wrong = []
        for number, block in enumerate(self.blocks):
            right = self.files[block.file]
            file = into / manifest.block_file(number)
            found = file.read_bytes() if file.exists() else b""
            for at in range(0, len(found), PAGE):
                page = found[at : at + PAGE]
                if page != right[at : at + PAGE] and page.count(0) < PAGE:
                    wrong.append((block.name, at))
        return wrong

    def assert_equal(self, into: Path) -> None:
        with Parked.open(into) as parked:
            parked.verify()
            assert parked.device_state == self.files[manifest.DEVICE_STATE]
        for number, block in enumerate(self.blocks):
            found = (into / manifest.block_file(number)).read_bytes()
            assert found == self.files[block.file], block.name

    def assert_named(self, served: Served, name: str, at: int) -> None:
        assert served.error is not None, name
        assert name in served.error
        if name.startswith("ram-"):
            region = at // manifest.REGION * manifest.REGION
            assert f"offset {region:#x}:" in served.error
        else:
            assert served.refused


async def park(path: Path) -> Original:
    with Parking.create(path) as parking:
        parking.set_configuration(stored.CONFIGURATION, advised=False)
        for name, length in BLOCKS:
            stored.fill(parking.add_block(name, length, PAGE), length)
        parking.set_description(stored.DESCRIPTION)
        await parking.commit(stored.STATE, stored.TEXT, "running", stored.ORIGIN)
    return Original(path)


@pytest.mark.parametrize("way", ["lazy", "precopy"])
async def test_flips(folder: Path, way: str) -> None:
    original = await park(folder / "vm")
    into = folder / "into"
    lazy = way == "lazy"
    assert (await serve(original.path, into, lazy=lazy)).error is None
    original.assert_equal(into)
    shutil.rmtree(into)
    counted: Counter[str] = Counter()
    for number in range(SEEDS):
        name, at = original.flip(
            random.Random(f"{way} {number}"), everywhere=number % 3 == 0
        )
        served = await serve(original.path, into, lazy=lazy)
        if name in UNUSED:
            assert served.error is None, (number, served)
            original.assert_equal(into)
            counted["unused"] += 1
        else:
            original.assert_named(served, name, at)
            assert original.wrong_pages(into) == [], (number, name, at)
            counted["refused" if served.refused else "stopped"] += 1
            counted["pages"] += served.pages
        original.restore(name)
        shutil.rmtree(into, ignore_errors=True)
    print(f"{way}: {dict(counted)}")
    assert counted["stopped"] > 0 < counted["refused"], counted
    assert counted["pages"] > 0
