"""OutgoingMigration: connect, precopy, switchover or postcopy, end; top to bottom.

What the steps are is in precopy.py, switchover.py and postcopy.py; whose the
guest is at each of them, in ownership.py.

A postcopy whose connection is lost pauses: bitmaps and RAM are kept, and as
often as the operator orders it a new connection is made and postcopy goes on.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import trio

from common import address as address_of
from common.errors import ChannelLost, cause_of
from common.status import MigrationStatus as M
from common.tuning import USUAL, Tuning, processors_awake
from srcd.departure import Departure, Owner
from srcd.ownership import Ownership
from srcd.postcopy import Postcopy
from srcd.precopy import Precopy
from srcd.record import Phase, Record, new_migration
from srcd.switchover import Switchover
from srcd.taking_up import take_up
from srcd.urgent import Urgent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from common.address import Address
    from common.errors import MigrationError
    from common.guest.base import Guest
    from common.guest.journal import Journal
    from common.qmp.message import Json
    from common.settings import Settings
    from common.status import StatusMachine

log = logging.getLogger(__name__)

# When a channel breaks, how long the peer's own words may take to be read.
LAST_WORDS_SECONDS: Final = 2.0


class OutgoingMigration:
    """One migration of `guest` to one destination.

    `emit` sends a QMP event; `run_state` is told when the guest stops and runs
    for the migration's reasons. `track` False: do as if writes could not be seen.
    `preempt_early` is for a destination that is QEMU 7.
    """

    def __init__(
        self,
        guest: Guest,
        settings: Settings,
        status: StatusMachine[M],
        emit: Callable[[str, Mapping[str, Json] | None], None],
        run_state: Callable[[str], None],
        *,
        track: bool = True,
        preempt_early: bool = False,
        tuning: Tuning = USUAL,
        journal: Journal[Record] | None = None,
    ) -> None:
        departure = self._departure = Departure(
            guest,
            settings,
            status,
            emit,
            run_state,
            track=track,
            tuning=tuning,
            journal=journal,
        )
        self.settings = settings
        self.status = status
        self.times = departure.times
        self.sent = departure.sent
        self.convergence = departure.convergence
        self.pump = departure.pump
        self.tracking = departure.tracking
        self.peer = departure.peer
        self.channels = departure.channels
        self.parked = departure.parked
        self._urgent = Urgent(departure, early=preempt_early)
        self._ownership = Ownership(departure, self._urgent)
        self.switchover = Switchover(departure, self._ownership)
        self.postcopy = Postcopy(departure, self._urgent, self.switchover)
        self.opened = trio.Event()
        """Connected, or over before that."""
        self.over = trio.Event()
        self._scope = trio.CancelScope()
        self._cancel_asked = False
        self._attempt_scope = trio.CancelScope()  # to connect for a recovery
        self._order_resume: trio.MemorySendChannel[Address]
        self._resumes: trio.MemoryReceiveChannel[Address]
        self._order_resume, self._resumes = trio.open_memory_channel(1)

    # -- what it is at

    @property
    def error(self) -> MigrationError | None:
        """What went wrong last."""
        return self._departure.error

    @error.setter
    def error(self, error: MigrationError | None) -> None:
        self._departure.error = error

    @property
    def address(self) -> Address | None:
        """Where it goes, or went last."""
        return self._departure.address

    @property
    def bytes_sent(self) -> int:
        """On all channels; stays known when they are closed."""
        return self.channels.sent

    # -- orders from outside

    def start_postcopy(self) -> None:
        """Switch to postcopy as soon as the stream is active; later it is too late."""
        self._departure.ask_for_postcopy()

    @property
    def cancellable(self) -> bool:
        """Until the destination may have got the guest."""
        return self._departure.cancellable

    def cancel(self) -> None:
        """End it; the guest goes on here. Only while `cancellable`."""
        self._cancel_asked = True
        self._scope.cancel()
        self.channels.shutdown()

    def proceed(self) -> None:
        """Let go what `pause-before-switchover` holds."""
        self.switchover.proceed()

    @property
    def pausable(self) -> bool:
        """Not while the guest is being handed over: COMMIT must not be lost."""
        return bool(self.times.handed_over) or self.status.now is M.POSTCOPY_RECOVER

    def pause(self) -> None:
        """Break the connection of a postcopy; only while `pausable`."""
        why = ChannelLost("Postcopy migration is paused by the user")
        self.channels.break_connection(why)

    def resume(self, address: Address) -> None:
        """Begin to recover a paused postcopy; the status tells how that goes."""
        self._departure.address = address
        self._attempt_scope = trio.CancelScope()
        self.status.set(M.POSTCOPY_RECOVER_SETUP)
        self._order_resume.send_nowait(address)

    def abandon(self) -> None:
        """End an attempt to recover: soon it is paused again."""
        why = ChannelLost("another order to resume has taken its place")
        self.channels.break_connection(why)
        self._attempt_scope.cancel()

    def settings_changed(self) -> None:
        """They hold at once, and over our death."""
        self._departure.apply_limits()
        self._departure.journal.write(settings=self.settings.snapshot())

    def take_up(self) -> None:
        """Go on with what a daemon before us has left, by `run`: the guest has
        moved.
        """
        take_up(self._departure, self._urgent)
        self.opened.set()

    # -- the whole

    async def run(self, address: Address | None = None) -> None:
        """Migrate; never raises a MigrationError, the status tells.

        Paused, it waits for the order to resume; after `take_up` that is all.
        """
        try:
            if address:
                self._departure.address = address
                self._departure.where = str(address)
                await self._attempt(self._migrate, address)
            while self.status.now in (M.POSTCOPY_PAUSED, M.POSTCOPY_RECOVER_SETUP):
                await self._attempt(self._recover, await self._resumes.receive())
        finally:
            self.tracking.stop()
            self.pump.close()
            self.over.set()

    async def _attempt(
        self, part: Callable[[Address], Awaitable[None]], address: Address
    ) -> None:
        """All that uses one connection; what it comes to is in the status."""
        try:
            await part(address)
        except BaseException as error:
            cause = cause_of(error)
            if cause is None:
                raise
            # Breaking the channels makes the loops on them fail.
            await (self._cancelled() if self._cancel_asked else self._failed(cause))
        finally:
            self.channels.close()
            self.opened.set()

    async def _migrate(self, address: Address) -> None:
        """The first connection, and in most cases the only one."""
        with self._scope:
            await self.channels.open_main(address)
            self.channels.answers = bool(self.channels.main.native.is_socket)
            self.opened.set()
            if self._urgent.early:
                await self._urgent.connect(address)
            self.pump.connect(self.channels.main, None)
            self._departure.apply_limits()
            await self._while_listening(self._phases, address)
        if self._scope.cancelled_caught:
            await self._cancelled()

    async def _recover(self, address: Address) -> None:
        """A new connection for a paused postcopy, to the end of the migration."""
        departure = self._departure
        self._attempt_scope.deadline = trio.current_time() + departure.tuning.patience
        with self._attempt_scope:
            await self.channels.open_main(address)
        if self._attempt_scope.cancelled_caught:
            raise ChannelLost(f"Failed to connect to '{address}': nobody answers")
        departure.journal.write(address=address_of.to_json(address))
        departure.error = None
        self.status.set(M.POSTCOPY_RECOVER)
        self.peer.reconnected()
        self.pump.connect(self.channels.main, None)
        with processors_awake(departure.tuning.awake):
            await self._while_listening(self.postcopy.resume, address)

    async def _while_listening(
        self, part: Callable[[Address], Awaitable[None]], address: Address
    ) -> None:
        """To the end of the migration, while the return path is read."""
        answers = self.channels.answers
        async with trio.open_nursery() as nursery:
            if answers:
                nursery.start_soon(self.peer.listen, self.pump)
            try:
                await part(address)
            except BaseException as error:
                # The peer may have said why before it closed; that tells more.
                if answers and isinstance(cause_of(error), ChannelLost):
                    with trio.move_on_after(LAST_WORDS_SECONDS):
                        await self.peer.silent.wait()
                raise
        await self._completed()

    async def _phases(self, address: Address) -> None:
        departure = self._departure
        departure.journal.record = Record(
            migration=new_migration(),
            address=address_of.to_json(address),
            settings=self.settings.snapshot(),
        )
        await departure.journal.begin()
        precopy = Precopy(departure, self._urgent)
        async with trio.open_nursery() as nursery:
            # Its RAM outlives the guest's process, but nothing else of it does.
            nursery.start_soon(departure.guest.wait_gone)
            await precopy.set_up(address)
            converged = await precopy.passes()
            nursery.cancel_scope.cancel()
        if converged:
            await self.switchover.end_precopy()
        else:
            await self.postcopy.begin(address, prepares=precopy.prepares)

    # -- the ends

    async def _completed(self) -> None:
        departure, parked = self._departure, self.parked
        departure.journal.write(phase=Phase.COMPLETED)
        if parked:
            await parked.completed()
            await departure.journal.end()
        await departure.peer.completed(self.channels.main)
        departure.run_state(parked.state_after if parked else "postmigrate")
        self._end(M.COMPLETED)

    async def _cancelled(self) -> None:
        await self._ownership.take_back()
        self._end(M.CANCELLED)

    async def _failed(self, error: MigrationError) -> None:
        """Whose the guest is decides what becomes of it."""
        error = self.parked.explained(error) if self.parked else error
        log.warning("migration failed: %s", error)
        departure = self._departure
        departure.error = self.channels.why_broken() or error
        if self._ownership.may_be_lost(error):
            await self._ownership.give_away()
        given_away = departure.owner is Owner.DESTINATION
        if given_away and departure.postcopy and self.status.now is M.DEVICE:
            self.status.set(M.POSTCOPY_ACTIVE)  # it may be, and can be resumed
        if self.status.may(M.POSTCOPY_PAUSED):
            self.channels.close()
            self.status.set(M.POSTCOPY_PAUSED)
            return
        if given_away:
            departure.error = ChannelLost(
                f"{error}; the destination was told to run the guest: see whether it"
                " does before you continue it here"
            )
            departure.run_state("paused")
        else:
            await self._ownership.take_back()
        # migrate_cancel may have come while the guest was taken back.
        self._end(M.CANCELLED if self._cancel_asked else M.FAILED)

    def _end(self, status: M) -> None:
        self.times.ended = time.monotonic()
        self.status.set(status)
