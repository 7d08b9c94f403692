"""IncomingMigration: listen, receive, end; pause, and receive the rest.

One task goes through it from top to bottom; the stream itself is read in
reception.py, and postcopy.py has what begins with the package.

Before RUN a failure ends the migration: the source is told why (if it is srcd)
and goes on with its guest. After RUN it pauses, and nothing is thrown away: the
next connection is that of a source that resumes.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from common.errors import ChannelLost, HostError, cause_of
from common.status import MigrationStatus as M
from common.status import PostcopyState as P
from common.stream import constants as c
from common.stream import returnpath
from common.tuning import USUAL, Tuning
from dstd.admission import Admission
from dstd.arrival import Arrival
from dstd.connection import Connection
from dstd.listening import Listening
from dstd.postcopy import Postcopy
from dstd.reception import Reception
from dstd.record import Phase
from dstd.taking_up import take_up

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from common.address import Address
    from common.errors import MigrationError
    from common.guest.base import Guest
    from common.guest.journal import Journal
    from common.qmp.message import Json
    from common.settings import Settings
    from common.status import StatusMachine
    from dstd.parking import Parking
    from dstd.peer import Peer
    from dstd.record import Record

# When no connection could be accepted, until it is tried again.
LISTEN_AGAIN_SECONDS: Final = 1.0


class IncomingMigration:
    """One migration into `guest`, from listening to the guest running here.

    `emit` sends a QMP event; `run_state` is told "running" or "paused" when the
    guest has arrived. `paused` is asked then: the operator may want it stopped.
    """

    def __init__(
        self,
        guest: Guest,
        settings: Settings,
        status: StatusMachine[M],
        emit: Callable[[str, Mapping[str, Json] | None], None],
        run_state: Callable[[str], None],
        paused: Callable[[], bool],
        *,
        copy: bool = False,
        overcommit: bool = False,
        tuning: Tuning = USUAL,
        journal: Journal[Record] | None = None,
    ) -> None:
        self.settings = settings
        self.status = status
        self.arrival = Arrival(
            guest,
            settings,
            status,
            emit,
            run_state,
            paused,
            copy=copy,
            tuning=tuning,
            journal=journal,
        )
        self.memory = self.arrival.memory
        self.admission = Admission(guest, settings, self.memory, overcommit=overcommit)
        self._listening = Listening(settings, peer_timeout=tuning.peer_timeout)
        self._link: Connection | None = None  # the one that is, or was last

    # -- what it is at

    @property
    def error(self) -> MigrationError | None:
        """What went wrong last, or still does."""
        return self.arrival.error

    @property
    def over(self) -> bool:
        """Nobody need come any more, not even a source that does not know it."""
        now = self.status.now
        return now is M.FAILED or (now is M.COMPLETED and self.arrival.told)

    def addresses(self) -> list[dict[str, Json]]:
        return self._listening.addresses()

    # -- orders from outside

    async def listen(self, target: Address) -> None:
        """Bind; HostError if that is not possible. Afterwards status is setup."""
        await self._listening.begin(target)
        self.status.set(M.SETUP)

    @property
    def pausable(self) -> bool:
        """Before the guest runs here a broken connection ends the migration."""
        return self.arrival.running.is_set() or self.status.now is M.POSTCOPY_RECOVER

    def pause(self) -> None:
        """Break the connection of a postcopy; only while `pausable`."""
        if self._link:
            self._link.break_connection()

    async def recover(self, target: Address) -> None:
        """Listen at `target` for the source of a paused postcopy; HostError.

        Where it listened before it listens on if that fails.
        """
        if self._listening.is_at(target):
            return
        listener = await self._listening.open(target)
        if self.status.now is not M.POSTCOPY_PAUSED:
            listener.close()
            raise HostError("the source has come back meanwhile")
        self._listening.move_to(listener)
        self.arrival.journal.write(address=self._listening.lasting)

    def note_settings(self) -> None:
        """They have changed, and are to hold over our death."""
        self.arrival.journal.write(settings=self.settings.snapshot())

    @property
    def way_on(self) -> str:
        """What there is to do if the daemon ends now, in postcopy."""
        return self.arrival.journal.keeping.way_on

    async def take_up(self) -> None:
        """Go on with what a daemon before us has left, by `run`.

        HostError or GuestError; else the status tells what there is to do.
        """
        await take_up(self.arrival)
        kept = self.arrival.journal.record.address
        if error := await self._listening.begin_again(kept):
            self.arrival.error = error

    # -- the whole

    async def run(self) -> None:
        """Take one migration; never raises a MigrationError, the status tells."""
        try:
            # What answers faults outlives the connection.
            async with trio.open_nursery() as standing:
                await self._until_it_is_here(Postcopy(self.arrival, standing))
                standing.cancel_scope.cancel()
            if self.arrival.postcopy.now is P.END:
                await self._tell_again()
        except BaseException as error:
            cause = cause_of(error)
            if cause is None:
                raise
            await self.arrival.fail(cause)
        finally:
            self._listening.close()

    async def _until_it_is_here(self, postcopy: Postcopy) -> None:
        """Or failed: one connection after the other."""
        if self.status.now is M.SETUP:
            main = await self._listening.listener.accept("main")
            self.status.set(M.ACTIVE)
            link = Connection(self.arrival, main)
            await self._take(link, partial(self._receive, postcopy))
        elif self.status.now is M.POSTCOPY_PAUSED:
            postcopy.take_up()
        while self.status.now is M.POSTCOPY_PAUSED:
            await self._come_back(postcopy)

    async def _take(
        self,
        link: Connection,
        part: Callable[[Connection, trio.Nursery], Awaitable[None]],
    ) -> None:
        """All that uses one connection, until all has arrived or it fails."""
        self._link = link
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.arrival.guest.wait_gone)
                nursery.start_soon(link.accept_more, self._listening.listener)
                await part(link, nursery)
                nursery.cancel_scope.cancel()
        except BaseException as error:
            cause = cause_of(error)
            if cause is None:
                raise
            async with link.strangers_are_heard():
                await self.arrival.fail(cause, link.peer)
        finally:
            # A request that is being written must not keep us waiting.
            link.main.stop.set()
            self.memory.connect(None)
            link.close()

    async def _receive(
        self, postcopy: Postcopy, link: Connection, nursery: trio.Nursery
    ) -> None:
        """The first connection, and in most cases the only one."""
        reception = self._reception(link)
        await reception.head()
        await self.arrival.keep(
            link.peer, link.loader.section_id, self._listening.lasting
        )
        await reception.sections(postcopy, nursery)
        if self.arrival.postcopy.now in (P.LISTENING, P.RUNNING):
            await postcopy.end(link)
        else:
            await self._end_precopy(link)

    def _reception(self, link: Connection) -> Reception:
        return Reception(self.arrival, self.admission, link)

    # -- precopy ends

    async def _end_precopy(self, link: Connection) -> None:
        """All is here: load the device state, take the guest over, run it."""
        arrival, peer = self.arrival, link.peer
        await arrival.devices.load()
        if not arrival.parking:
            arrival.journal.write(phase=Phase.ARRIVED)
        else:
            await self._park(arrival.parking, link)
        if peer.is_srcd:
            await peer.say(returnpath.Pong(c.PING_LOADED))
            await peer.wait_for_commit()
        else:
            # Before the guest runs here: if this fails it goes on there.
            await _let_go(peer, arrival.parking)
        await arrival.start(run=arrival.wanted_running)
        await arrival.complete(peer)

    async def _park(self, parking: Parking, link: Connection) -> None:
        """Before the source lets it go, or, where it does not wait, for certain."""
        if link.peer.return_path:
            await parking.commit(link.main.peer())
            self.arrival.journal.write(phase=Phase.ARRIVED)
        else:
            # It is not the source's for certain any more: nothing may go away.
            self.arrival.journal.write(phase=Phase.ARRIVED)
            await parking.commit_surely(link.main.peer())

    # -- paused

    async def _come_back(self, postcopy: Postcopy) -> None:
        """Wait for the source, and take what it has left."""
        arrival = self.arrival
        try:
            main = await self._listening.next_source(arrival.guest.wait_gone)
        except BaseException as error:
            cause = cause_of(error)
            if not isinstance(cause, HostError):
                raise
            arrival.error = cause
            await trio.sleep(LISTEN_AGAIN_SECONDS)
            arrival.error = await self._listening.mend() or cause
            return
        if main:
            arrival.error = None
            self.status.set(M.POSTCOPY_RECOVER)
            link = Connection(arrival, main, arrival.journal.record)
            await self._take(link, partial(self._recover, postcopy))

    async def _recover(
        self, postcopy: Postcopy, link: Connection, nursery: trio.Nursery
    ) -> None:
        """From the first word of a source that resumes to the end."""
        self.memory.begin_epoch()
        with trio.move_on_after(self.arrival.tuning.patience) as patience:
            await link.peer.wait_for_resume(self.memory)
        if patience.cancelled_caught:
            raise ChannelLost("the source does not resume", channel="main")
        await postcopy.resume(link, nursery)
        await self._reception(link).sections(postcopy, nursery)
        await postcopy.end(link)

    # -- all is here, but the source may not know

    async def _tell_again(self) -> None:
        """Tell it if it comes back."""
        listener, arrival = self._listening.listener, self.arrival
        while not arrival.told:
            main = await listener.accept("main")
            link = Connection(arrival, main, arrival.journal.record)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(link.accept_more, listener)
                    with trio.move_on_after(arrival.tuning.patience):
                        await self._confirm(link)
                    nursery.cancel_scope.cancel()
            except BaseException as error:
                if cause_of(error) is None:
                    raise
            finally:
                link.main.stop.set()
                link.close()

    async def _confirm(self, link: Connection) -> None:
        """A recovery in which nothing is owed any more, up to SHUT 0."""
        await link.peer.wait_for_resume(self.memory)
        await link.peer.say(returnpath.ResumeAck())
        if await self._reception(link).nothing_more():
            await self.arrival.confirm(link.peer)


async def _let_go(peer: Peer, parking: Parking | None) -> None:
    """The source gives the guest up when it has read this, before we know."""
    if parking:
        parking.keep()
    try:
        await peer.let_go()
    except ChannelLost:
        if parking:
            parking.keep(yes=False)
        raise
