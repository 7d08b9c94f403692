"""Both ends of a migration in this process, without control sockets.

For tests that have to look inside or to act at an exact moment.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from common import address, status
from common.guest.base import GuestState
from common.guest.parked import ParkedGuest, RamFile
from common.native._native import ffi, lib
from common.settings import Settings
from common.status import MigrationStatus as M
from dstd.incoming import IncomingMigration
from srcd.outgoing import OutgoingMigration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096


class Pair:
    """A source with `size` bytes of RAM, every second page with data, and a target."""

    def __init__(self, folder: Path, size: int, *capabilities: str) -> None:
        self.size = size
        self.source_file, self.target_file = folder / "source", folder / "target"
        self.source = _guest(self.source_file, size, GuestState.RUNNING)
        self.target = _guest(self.target_file, size, GuestState.INCOMING)
        with self.source_file.open("r+b") as file:
            for offset in range(0, size, 2 * PAGE):
                file.seek(offset)
                file.write(offset.to_bytes(8, "little") + b"data")
        self.events: list[str] = []
        self.on_event: Callable[[str], None] = lambda name: None
        settings = Settings()
        wanted: list[Any] = [{"capability": n, "state": True} for n in capabilities]
        settings.set_capabilities(wanted)
        settings.set_parameters({"max-bandwidth": 0})
        self.outgoing = OutgoingMigration(
            self.source, settings, status.outgoing(), self._event, lambda _: None
        )
        self.incoming = IncomingMigration(
            self.target,
            settings,
            status.incoming(),
            lambda name, data: None,
            lambda _: None,
            lambda: False,
        )

    def _event(self, name: str, data: object) -> None:
        self.events.append(name)
        self.on_event(name)

    def write_late(self, offset: int, data: bytes) -> None:
        """What a guest writes that dirty tracking finds when it has stopped."""
        with self.source_file.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        block = self.outgoing.pump.ram.native.blocks[0]
        lib.bitmap_test_and_set(ffi.addressof(block, "dirty"), offset // PAGE)

    async def move(self) -> None:
        """To the end on both sides, and every byte equal."""
        await self.incoming.listen(address.Tcp("127.0.0.1", "0"))
        port = str(self.incoming.addresses()[0]["port"])
        self.outgoing.status.set(M.SETUP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.incoming.run)
            nursery.start_soon(self.outgoing.run, address.Tcp("127.0.0.1", port))
        assert self.outgoing.status.now is M.COMPLETED, self.outgoing.error
        assert self.incoming.status.now is M.COMPLETED, self.incoming.error

    def assert_equal(self) -> None:
        assert self.source_file.read_bytes() == self.target_file.read_bytes()

    def close(self) -> None:
        for side in (self.source, self.target):
            side.close()
        self.incoming.memory.close()


@contextmanager
def pair(size: int, *capabilities: str) -> Iterator[Pair]:
    """RAM in files of /dev/shm, which are removed at the end."""
    folder = Path(f"/dev/shm/pair-{threading.get_native_id()}-{size}")
    folder.mkdir()
    try:
        found = Pair(folder, size, *capabilities)
        yield found
        found.close()
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def _guest(path: Path, size: int, state: GuestState) -> ParkedGuest:
    file = RamFile(idstr="ram", path=str(path), size=size)
    return ParkedGuest("none", (file,), state)
