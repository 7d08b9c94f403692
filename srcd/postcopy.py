"""Postcopy at the source: package, what is owed, END; and again after a pause."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from common.errors import ChannelLost
from common.status import MigrationStatus as M
from common.stream import constants as c
from common.stream import section
from common.tuning import processors_awake
from srcd import sections

if TYPE_CHECKING:
    from common.address import Address
    from srcd.departure import Departure
    from srcd.switchover import Switchover
    from srcd.urgent import Urgent

# How long postcopy waits for dstd to allocate memory; the guest runs meanwhile.
PREPARATION_SECONDS: Final = 0.3


class Postcopy:
    """Of one migration; `begin` on the first connection, `resume` on another."""

    def __init__(
        self, departure: Departure, urgent: Urgent, switchover: Switchover
    ) -> None:
        self._departure = departure
        self._urgent = urgent
        self._switchover = switchover

    async def begin(self, address: Address, *, prepares: bool) -> None:
        """From precopy to the end; `prepares`: dstd allocates memory, or has."""
        await self._make_preempt(address)
        await self._wait_until_ready(prepares=prepares)
        with processors_awake(self._departure.tuning.awake):
            await self._switchover.stop_guest()
            await self._discard()
            await self._switchover.send_package()
            # Only what it asks for is on its way meanwhile: it loads sooner, and if
            # it fails nothing unread makes a reset of the end of its connection.
            await self._switchover.loaded()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._decide_preempt)
                await self._departure.pump.postcopy()
            await self._end()

    async def resume(self, address: Address) -> None:
        """A new connection is there: from what the destination lacks to the end."""
        departure = self._departure
        with trio.move_on_after(departure.tuning.patience) as patience:
            await self._agree(address)
        if patience.cancelled_caught:
            why = ChannelLost("the destination does not answer", channel="main")
            departure.channels.break_connection(why)
            raise why
        self._choose_zeroes()
        departure.status.set(M.POSTCOPY_ACTIVE)
        if not departure.times.handed_over:  # COMMIT was lost, and RESUME is as good
            self._switchover.handed_over()
        await departure.pump.postcopy()
        await self._end()

    # -- it begins

    async def _make_preempt(self, address: Address) -> None:
        if self._urgent.is_unknown(address):
            await self._urgent.find(address)
        elif not self._urgent.early:
            # Not before a PONG: else the destination may take it for main.
            await self._urgent.connect(address)

    async def _decide_preempt(self) -> None:
        """Until now what the guest asked for went on main."""
        await self._urgent.decide()
        if self._urgent.channel:
            self._departure.pump.use_preempt(self._urgent.channel)

    async def _wait_until_ready(self, *, prepares: bool) -> None:
        """What would make the guest stand still longer; it runs meanwhile."""
        peer = self._departure.peer
        if prepares:
            with trio.move_on_after(PREPARATION_SECONDS):
                await peer.pong(c.PING_PREPARED)
        # The guest must not stand still behind what fills the buffers now.
        await peer.caught_up(self._departure.channels.main)
        self._urgent.check()

    async def _discard(self) -> None:
        """What is dirty is owed, and no page of it counts as received."""
        pump, channels = self._departure.pump, self._departure.channels
        pump.connect(channels.main, self._urgent.channel)
        pump.owe_dirty()
        self._choose_zeroes()
        await pump.discards()
        self._departure.times.mark("discard")

    def _choose_zeroes(self) -> None:
        """dstd counts pages, and QEMU 7 waits for the last ones it asked for."""
        early = self._urgent.channel is not None and self._urgent.early
        counts = self._departure.peer.is_dstd or early
        self._departure.pump.leave_out_zeroes(not counts)

    # -- it goes on

    async def _agree(self, address: Address) -> None:
        """What the destination has not received is owed, and it is ready for it."""
        urgent, channels = self._urgent, self._departure.channels
        peer, pump = self._departure.peer, self._departure.pump
        await self._departure.tell_migration()
        tell = partial(peer.tell_received, channels.main, pump.blocks)
        if urgent.is_unknown(address):
            await urgent.while_answering(address, tell)
            await urgent.find(address)
            await urgent.decide()
        else:
            if urgent.early:
                await urgent.connect(address)
            await tell()
            if not urgent.early:
                await urgent.connect(address)
        pump.connect(channels.main, urgent.channel)
        await peer.resume(channels.main)

    # -- the end

    async def _end(self) -> None:
        """Nothing is owed any more: say so, and wait for its last word."""
        departure = self._departure
        channels = departure.channels
        departure.pump.will_end()
        await channels.main.write(sections.ram_end(departure.guest) + section.EOF)
        if self._urgent.channel and self._urgent.early:
            await self._urgent.channel.write(sections.EOS)  # QEMU 7 waits for it
        await departure.peer.shut_down()
