"""srcd --parked after one that was killed: the VM runs once, whatever moment it was.

A record says how far it had come, and a mark in the directory that the VM runs
elsewhere; between the two there is always a moment.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from support import stored
from support.daemons import Destination, Source
from support.relay import Relay

from common.address import Tcp, to_json
from common.errors import HostError
from common.guest.keeping import Keeping
from common.guest.stored import Mark, StoredGuest
from common.monitor import Monitor, guest_runs
from common.status import MigrationStatus as M
from common.store.directory import Parked, Parking
from srcd.commands import SourceCommands
from srcd.record import Phase, Record, new_journal

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096
MIB = 1 << 20
PENDING = "which still needs memory from here"
RECORD = Record(postcopy=True, is_dstd=True, address=to_json(Tcp("10.0.0.9", "44")))
QEMU = replace(RECORD, is_dstd=False)
GONE = replace(QEMU, phase=Phase.GONE)
MARK = Mark("10.0.0.9:44", True, True)


def make(path: Path) -> None:
    """A parked VM that a dstd takes, too."""
    with Parking.create(path) as parking:
        parking.set_configuration(stored.CONFIGURATION, advised=True)
        stored.fill(parking.add_block("ram", MIB, PAGE), MIB)
        trio.run(parking.commit, stored.STATE, None, "running", "")


def served(place: Path, *, clone: bool = False) -> StoredGuest:
    return StoredGuest(
        str(place / "vm"), clone=clone, lazy=True, beside=str(place / "srcd.qmp")
    )


async def left(place: Path, record: Record, mark: Mark | None, **more: Any) -> None:
    """By a srcd that was killed then."""
    if not (place / "vm").exists():
        await stored.park(place / "vm")
    guest = served(place, **more)
    journal = new_journal(guest, Keeping(guest))
    journal.record = record
    await journal.begin()
    journal.close()
    if mark:
        guest.mark_gone(mark)
    guest.close()


async def taken_up(guest: StoredGuest) -> str:
    """The status that the next one comes up with, or why it does not."""
    async with trio.open_nursery() as nursery:
        commands = SourceCommands(Monitor(guest, None, guest_runs(guest)), nursery)
        try:
            await commands.take_up()
        except HostError as error:
            return str(error)
        reply: Any = await commands.handlers["query-migrate"]({})
        nursery.cancel_scope.cancel()
    return str(reply.get("status", "none"))


@pytest.mark.parametrize("mark", [None, MARK], ids=["not marked", "marked"])
async def test_gone(tmp_path: Path, mark: Mark | None) -> None:
    await left(tmp_path, replace(RECORD, phase=Phase.GONE), mark)
    guest = served(tmp_path)
    assert await taken_up(guest) == M.POSTCOPY_PAUSED
    assert guest.parked.running
    assert guest.parked.running.endswith(f"at dstd 10.0.0.9:44, {PENDING}")
    guest.close()


@pytest.mark.parametrize("mark", [None, MARK], ids=["not marked", "marked"])
async def test_completed(tmp_path: Path, mark: Mark | None) -> None:
    """It needs nothing from here, and nobody else is to run it."""
    await left(tmp_path, replace(RECORD, phase=Phase.COMPLETED), mark)
    guest = served(tmp_path)
    assert "at dstd 10.0.0.9:44; serve a copy" in await taken_up(guest)
    guest.close()
    with pytest.raises(HostError, match="runs elsewhere"):
        served(tmp_path)
    assert not [n for n in os.listdir(tmp_path / "vm") if n.endswith(".kept")]


async def test_given_away_in_precopy(tmp_path: Path) -> None:
    await left(tmp_path, replace(RECORD, phase=Phase.GONE, postcopy=False), None)
    guest = served(tmp_path)
    assert "runs elsewhere" in await taken_up(guest)
    guest.close()


@pytest.mark.parametrize("record", [RECORD, QEMU], ids=["dstd", "QEMU"])
async def test_refused(tmp_path: Path, record: Record) -> None:
    """A QEMU that refuses makes the mark go, and then the record."""
    await left(tmp_path, replace(record, phase=Phase.PACKAGED), None)
    guest = served(tmp_path)
    assert await taken_up(guest) == "none"
    assert guest.parked.running is None
    guest.close()


async def test_qemu_may_run_it(tmp_path: Path) -> None:
    mark = replace(MARK, dstd=False)
    await left(tmp_path, replace(QEMU, phase=Phase.PACKAGED), mark)
    guest = served(tmp_path)
    assert await taken_up(guest) == M.POSTCOPY_PAUSED
    guest.close()


async def test_a_copy_that_is_complete_can_be_made_again(tmp_path: Path) -> None:
    await left(tmp_path, replace(QEMU, phase=Phase.COMPLETED), None, clone=True)
    guest = served(tmp_path, clone=True)
    assert await taken_up(guest) == "none"
    guest.close()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".kept")]


async def test_a_copy_goes_on(tmp_path: Path) -> None:
    await left(tmp_path, replace(QEMU, phase=Phase.GONE), None, clone=True)
    guest = served(tmp_path, clone=True)
    assert await taken_up(guest) == M.POSTCOPY_PAUSED
    assert guest.parked.running is None
    guest.close()


async def test_a_copy_that_was_quit_does_not(tmp_path: Path) -> None:
    """Its QEMU is gone: else nothing could be served at this socket any more."""
    await left(tmp_path, replace(QEMU, phase=Phase.GONE), None, clone=True)
    guest = served(tmp_path, clone=True)
    await guest.quit()
    guest.close()
    guest = served(tmp_path, clone=True)
    assert await taken_up(guest) == "none"
    guest.close()


def test_a_copy_whose_srcd_cannot_begin_goes_on(private_dir: Path) -> None:
    """Nobody has given it up: its QEMU waits for the next one."""
    trio.run(partial(left, clone=True), private_dir, GONE, None)
    (record,) = private_dir.glob("*.kept")
    content = record.read_bytes()
    words = ("--parked", str(private_dir / "vm"), "--clone")
    with (
        pytest.raises(RuntimeError, match=r"srcd: .*No such file"),
        Source(private_dir, *words, "--qmp", f"{private_dir}/no/such"),
    ):
        pass
    assert record.read_bytes() == content
    with Source(private_dir, *words) as src:
        assert src.query()["status"] == M.POSTCOPY_PAUSED
    assert not list(private_dir.glob("*.kept"))


def test_a_mark_that_could_not_be_made(private_dir: Path) -> None:
    """The VM runs at a dstd, and nothing says so: that is made good in the end."""
    make(private_dir / "vm")
    (private_dir / "vm" / "running.new").mkdir()
    with (
        Source(private_dir, "--parked", str(private_dir / "vm")) as src,
        Destination(private_dir, "--park", str(private_dir / "there")) as dst,
    ):
        for side in (src, dst):
            side.set_capabilities()
        src.set_parameters(max_postcopy_bandwidth=MIB // 4)
        src.migrate(dst.listen())
        seen = src.wait_status("postcopy-active", "failed", "completed")
        assert seen == "postcopy-active", (src.said, dst.said)
        assert "no mark that the VM runs" in src.said
        (private_dir / "vm" / "running.new").rmdir()
        src.set_parameters(max_postcopy_bandwidth=0)
        assert src.wait_status("completed", "failed") == "completed", src.said
        assert dst.wait_status("completed", "failed") == "completed"
    mark = (private_dir / "vm" / "running").read_text()
    assert "at dstd" in mark
    assert PENDING not in mark


def wait_given_away(record: Path) -> None:
    deadline = time.monotonic() + 30
    while not record.exists() or b'"gone"' not in record.read_bytes():
        assert time.monotonic() < deadline


def test_the_connection_is_lost_while_it_is_marked(private_dir: Path) -> None:
    """dstd waits for COMMIT then, and nobody but this srcd can say it."""
    make(private_dir / "vm")
    fifo = private_dir / "vm" / "running.new"
    os.mkfifo(fifo)  # to write to it takes until somebody reads
    with (
        Relay() as relay,
        Source(private_dir, "--parked", str(private_dir / "vm")) as src,
        Destination(private_dir, "--park", str(private_dir / "there")) as dst,
    ):
        for side in (src, dst):
            side.set_capabilities()
        src.migrate(relay.to(dst.listen()))
        wait_given_away(private_dir / "vm" / "serving.outgoing.kept")
        for link in relay.wait_links(1):
            link.reset()
        assert dst.wait_status("postcopy-paused", "failed") == "postcopy-paused"
        assert src.query()["status"] == "device"
        os.close(os.open(fifo, os.O_RDONLY))
        seen = src.wait_status("postcopy-paused", "failed")
        assert seen == "postcopy-paused", src.said
        fifo.unlink(missing_ok=True)
        dst.execute("migrate-recover", uri="tcp:127.0.0.1:0")
        (address,) = dst.query()["socket-address"]
        uri = f"tcp:{address['host']}:{address['port']}"
        src.execute("migrate", uri=uri, resume=True)
        assert src.wait_status("completed", "failed") == "completed", src.said
        assert dst.wait_status("completed", "failed") == "completed"
    with Parked.open(private_dir / "there") as there:
        there.verify()
    assert "at dstd" in (private_dir / "vm" / "running").read_text()
