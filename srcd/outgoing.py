"""OutgoingMigration: set-up, precopy, switchover, postcopy, end; top to bottom.

A postcopy whose connection is lost pauses: bitmaps and RAM are kept, and as
often as the operator orders it a new connection is made and postcopy goes on.

The guest belongs to the source until the destination has proven that it has
loaded the device state. Before that every failure leaves the guest running
here. After that none does: the status becomes postcopy-paused.

With a destination that is dstd the proof is closed on both sides (COMMIT, see
docs/wire-format.md), so exactly one side ever runs the guest. A QEMU
destination runs it right after the proof, PONG 3, has left.
"""

from __future__ import annotations

import logging
import time
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from common import address as address_of
from common.address import takes_many
from common.channel import Channel, connect
from common.errors import ChannelLost, GuestError, MigrationError, cause_of
from common.guest.base import GuestState
from common.guest.keeping import Keeping
from common.guest.stored import Mark
from common.status import MigrationStatus as M
from common.stream import command, section
from common.stream import constants as c
from common.tuning import USUAL, Tuning, processors_awake
from srcd import parked, preempt, sections
from srcd.account import Sent, Times
from srcd.convergence import Convergence
from srcd.peer import Peer
from srcd.pump import Pump, Tracking
from srcd.record import Phase, Record, new_journal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from common import status as statuses
    from common.address import Address
    from common.guest.base import Guest
    from common.guest.journal import Journal
    from common.native.loop import Stop
    from common.qmp.message import Json
    from common.settings import Settings

log = logging.getLogger(__name__)

# When a channel breaks, how long the peer's own words may take to be read.
LAST_WORDS_SECONDS: Final = 2.0
# How long postcopy waits for dstd to allocate memory; the guest runs meanwhile.
PREPARATION_SECONDS: Final = 0.3


class Owner(Enum):
    """Whose the guest is; it only ever moves forward."""

    SOURCE = "the source: any failure leaves it running here"
    PACKAGED = "the source still, but its state is on the way: QEMU may run it"
    DESTINATION = "the destination: it never runs here again"


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
        status: statuses.StatusMachine[M],
        emit: Callable[[str, Mapping[str, Json] | None], None],
        run_state: Callable[[str], None],
        *,
        track: bool = True,
        preempt_early: bool = False,
        tuning: Tuning = USUAL,
        journal: Journal[Record] | None = None,
    ) -> None:
        self.guest = guest
        self._journal = journal or new_journal(guest, Keeping(guest))
        self.settings = settings
        self.status = status
        self.error: MigrationError | None = None
        self.times = Times()
        self.sent = Sent()
        self.convergence = Convergence()
        self.pump = Pump(guest.blocks)
        self.tracking = Tracking(guest, self.pump.ram, allowed=track)
        self.peer = Peer()
        self.parked = parked.Serving.of(guest, self.pump)
        self._preempt_early = preempt_early
        self._tuning = tuning
        self._emit = emit
        self._run_state = run_state
        self._connected: Channel | None = None
        self._preempt: Channel | None = None
        self._sent_before = 0  # on channels that are closed
        self._return_path = False
        self._owner = Owner.SOURCE
        self._was_running = False  # when it was stopped for the switchover
        # A parked VM may run at once, and needs no precopy then.
        self._postcopy_asked = self.parked is not None and self.parked.lazy
        self._prepares = False  # dstd allocates memory ahead
        self._cancel_asked = False
        self._why_paused: ChannelLost | None = None
        self._attempt_scope = trio.CancelScope()  # to connect for a recovery
        self._order_resume: trio.MemorySendChannel[Address]
        self._resumes: trio.MemoryReceiveChannel[Address]
        self._order_resume, self._resumes = trio.open_memory_channel(1)
        self._continued = trio.Event()
        self.address: Address | None = None
        """Where it goes, or went last."""
        self.opened = trio.Event()
        """Connected, or over before that."""
        self._scope = trio.CancelScope()
        self.over = trio.Event()

    @property
    def _main(self) -> Channel:
        assert self._connected is not None
        return self._connected

    # -- orders from outside

    def start_postcopy(self) -> None:
        """Switch to postcopy as soon as the stream is active; later it is too late."""
        if not self.times.stopped:
            self._postcopy_asked = True
            self.pump.cut_short(self._wants_postcopy)

    @property
    def _wants_postcopy(self) -> bool:
        return self._postcopy_asked and self._advises

    @property
    def cancellable(self) -> bool:
        """Until the destination may have got the guest.

        dstd waits for COMMIT, and a file or a command runs nothing.
        """
        if self._owner is Owner.PACKAGED:
            return self.peer.is_dstd or not self._return_path
        return self._owner is Owner.SOURCE

    def cancel(self) -> None:
        """End it; the guest goes on here. Only while `cancellable`."""
        self._cancel_asked = True
        self._scope.cancel()
        for channel in (self._connected, self._preempt):
            if channel:
                channel.shutdown()

    def proceed(self) -> None:
        """Let go what `pause-before-switchover` holds."""
        self._continued.set()

    @property
    def pausable(self) -> bool:
        """Not while the guest is being handed over: COMMIT must not be lost."""
        return bool(self.times.handed_over) or self.status.now is M.POSTCOPY_RECOVER

    def pause(self) -> None:
        """Break the connection of a postcopy; only while `pausable`."""
        self._break(ChannelLost("Postcopy migration is paused by the user"))

    def _break(self, why: ChannelLost) -> None:
        """The loops on the channels see their end; what is told is `why`."""
        self._why_paused = why
        for channel in (self._connected, self._preempt):
            if channel:
                channel.break_connection()

    def resume(self, address: Address) -> None:
        """Begin to recover a paused postcopy; the status tells how that goes."""
        self.address = address
        self._attempt_scope = trio.CancelScope()
        self.status.set(M.POSTCOPY_RECOVER_SETUP)
        self._order_resume.send_nowait(address)

    def abandon(self) -> None:
        """End an attempt to recover: soon it is paused again."""
        self._break(ChannelLost("another order to resume has taken its place"))
        self._attempt_scope.cancel()

    def settings_changed(self) -> None:
        """They hold at once, and over our death."""
        self.apply_limits()
        self._journal.write(settings=self.settings.snapshot())

    def apply_limits(self) -> None:
        """Bandwidth parameters have changed, or the phase has."""
        precopy = self._owner is Owner.SOURCE
        if precopy and self.times.stopped:
            self.pump.limit(0)  # the guest waits for every byte
            return
        name = "max-bandwidth" if precopy else "max-postcopy-bandwidth"
        self.pump.limit(self.settings.number(name))

    # -- after a daemon before us

    def take_up(self) -> None:
        """Go on with what its record says, by `run`: the guest has moved."""
        record = self._journal.record
        self._owner = Owner.DESTINATION
        self._return_path = True
        self._was_running = record.was_running
        self.address = address_of.of_json_untrusted(record.address)
        self.peer.is_dstd = record.is_dstd
        self._preempt_early = record.preempt_early
        if self.parked:
            self.parked.preempt = record.preempt
            self._where = self.parked.where
        self.opened.set()
        # What there was before is not known any more.
        now = time.monotonic()
        self.times = Times(begun=now, active=now, stopped=now, handed_over=now)
        if record.phase is Phase.COMPLETED:
            self.times.ended = now
            self._run_state("postmigrate")
            self.status.set(M.COMPLETED)
        elif record.postcopy:
            self.pump.owe_dirty()
            self.apply_limits()
            self._run_state("finish-migrate")
            self.error = ChannelLost("the daemon ended in the middle of postcopy")
            self.status.set(M.POSTCOPY_PAUSED)
        else:
            self._run_state("paused")
            self.error = ChannelLost(
                "the daemon ended when the destination was told to run the guest: see"
                " whether it does before you continue it here"
            )
            self.status.set(M.FAILED)

    # -- the whole

    async def run(self, address: Address | None = None) -> None:
        """Migrate; never raises a MigrationError, the status tells.

        Paused, it waits for the order to resume; after `take_up` that is all.
        """
        try:
            if address:
                self.address, self._where = address, str(address)
                await self._attempt(self._migrate, address)
            while self.status.now in (M.POSTCOPY_PAUSED, M.POSTCOPY_RECOVER_SETUP):
                await self._attempt(self._recover, await self._resumes.receive())
        finally:
            self._release()
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
            self._disconnect()
            self.opened.set()

    async def _migrate(self, address: Address) -> None:
        with self._scope:
            self._connected = await self._connect(address, "main")
            self._return_path = bool(self._main.native.is_socket)
            self.opened.set()
            if self._preempt_early:
                # QEMU 7 reads nothing from main before it has both, and tells
                # them apart by their order.
                await self._connect_preempt(address)
            self.pump.connect(self._main, None)
            self.apply_limits()
            await self._while_listening(self._phases, address)
        if self._scope.cancelled_caught:
            await self._cancelled()

    async def _while_listening(
        self, part: Callable[[Address], Awaitable[None]], address: Address
    ) -> None:
        """To the end of the migration, while the return path is read."""
        async with trio.open_nursery() as nursery:
            if self._return_path:
                nursery.start_soon(self.peer.listen, self.pump)
            try:
                await part(address)
            except BaseException as error:
                # The peer may have said why before it closed; that tells more.
                if self._return_path and isinstance(cause_of(error), ChannelLost):
                    with trio.move_on_after(LAST_WORDS_SECONDS):
                        await self.peer.silent.wait()
                raise
        self._journal.write(phase=Phase.COMPLETED)
        if self.parked:
            await self.parked.completed()
            await self._journal.end()
        self._run_state(self.parked.state_after if self.parked else "postmigrate")
        self._end(M.COMPLETED)

    async def _phases(self, address: Address) -> None:
        self._journal.record = Record(
            address=address_of.to_json(address), settings=self.settings.snapshot()
        )
        await self._journal.begin()
        async with trio.open_nursery() as nursery:
            # Its RAM outlives the guest's process, but nothing else of it does.
            nursery.start_soon(self.guest.wait_gone)
            await self._set_up(address)
            converged = await self._precopy()
            nursery.cancel_scope.cancel()
        if converged:
            await self._complete_precopy()
        else:
            await self._postcopy(address)

    # -- set-up

    async def _set_up(self, address: Address) -> None:
        """Everything that the destination can refuse before the guest stops."""
        opening = sections.opening(
            self.guest,
            return_path=self._return_path,
            postcopy=self._advises,
            preempt=self.settings.on("postcopy-preempt"),
        )
        await self._main.write(opening)
        if self._finds_preempt(address):
            await preempt.answered_or(partial(self._try_early, address), self._answer)
        elif self._return_path:
            await self._answer()
        self.tracking.start()
        if self.peer.is_dstd and not self.pump.arrives:
            await self._tell_layout()
        self.times.active = time.monotonic()
        self._next_pass()
        self.status.set(M.ACTIVE)

    async def _answer(self) -> None:
        await self.peer.caught_up(self._main)

    async def _tell_layout(self) -> None:
        layout, self._prepares = await self.pump.layout()
        prepare = command.encode(command.Ping(c.PING_PREPARED))
        await self._main.write(layout + (prepare if self._prepares else b""))

    @property
    def _advises(self) -> bool:
        return self._return_path and self.settings.on("postcopy-ram")

    # -- precopy

    async def _precopy(self) -> bool:
        """Passes over the dirty bitmap. True: the rest is small; False: postcopy."""
        while not self._wants_postcopy:
            found, before = self.pump.dirty_bytes(), self.bytes_sent
            begun = time.monotonic()
            if not await self.pump.precopy_pass():
                continue
            written = self.tracking.sync()
            self.convergence.measure(
                found=found,
                sent=self.bytes_sent - before,
                left=self.pump.dirty_bytes(),
                written_pages=written,
                seconds=time.monotonic() - begun,
                assumed_bandwidth=self.settings.number("avail-switchover-bandwidth"),
            )
            if self.convergence.fits(self.settings.number("downtime-limit")):
                return True
            self._next_pass()
        return False

    def _next_pass(self) -> None:
        self.convergence.passes += 1
        self._emit("MIGRATION_PASS", {"pass": self.convergence.passes})

    # -- switchover

    async def _stop_guest(self) -> None:
        """From here on nothing writes to its RAM; what it wrote last is dirty."""
        self.sent.precopy = self.bytes_sent
        self.times.stopped = time.monotonic()
        self.pump.cut_short(False)
        self.apply_limits()
        self._was_running = self.guest.state is GuestState.RUNNING
        self._journal.write(
            phase=Phase.STOPPED,
            was_running=self._was_running,
            is_dstd=self.peer.is_dstd,
        )
        # Before and after: no `cont` comes behind this, and one that is under
        # way has its word in between. That is why a paused guest is stopped too.
        self._run_state("finish-migrate")
        await self.guest.stop()
        self._run_state("finish-migrate")
        if self._was_running:
            self._emit("STOP", None)
        await self._hold()
        self.status.set(M.DEVICE)
        self.times.mark("stop")
        self.tracking.sync_last()
        self.times.mark("sync")
        self._next_pass()

    async def _hold(self) -> None:
        """The operator wants to do something while the guest stands still."""
        if self.settings.on("pause-before-switchover"):
            self.status.set(M.PRE_SWITCHOVER)
            await self._continued.wait()

    async def _save(self) -> sections.DeviceState:
        run_state = "running" if self._was_running else "paused"
        state = await sections.save_device_state(self.guest, run_state)
        self.times.mark("save")
        return state

    async def _complete_precopy(self) -> None:
        await self._stop_guest()
        await self.pump.last_pass()
        self.times.mark("pages")
        state = await self._save()
        await self._before_it_runs()
        self._packaged(postcopy=False)
        await self._main.write(state.ending())
        self.times.mark("send")
        if not self._return_path:
            await self._main.finish()
        else:
            if self.peer.is_dstd:
                await self.peer.pong(c.PING_LOADED)
                await self._give_away()
                await self._commit()
            await self.peer.shut_down()
            await self._give_away()
        self._handed_over()

    def _packaged(self, *, postcopy: bool) -> None:
        """From here on a QEMU may run the guest."""
        self._owner = Owner.PACKAGED
        self._journal.write(
            phase=Phase.PACKAGED,
            postcopy=postcopy,
            preempt=self._preempt is not None,
            preempt_early=self._preempt_early,
        )

    @property
    def _mark(self) -> Mark:
        return Mark(self._where, self.peer.is_dstd, pending=self._wants_postcopy)

    async def _before_it_runs(self) -> None:
        """QEMU runs it at once; dstd asks before, by waiting for COMMIT."""
        if self.parked and not self.peer.is_dstd:
            await self.parked.mark_before(self._mark)

    async def _give_away(self) -> None:
        """The guest is the destination's, and this daemon's death changes nothing.

        A parked one is marked so.
        """
        self._owner = Owner.DESTINATION
        self._journal.write(phase=Phase.GONE)
        if self.parked:
            await self.parked.mark_running(self._mark)

    async def _commit(self) -> None:
        """The guest is given up for good: dstd runs it only when it has read this."""
        await self._main.write(command.encode(command.Ping(c.PING_COMMIT)))

    def _handed_over(self) -> None:
        """The destination has the guest: the end of the downtime."""
        self.times.handed_over = time.monotonic()
        self.times.mark("load")
        self.sent.downtime = self.bytes_sent - self.sent.precopy
        log.info("downtime parts in ms: %s", self.times.downtime_parts_ms())

    # -- postcopy

    async def _postcopy(self, address: Address) -> None:
        if self._finds_preempt(address):
            await self._find_preempt(address)
        elif not self._preempt_early:
            # Not before a PONG: else the destination may take it for main.
            await self._connect_preempt(address)
        if self._prepares:
            with trio.move_on_after(PREPARATION_SECONDS):
                await self.peer.pong(c.PING_PREPARED)
        # The guest must not stand still behind what fills the buffers now.
        await self.peer.caught_up(self._main)
        self._check_preempt()
        with processors_awake(self._tuning.awake):
            await self._stop_guest()
            await self._send_package()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.pump.postcopy)
                await self._loaded()
            await self._end_postcopy()

    async def _loaded(self) -> None:
        """From the destination's word on that it can run the guest, it is its."""
        await self.peer.pong(c.PING_LOADED)
        await self._give_away()
        self.status.set(M.POSTCOPY_ACTIVE)
        if self.peer.is_dstd:
            await self._commit()
        self._handed_over()

    async def _connect(
        self, address: Address, name: str, stop: Stop | None = None
    ) -> Channel:
        return await connect(
            address,
            name,
            stop,
            congestion=self._tuning.congestion,
            peer_timeout=self._tuning.peer_timeout,
        )

    async def _connect_preempt(self, address: Address) -> None:
        if self.parked.preempt if self.parked else self._preempt_is_on:
            self._preempt = await self._connect(address, "preempt", self._main.stop)

    @property
    def _preempt_is_on(self) -> bool:
        return self.settings.on("postcopy-preempt")

    # -- a parked VM: whether there is a preempt channel is found out

    def _finds_preempt(self, address: Address) -> bool:
        unknown = self.parked is not None and self.parked.preempt is None
        return unknown and self._advises and takes_many(address)

    async def _try_early(self, address: Address) -> None:
        """Nothing is heard: it may be QEMU 7, which waits for both."""
        self._preempt = await self._connect(address, "preempt", self._main.stop)
        self._preempt_early = True

    async def _find_preempt(self, address: Address) -> None:
        assert self.parked is not None
        if self.peer.is_dstd:
            self.parked.preempt = self._preempt_is_on
            await self._connect_preempt(address)
            return
        if self._preempt is None:
            self._preempt = await self._connect(address, "preempt", self._main.stop)
        self.parked.preempt = await preempt.stays_open(self._preempt, self._answer)
        if not self.parked.preempt:
            self._preempt.close()
            self._preempt, self._preempt_early = None, False
        log.info("preempt channel: %s", "yes" if self.parked.preempt else "no")

    def _check_preempt(self) -> None:
        """A destination that has the capability off has closed it by now."""
        if self._preempt and self._preempt.hung_up():
            raise ChannelLost(
                "the destination has closed the preempt channel; switch"
                " postcopy-preempt on on both sides or on neither",
                channel="preempt",
            )

    async def _send_package(self) -> None:
        self.pump.connect(self._main, self._preempt)
        self.pump.owe_dirty()
        self._choose_zeroes()
        await self.pump.discards()
        self.times.mark("discard")
        state = await self._save()
        await self._before_it_runs()
        self._packaged(postcopy=True)
        self.apply_limits()
        await self._main.write(state.package())
        self.times.mark("send")

    def _choose_zeroes(self) -> None:
        """dstd counts pages, and QEMU 7 waits for the last ones it asked for."""
        counts = self.peer.is_dstd or (self._preempt and self._preempt_early)
        self.pump.leave_out_zeroes(not counts)

    async def _end_postcopy(self) -> None:
        self.pump.will_end()
        await self._main.write(sections.ram_end(self.guest) + section.EOF)
        if self._preempt and self._preempt_early:
            await self._preempt.write(sections.EOS)  # QEMU 7 waits for it
        await self.peer.shut_down()

    # -- recovery

    async def _recover(self, address: Address) -> None:
        """A new connection for a paused postcopy, to the end of the migration."""
        self._attempt_scope.deadline = trio.current_time() + self._tuning.patience
        with self._attempt_scope:
            self._connected = await self._connect(address, "main")
        if self._attempt_scope.cancelled_caught:
            raise ChannelLost(f"Failed to connect to '{address}': nobody answers")
        self._journal.write(address=address_of.to_json(address))
        self.error = None
        self.status.set(M.POSTCOPY_RECOVER)
        self.peer.reconnected()
        self.pump.connect(self._main, None)
        with processors_awake(self._tuning.awake):
            await self._while_listening(self._go_on, address)

    async def _go_on(self, address: Address) -> None:
        with trio.move_on_after(self._tuning.patience) as patience:
            await self._agree(address)
        if patience.cancelled_caught:
            why = ChannelLost("the destination does not answer", channel="main")
            self._break(why)
            raise why
        self._choose_zeroes()
        self.status.set(M.POSTCOPY_ACTIVE)
        if not self.times.handed_over:  # COMMIT was lost, and RESUME is as good
            self._handed_over()
        await self.pump.postcopy()
        await self._end_postcopy()

    async def _agree(self, address: Address) -> None:
        """What the destination has not received is owed, and it is ready for it."""
        tell = partial(self.peer.tell_received, self._main, self.pump.blocks)
        if self._finds_preempt(address):
            await preempt.answered_or(partial(self._try_early, address), tell)
            await self._find_preempt(address)
        else:
            if self._preempt_early:
                await self._connect_preempt(address)
            await tell()
            if not self._preempt_early:
                await self._connect_preempt(address)
        self.pump.connect(self._main, self._preempt)
        await self.peer.resume(self._main)

    # -- the ends

    async def _failed(self, error: MigrationError) -> None:
        error = self.parked.explained(error) if self.parked else error
        log.warning("migration failed: %s", error)
        self.error, self._why_paused = self._why_paused or error, None
        if self._may_run_there(error):
            await self._give_away()
            if self._wants_postcopy:
                self.status.set(M.POSTCOPY_ACTIVE)  # it may be, and can be resumed
        if self.status.may(M.POSTCOPY_PAUSED):
            self._disconnect()
            self.status.set(M.POSTCOPY_PAUSED)
            return
        if self._owner is Owner.DESTINATION:
            self.error = ChannelLost(
                f"{error}; the destination was told to run the guest: see whether it"
                " does before you continue it here"
            )
            self._run_state("paused")
        else:
            await self._take_guest_back()
            await self._journal.end()
        # migrate_cancel may have come while the guest was taken back.
        self._end(M.CANCELLED if self._cancel_asked else M.FAILED)

    def _may_run_there(self, error: MigrationError) -> bool:
        """A QEMU has a parked VM, and its answer, if there was one, is lost."""
        in_doubt = self._owner is Owner.PACKAGED and not self.cancellable
        return in_doubt and self.parked is not None and parked.may_run(error)

    async def _cancelled(self) -> None:
        await self._take_guest_back()
        await self._journal.end()
        self._end(M.CANCELLED)

    def _end(self, status: M) -> None:
        self.times.ended = time.monotonic()
        self.status.set(status)

    async def _take_guest_back(self) -> None:
        """The guest goes on here as it was before the migration."""
        if not self.times.stopped:
            return
        if self.parked:
            await self.parked.unmark()
        if not self._was_running:
            self._run_state("paused")
            return
        try:
            await self.guest.cont()
        except GuestError as error:
            log.error("the guest cannot go on here: %s", error)
            self._run_state("internal-error")
            return
        self._run_state("running")
        self._emit("RESUME", None)

    def _disconnect(self) -> None:
        """All loops on the channels have ended."""
        for channel in (self._preempt, self._connected):
            if channel:
                self._sent_before += channel.sent
                channel.close()
        self._preempt = self._connected = None

    def _release(self) -> None:
        self.tracking.stop()
        self.pump.close()

    # -- figures

    @property
    def bytes_sent(self) -> int:
        """On all channels; stays known when they are closed."""
        open_now = (ch for ch in (self._connected, self._preempt) if ch)
        return self._sent_before + sum(channel.sent for channel in open_now)
