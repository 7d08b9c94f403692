"""The guest that becomes a directory."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from common.errors import GuestError, HostError
from common.guest.keeping import Keeping
from common.guest.parking import ParkingGuest
from common.store import description, receiving
from common.store.directory import Parked
from common.stream import section
from common.stream.constants import MAX_BLOCKS, MAX_NAME
from dstd.record import Phase, new_journal

if TYPE_CHECKING:
    from pathlib import Path

CONFIGURATION = section.encode_configuration(section.Configuration(machine="pc"))
BLOCKS = (
    section.BlockEntry(idstr="../../ram", length=64 << 10),
    section.BlockEntry(idstr="huge", length=4 << 20, page_size=2 << 20),
)


async def filled(directory: Path) -> ParkingGuest:
    guest = ParkingGuest(str(directory))
    await guest.adopt(CONFIGURATION, BLOCKS, advised=True)
    os.pwrite(guest.blocks[0].fd, b"data", 4096)
    return guest


async def test_blocks_are_the_streams(tmp_path: Path) -> None:
    guest = await filled(tmp_path / "vm")
    assert [block.idstr for block in guest.blocks] == ["../../ram", "huge"]
    assert [block.length for block in guest.blocks] == [64 << 10, 4 << 20]
    # Nobody runs on it, so any page of the stream can be placed alone.
    assert {block.page_size for block in guest.blocks} == {4096}
    assert (guest.room() or 0) > 0
    await guest.set_early(b"early")
    await guest.commit(b"devices", None, "paused", "a test")
    guest.let_go()
    with Parked.open(tmp_path / "vm") as parked:
        parked.verify()
        assert parked.manifest.machine == "pc"
        assert parked.manifest.run_state == "paused"
        assert [b.page_size for b in parked.manifest.blocks] == [4096, 2 << 20]
        assert (parked.early, parked.device_state) == (b"early", b"devices")
        assert os.pread(parked.blocks()[0], 4, 4096) == b"data"
    names = {path.name for path in (tmp_path / "vm").iterdir()}
    assert {"ram-0000", "ram-0001"} <= names
    assert os.listdir(tmp_path) == ["vm"]


async def test_what_nobody_needs_goes(tmp_path: Path) -> None:
    guest = await filled(tmp_path / "vm")
    await guest.quit()
    assert os.listdir(tmp_path) == []


async def test_what_nobody_else_has_stays(tmp_path: Path) -> None:
    guest = await filled(tmp_path / "vm")
    guest.irreplaceable = True
    await guest.quit()
    with pytest.raises(HostError, match="is incomplete"):
        Parked.open(tmp_path / "vm")


async def test_kept_files_outlive_the_process(tmp_path: Path) -> None:
    """What a daemon that is restarted finds; another of the name replaces one."""
    guest = await filled(tmp_path / "vm")
    for name, length in (
        ("received", 4096),
        ("received", 8192),
        ("migration", 100),
        ("nothing", 0),
    ):
        made = guest.make_kept(name, length)
        assert os.pread(made, 8192, 0) == bytes(length)
        os.pwrite(made, b"new", 5)
        await guest.keep(name, made)
        os.close(made)
    await guest.forget("nothing")
    assert guest.kept == {}  # there was nobody before
    guest.irreplaceable = True
    guest.close()

    again = ParkingGuest(str(tmp_path / "vm"))
    assert set(again.kept) == {"received", "migration"}
    assert os.pread(again.kept["received"], 8, 0) == b"\0\0\0\0\0new"
    assert os.fstat(again.kept["received"]).st_size == 8192
    assert [block.idstr for block in again.blocks] == ["../../ram", "huge"]
    assert os.pread(again.blocks[0].fd, 4, 4096) == b"data"
    assert again.irreplaceable
    await again.commit(b"devices", None, "running", "a test")
    again.close()
    assert not [p for p in os.listdir(tmp_path / "vm") if "kept" in p]
    Parked.open(tmp_path / "vm").close()


async def test_it_does_not_run_here(tmp_path: Path) -> None:
    guest = await filled(tmp_path / "vm")
    await guest.stop()
    with pytest.raises(GuestError, match="srcd serve --parked"):
        await guest.cont()
    await guest.quit()


async def test_a_directory_has_one_user(tmp_path: Path) -> None:
    guest = await filled(tmp_path / "vm")
    with pytest.raises(HostError, match="in use by another process"):
        ParkingGuest(str(tmp_path / "vm"))
    guest.close()


async def test_what_nobody_can_need_is_in_nobodys_way(tmp_path: Path) -> None:
    """A process before this one ended when nothing was noted; a description stays."""
    guest = await filled(tmp_path / "vm")
    description.update(tmp_path / "vm", {"command-line": ["qemu"]})
    guest.close()
    again = ParkingGuest(str(tmp_path / "vm"))
    assert again.blocks == ()
    assert sorted(os.listdir(tmp_path / "vm")) == [description.NAME, receiving.NAME]
    await again.quit()
    assert description.load(tmp_path / "vm") == {"command-line": ["qemu"]}


async def test_what_somebody_else_put_there_stays(tmp_path: Path) -> None:
    guest = await filled(tmp_path / "vm")
    description.update(tmp_path / "vm", {"command-line": ["qemu"]})
    (tmp_path / "vm" / "letter").touch()
    await guest.quit()
    assert sorted(os.listdir(tmp_path / "vm")) == [description.NAME, "letter"]


async def test_kept_files_have_their_room(tmp_path: Path) -> None:
    """A full disk must not end who writes to them, or has them mapped."""
    guest = await filled(tmp_path / "vm")
    made = guest.make_kept("received", 1 << 20)
    assert os.fstat(made).st_blocks * 512 >= 1 << 20
    os.close(made)
    await guest.quit()


async def test_as_many_blocks_as_there_may_be(tmp_path: Path) -> None:
    """And with long names: what is noted of the guest must not grow with them."""
    guest = ParkingGuest(str(tmp_path / "vm"))
    await guest.adopt(CONFIGURATION, BLOCKS[:1], advised=True)
    block = guest.blocks[0]
    guest.blocks = [
        replace(block, idstr=f"{number:0{MAX_NAME}}") for number in range(MAX_BLOCKS)
    ]
    journal = new_journal(guest, Keeping(guest))
    await journal.begin()
    journal.write(phase=Phase.RUNNING)
    journal.close()
    await guest.quit()
