"""Precopy at the source: set-up, then passes over the dirty bitmap."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from common.status import MigrationStatus as M
from common.stream import command
from common.stream import constants as c
from srcd import sections

if TYPE_CHECKING:
    from common.address import Address
    from srcd.departure import Departure
    from srcd.urgent import Urgent


class Precopy:
    """As long as the guest runs here. `prepares`: dstd allocates memory ahead."""

    def __init__(self, departure: Departure, urgent: Urgent) -> None:
        self.prepares = False
        self._departure = departure
        self._urgent = urgent

    # -- set-up

    async def set_up(self, address: Address) -> None:
        """Everything that the destination can refuse before the guest stops."""
        departure = self._departure
        await departure.channels.main.write(self._opening())
        await self._answer(address)
        await departure.tell_migration()
        departure.tracking.start()
        if departure.peer.is_dstd and not departure.pump.arrives:
            await self._tell_layout()
        departure.times.active = time.monotonic()
        departure.next_pass()
        departure.status.set(M.ACTIVE)

    def _opening(self) -> bytes:
        departure = self._departure
        return sections.opening(
            departure.guest,
            return_path=departure.channels.answers,
            postcopy=departure.advises,
            preempt=departure.settings.on("postcopy-preempt"),
        )

    async def _answer(self, address: Address) -> None:
        """It has taken the opening, where it can say so."""
        channels = self._departure.channels
        answer = partial(self._departure.peer.caught_up, channels.main)
        if self._urgent.is_unknown(address):
            await self._urgent.while_answering(address, answer)
        elif channels.answers:
            await answer()

    async def _tell_layout(self) -> None:
        layout, self.prepares = await self._departure.pump.layout()
        prepare = command.encode(command.Ping(c.PING_PREPARED))
        await self._departure.channels.main.write(
            layout + (prepare if self.prepares else b"")
        )

    # -- passes

    async def passes(self) -> bool:
        """Until what is left is small: True; False: postcopy is wanted."""
        departure = self._departure
        while not departure.wants_postcopy:
            if not await self._one_pass():
                continue
            if departure.convergence.fits(departure.settings.number("downtime-limit")):
                return True
            departure.next_pass()
        return False

    async def _one_pass(self) -> bool:
        """Send what is dirty, and measure that; False if it was cut short."""
        departure = self._departure
        found, before = departure.pump.dirty_bytes(), departure.channels.sent
        begun = time.monotonic()
        if not await departure.pump.precopy_pass():
            return False
        written = departure.tracking.sync()
        departure.convergence.measure(
            found=found,
            sent=departure.channels.sent - before,
            left=departure.pump.dirty_bytes(),
            written_pages=written,
            seconds=time.monotonic() - begun,
            assumed_bandwidth=departure.settings.number("avail-switchover-bandwidth"),
        )
        return True
