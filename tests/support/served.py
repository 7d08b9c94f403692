"""A parked VM served into another directory, both ends in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from common import address, status
from common.errors import HostError
from common.guest.parking import ParkingGuest
from common.guest.stored import StoredGuest
from common.settings import Settings
from common.status import MigrationStatus as M
from dstd.incoming import IncomingMigration
from srcd.outgoing import OutgoingMigration

if TYPE_CHECKING:
    from pathlib import Path

_OVER = (M.COMPLETED, M.FAILED, M.POSTCOPY_PAUSED)


@dataclass(frozen=True, slots=True)
class Served:
    """What came of it. `refused`: before anything was sent."""

    error: str | None
    pages: int = 0
    verified_regions: int = 0

    @property
    def refused(self) -> bool:
        return self.error is not None and not self.verified_regions


async def serve(parked: Path, into: Path, *, lazy: bool) -> Served:
    """The VM in `parked` to a destination that takes every page: `into`."""
    try:
        source = StoredGuest(
            str(parked), clone=True, lazy=lazy, beside=str(parked.parent / "clone")
        )
    except HostError as error:
        return Served(str(error))
    target = ParkingGuest(str(into))
    try:
        return await _serve(source, target, lazy=lazy)
    finally:
        target.close()
        source.close()


async def _serve(source: StoredGuest, target: ParkingGuest, *, lazy: bool) -> Served:
    settings = Settings()
    settings.set_capabilities([{"capability": "postcopy-ram", "state": lazy}])
    settings.set_parameters({"max-bandwidth": 0})
    incoming = IncomingMigration(
        target,
        settings,
        status.incoming(),
        lambda name, data: None,
        lambda _: None,
        lambda: False,
    )
    await incoming.listen(address.Tcp("127.0.0.1", "0"))
    outgoing = OutgoingMigration(
        source, settings, status.outgoing(), lambda name, data: None, lambda _: None
    )
    over = trio.Event()

    def look(old: M, new: M) -> None:
        if new in _OVER:
            over.set()

    outgoing.status.listeners.append(look)
    outgoing.status.set(M.SETUP)
    port = str(incoming.addresses()[0]["port"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(incoming.run)
        nursery.start_soon(outgoing.run, address.Tcp("127.0.0.1", port))
        await over.wait()
        if outgoing.status.now is not M.COMPLETED:
            nursery.cancel_scope.cancel()
    incoming.memory.close()
    if outgoing.status.now is M.COMPLETED:
        assert incoming.status.now is M.COMPLETED, incoming.error
    pump = outgoing.pump
    return Served(
        None if outgoing.status.now is M.COMPLETED else str(outgoing.error),
        int(pump.stats.normal_pages),
        pump.verified_regions,
    )
