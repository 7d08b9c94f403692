"""Files that a real QEMU saved: imported byte by byte, in place where that goes."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import saved
from support.qemu import Qemu, QemuProcess
from support.ram import MIB, PAGE, Block

from common.errors import HostError
from common.store.directory import Parked
from common.store.importing import import_file

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.qemu

# A machine with one block has nothing else; more are devices of their own.
ONE = (Block("ram", 64 * MIB),)
THREE = (Block("ram", 32 * MIB), Block("a", 2 * MIB), Block("b", 1 * MIB))


def save_filled(
    path: Path, blocks: tuple[Block, ...], version: str, *, mapped: bool
) -> dict[str, bytes]:
    """What the blocks held, by the names that the stream has for them."""
    with Qemu(*blocks, version=version) as qemu:
        qemu.fill(7)
        saved.save(qemu, path, mapped=mapped)
        names = [block.name for block in qemu.blocks()]
        contents = [bytes(one.bytes) for one in qemu.ram]
    return dict(zip(names, contents, strict=True))


def check(parked: Parked, contents: dict[str, bytes]) -> None:
    rows = zip(parked.manifest.blocks, parked.blocks(), strict=True)
    found = {b.name: os.pread(fd, b.length, b.offset) for b, fd in rows}
    assert found == contents


WAYS = [
    ("10", ONE, False),
    ("10", ONE, True),
    ("10", THREE, False),
    ("10", THREE, True),
    ("7.2", ONE, False),
    ("7.2", THREE, False),
]


@pytest.mark.parametrize(("version", "blocks", "mapped"), WAYS)
async def test_every_byte(
    tmp_path: Path, version: str, blocks: tuple[Block, ...], mapped: bool
):
    contents = save_filled(tmp_path / "file", blocks, version, mapped=mapped)
    done = await import_file(tmp_path / "file", tmp_path / "vm")
    assert (done.mapped, done.in_place) == (mapped, mapped)
    with Parked.open(tmp_path / "vm") as parked:
        parked.verify()
        check(parked, contents)
        assert {"timer", "globalstate"} <= set(parked.manifest.devices)
        assert parked.manifest.run_state == "running"
        used = sum(file.stat().st_blocks for file in (tmp_path / "vm").glob("ram-*"))
        if mapped:
            assert used == 0
        else:
            # Pages that are zero take no room.
            assert used * 512 < sum(map(len, contents.values()))


class Furnished(QemuProcess):
    """A machine with ROMs and devices, and memory that is not plugged in."""

    machine = "q35"

    def _machine_arguments(self) -> list[str]:
        return [
            *("-M", "q35", "-accel", "tcg", "-S", "-m", "64M,slots=1,maxmem=2G"),
            *("-object", "memory-backend-ram,id=more,size=256M"),
            *("-device", "virtio-mem-pci,memdev=more,requested-size=64M"),
            *("-smp", "2", "-vga", "std", "-device", "e1000", "-device", "qemu-xhci"),
        ]


@pytest.mark.parametrize(
    ("version", "mapped"), [("10", False), ("10", True), ("7.2", False)]
)
async def test_a_machine_with_many_devices(tmp_path: Path, version: str, mapped: bool):
    with Furnished(version=version) as qemu:
        saved.save(qemu, tmp_path / "file", mapped=mapped)
    await import_file(tmp_path / "file", tmp_path / "vm")
    with Parked.open(tmp_path / "vm") as parked:
        parked.verify()
        assert parked.manifest.machine.startswith("pc-q35-")
        assert parked.manifest.run_state == "prelaunch"
        assert {"pc.ram", "pc.bios", "/rom@etc/acpi/tables"} < {
            block.name for block in parked.manifest.blocks
        }
        # Since 8.0 virtio-mem says in front of RAM what is plugged in.
        assert bool(parked.early) is (version == "10")
        assert any("virtio-mem" in name for name in parked.manifest.devices)
        assert parked.manifest.devices[-1] == "globalstate"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than that of `tmp_path`."""
    if tmp_path.stat().st_dev == Path("/dev/shm").stat().st_dev:
        pytest.skip("there is only one file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


async def test_a_mapped_file_on_another_file_system(tmp_path: Path, elsewhere: Path):
    contents = save_filled(tmp_path / "file", THREE, "10", mapped=True)
    done = await import_file(tmp_path / "file", elsewhere / "vm")
    assert (done.mapped, done.in_place) == (True, False)
    with Parked.open(elsewhere / "vm") as parked:
        check(parked, contents)


async def test_what_became_zero(tmp_path: Path):
    """Bytes under pages that QEMU takes for zero: holes for us, the same for it."""
    contents = save_filled(tmp_path / "file", ONE, "10", mapped=True)
    zero = [
        page
        for page in range(ONE[0].size // PAGE)
        if not any(contents["ram"][page * PAGE : (page + 1) * PAGE])
    ]
    start = 1 * MIB
    with (tmp_path / "file").open("r+b") as file:
        for page in zero[::7]:
            file.seek(start + page * PAGE)
            file.write(b"\xaa" * PAGE)
    done = await import_file(tmp_path / "file", tmp_path / "vm")
    assert (done.in_place, done.punched) == (True, len(zero[::7]))
    with Parked.open(tmp_path / "vm") as parked:
        parked.verify()
        check(parked, contents)
    with Qemu(*ONE, incoming=True) as qemu:
        qemu.set_capabilities("mapped-ram")
        qemu.execute("migrate-incoming", uri=f"file:{tmp_path / 'file'}")
        qemu.wait_status("completed")
        assert bytes(qemu.ram[0].bytes) == contents["ram"]


@pytest.mark.parametrize(
    ("version", "mapped"), [("10", False), ("10", True), ("7.2", False)]
)
async def test_cuts(tmp_path: Path, version: str, mapped: bool):
    """Wherever it is cut: refused, and the place said. But for the description."""
    small = (Block("ram", 1 * MIB),)
    contents = save_filled(tmp_path / "file", small, version, mapped=mapped)
    whole = (tmp_path / "file").read_bytes()
    complete = whole.rindex(b"\x00\x06", 0, whole.index(b'{"', len(whole) - 4000)) + 1
    dice = random.Random(1)
    lengths = {*range(0, 300, 7), *range(len(whole) - 300, len(whole))}
    lengths |= {dice.randrange(len(whole)) for _ in range(150)}
    for length in sorted(lengths - {complete}):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(HostError, match=r"cut off|is empty") as raised:
            await import_file(tmp_path / "cut", tmp_path / "vm")
        assert str(tmp_path / "cut") in str(raised.value)
        assert not (tmp_path / "vm").exists()
    (tmp_path / "cut").write_bytes(whole[:complete])
    await import_file(tmp_path / "cut", tmp_path / "vm")
    with Parked.open(tmp_path / "vm") as parked:
        check(parked, contents)


@pytest.mark.parametrize("mapped", [False, True])
async def test_a_thousand_flips_after_the_import(tmp_path: Path, mapped: bool):
    """From then on there are checksums: each flip of what counts is found."""
    small = (Block("ram", 1 * MIB),)
    contents = save_filled(tmp_path / "file", small, "10", mapped=mapped)
    await import_file(tmp_path / "file", tmp_path / "vm")
    with Parked.open(tmp_path / "vm") as parked:
        (block,) = parked.manifest.blocks
    files = sorted(file for file in (tmp_path / "vm").iterdir() if file.stat().st_size)
    dice = random.Random(2)
    outside = 0
    for number in range(1000):
        weights = None if number % 2 else [file.stat().st_size for file in files]
        (file,) = dice.choices(files, weights)
        at, bit = dice.randrange(file.stat().st_size), 1 << dice.randrange(8)
        flip(file, at, bit)
        counts = file.name != block.file or (
            block.offset <= at < block.offset + block.length
        )
        if counts:
            with pytest.raises(HostError, match=file.name):
                verify(tmp_path / "vm")
        else:
            # What the file has around its pages was read once, by the import.
            outside += 1
            verify(tmp_path / "vm")
            with Parked.open(tmp_path / "vm") as parked:
                check(parked, contents)
        flip(file, at, bit)
    assert bool(outside) is mapped
    assert outside < 500


def verify(path: Path) -> None:
    with Parked.open(path) as parked:
        parked.verify()


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bit]))


async def test_flips_before_the_import(tmp_path: Path):
    """QEMU's files have no checksums: damage is found where the format shows it.

    What is not found changes bytes of pages or of devices and nothing else: the
    blocks, and which devices there are, stay as they were.
    """
    small = (Block("ram", 1 * MIB),)
    save_filled(tmp_path / "file", small, "10", mapped=False)
    whole = (tmp_path / "file").read_bytes()
    dice = random.Random(3)
    found = 0
    for number in range(400):
        # The pages are nearly all of it, and the least telling.
        at = dice.randrange(len(whole))
        if number % 2:
            at = dice.choice((dice.randrange(300), len(whole) - dice.randrange(1200)))
        broken = bytearray(whole)
        broken[min(at, len(whole) - 1)] ^= 1 << dice.randrange(8)
        (tmp_path / "broken").write_bytes(broken)
        try:
            await import_file(tmp_path / "broken", tmp_path / "vm")
        except HostError:
            found += 1
            continue
        with Parked.open(tmp_path / "vm") as parked:
            parked.verify()
            assert sum(b.length for b in parked.manifest.blocks) == 1 * MIB
        shutil.rmtree(tmp_path / "vm")
    assert 50 < found < 350
