"""What the parts of one incoming migration share: the guest on its way in.

How far it has come is in its statuses and its record. What the parts do, reading
the stream, postcopy, parking, taking up, is in a file each.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from common import status as statuses
from common.errors import GuestError
from common.guest.base import GuestState
from common.guest.keeping import Keeping
from common.status import MigrationStatus as M
from dstd.devices import Devices
from dstd.fault import Memory, choose_way
from dstd.parking import Parking
from dstd.record import RECEIVED, Phase, Record, new_journal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.errors import HostError, MigrationError
    from common.guest.base import Guest
    from common.guest.journal import Journal
    from common.qmp.message import Json
    from common.settings import Settings
    from common.tuning import Tuning
    from dstd.peer import Peer

log = logging.getLogger(__name__)


class Arrival:
    """One per migration. `emit`, `run_state` and `paused` as for IncomingMigration."""

    def __init__(
        self,
        guest: Guest,
        settings: Settings,
        status: statuses.StatusMachine[M],
        emit: Callable[[str, Mapping[str, Json] | None], None],
        run_state: Callable[[str], None],
        paused: Callable[[], bool],
        *,
        copy: bool,
        tuning: Tuning,
        journal: Journal[Record] | None,
    ) -> None:
        self.guest = guest
        self.settings = settings
        self.status = status
        self.tuning = tuning
        self.error: MigrationError | None = None
        self.postcopy = statuses.postcopy()
        self.journal = journal or new_journal(guest, Keeping(guest))
        left = self.journal.keeping.find(RECEIVED) if journal else None
        self.memory = Memory(guest, choose_way(guest, copy=copy), left)
        self.devices = Devices(guest)
        self.parking = Parking.of(guest, self.devices, self.trouble)
        self.loaded = False
        """PONG 3 has left: the source may give the guest up."""
        self.running = trio.Event()
        """Postcopy: the guest is ours."""
        self.told = False
        """SHUT 0 has arrived for certain."""
        self._emit = emit
        self._run_state = run_state
        self._paused = paused

    def trouble(self, error: HostError) -> None:
        """It goes on and on, until the operator has done something about this."""
        self.error = error

    async def keep(
        self, peer: Peer, section_id: int, address: Mapping[str, Json] | None
    ) -> None:
        """From now on whoever comes after us learns how far this has come.

        `section_id` is RAM's; `address` is where we listen.
        """
        self.journal.record = Record(
            section_id=section_id,
            is_srcd=peer.is_srcd,
            migration=peer.migration,
            address=address,
            settings=self.settings.snapshot(),
        )
        await self.journal.keeping.keep(RECEIVED, self.memory.kept)
        await self.journal.begin()

    def note_migration(self, peer: Peer) -> None:
        """By its number we know its source again."""
        if peer.migration != self.journal.record.migration:
            self.journal.write(migration=peer.migration)

    # -- whether the guest runs

    @property
    def wanted_running(self) -> bool:
        """It ran at the source, and the operator wants nothing else."""
        return self.devices.running and not self._paused()

    async def start(self, *, run: bool = True) -> None:
        """The guest is ours: run it, or let it stand; what is parked is kept."""
        if self.parking:
            self.parking.keep()
            return
        if run:
            await self.guest.cont()
            self._run_state("running")
            self._emit("RESUME", None)
        else:
            self._run_state("paused")

    def show_run_state(self) -> None:
        """A daemon before us has started it, or not."""
        runs = self.guest.state is GuestState.RUNNING
        self._run_state("running" if runs else "paused")

    # -- the ends

    async def complete(self, peer: Peer) -> None:
        """All is here, and ours."""
        await self.confirm(peer)
        self.error = None
        if self.parking:
            self.parking.guest.let_go()
            self._run_state("postmigrate")
        self.status.set(M.COMPLETED)

    async def confirm(self, peer: Peer) -> None:
        """Let the source go, and note whether it knows."""
        self.told = await peer.done()
        if self.told:
            self.journal.write(phase=Phase.TOLD)

    async def fail(self, error: MigrationError, peer: Peer | None = None) -> None:
        """It ends, or pauses; `peer` is told, if there is one."""
        log.warning("migration failed: %s", error)
        self.error = error
        # The source may have given the guest up: keep all there is of it.
        keep = self.loaded and self.status.may(M.POSTCOPY_PAUSED)
        if keep and not isinstance(error, GuestError):
            self.status.set(M.POSTCOPY_PAUSED)
            return
        # A QEMU that reads SHUT 1 behind RUN would run its guest again.
        if peer and (peer.is_srcd or not self.loaded):
            await peer.tell(error)
        self.status.set(M.FAILED)
        await self.journal.end()
