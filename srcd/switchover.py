"""The switchover: the guest stops here, its state leaves, and it is given up.

With a destination that is dstd the proof that it has loaded the state is closed
on both sides (COMMIT, see docs/wire-format.md), so exactly one side ever runs
the guest. A QEMU destination runs it right after the proof, PONG 3, has left.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import trio

from common.guest.base import GuestState
from common.status import MigrationStatus as M
from common.stream import command
from common.stream import constants as c
from srcd import sections
from srcd.record import Phase

if TYPE_CHECKING:
    from srcd.departure import Departure
    from srcd.ownership import Ownership

log = logging.getLogger(__name__)


class Switchover:
    """From the guest running here to the guest being the destination's."""

    def __init__(self, departure: Departure, ownership: Ownership) -> None:
        self._departure = departure
        self._ownership = ownership
        self._continued = trio.Event()

    def proceed(self) -> None:
        """Let go what `pause-before-switchover` holds."""
        self._continued.set()

    # -- the guest stops

    async def stop_guest(self) -> None:
        """From here on nothing writes to its RAM; what it wrote last is dirty."""
        departure = self._departure
        departure.sent.precopy = departure.channels.sent
        departure.times.stopped = time.monotonic()
        departure.pump.cut_short(False)
        departure.apply_limits()
        departure.was_running = departure.guest.state is GuestState.RUNNING
        departure.journal.write(
            phase=Phase.STOPPED,
            was_running=departure.was_running,
            is_dstd=departure.peer.is_dstd,
        )
        # Before and after: no `cont` comes behind this, and one that is under
        # way has its word in between. That is why a paused guest is stopped too.
        departure.run_state("finish-migrate")
        await departure.guest.stop()
        departure.run_state("finish-migrate")
        if departure.was_running:
            departure.emit("STOP", None)
        await self._hold()
        departure.status.set(M.DEVICE)
        departure.times.mark("stop")
        departure.tracking.sync_last()
        departure.times.mark("sync")
        departure.next_pass()

    async def _hold(self) -> None:
        """The operator wants to do something while the guest stands still."""
        if self._departure.settings.on("pause-before-switchover"):
            self._departure.status.set(M.PRE_SWITCHOVER)
            await self._continued.wait()

    # -- its state leaves

    async def _save(self) -> sections.DeviceState:
        departure = self._departure
        run_state = "running" if departure.was_running else "paused"
        state = await sections.save_device_state(departure.guest, run_state)
        departure.times.mark("save")
        return state

    async def end_precopy(self) -> None:
        """The last pages, and the state behind them; to the destination's word."""
        departure = self._departure
        await self.stop_guest()
        await departure.pump.last_pass()
        departure.times.mark("pages")
        state = await self._save()
        await self._ownership.about_to_send(postcopy=False)
        await departure.channels.main.write(state.ending())
        departure.times.mark("send")
        if departure.channels.answers:
            await self._wait_for_its_word()
        else:
            await departure.channels.main.finish()
        self.handed_over()

    async def _wait_for_its_word(self) -> None:
        peer = self._departure.peer
        if peer.is_dstd:
            await peer.pong(c.PING_LOADED)
            await self._ownership.give_away()
            await self._commit()
        await peer.shut_down()
        await self._ownership.give_away()

    async def send_package(self) -> None:
        """Postcopy: the state goes before the pages."""
        departure = self._departure
        state = await self._save()
        await self._ownership.about_to_send(postcopy=True)
        departure.apply_limits()
        await departure.channels.main.write(state.package())
        departure.times.mark("send")

    # -- it is given up

    async def loaded(self) -> None:
        """From the destination's word on that it can run the guest, it is its."""
        departure = self._departure
        await departure.peer.pong(c.PING_LOADED)
        await self._ownership.give_away()
        departure.status.set(M.POSTCOPY_ACTIVE)
        if departure.peer.is_dstd:
            await self._commit()
        self.handed_over()

    async def _commit(self) -> None:
        """The guest is given up for good: dstd runs it only when it has read this."""
        commit = command.encode(command.Ping(c.PING_COMMIT))
        await self._departure.channels.main.write(commit)

    def handed_over(self) -> None:
        """The destination has the guest: the end of the downtime."""
        departure = self._departure
        departure.times.handed_over = time.monotonic()
        departure.times.mark("load")
        departure.sent.downtime = departure.channels.sent - departure.sent.precopy
        log.info("downtime parts in ms: %s", departure.times.downtime_parts_ms())
