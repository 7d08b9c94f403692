"""IncomingMigration: listen, header, sections, package, run, end.

The stream is read top to bottom by one task. RAM goes through C loops; what is
read here is a dozen records per migration. When the package is there, a second
task loads the device state out of it while the first goes on with the pages,
because loading may touch pages that are still to come.

Before RUN a failure ends the migration: the source is told why (if it is srcd)
and goes on with its guest. After RUN it pauses, and nothing is thrown away: the
next connection is that of a source that resumes.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

import trio

from common import address
from common import status as statuses
from common.channel import Listener
from common.errors import (
    ChannelLost,
    GuestError,
    HostError,
    MigrationError,
    StreamError,
    cause_of,
)
from common.guest.base import GuestState
from common.guest.keeping import Keeping
from common.guest.parking import ParkingGuest
from common.status import MigrationStatus as M
from common.status import PostcopyState as P
from common.stream import command, fields, returnpath, section, vmdesc
from common.stream import constants as c
from common.stream.package import Package, split_package_untrusted
from common.tuning import USUAL, Tuning, processors_awake
from dstd.admission import Admission
from dstd.devices import Devices
from dstd.ending import receive_early_untrusted, receive_ending_untrusted
from dstd.fault import Loader, Memory, choose_way
from dstd.peer import Peer
from dstd.record import (
    PACKAGE,
    POSTCOPY,
    RECEIVED,
    Phase,
    Record,
    kept_package,
    new_journal,
)
from dstd.recovery import notice_loss, open_again

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from common.address import Address
    from common.channel import Channel
    from common.guest.base import Guest
    from common.guest.journal import Journal
    from common.qmp.message import Json
    from common.settings import Settings

log = logging.getLogger(__name__)

# A source with preempt connects it before it sends the package.
PREEMPT_SECONDS: Final = 10.0
# Connections besides main and preempt that are held, of a source that is refused.
STRANGERS_MAX: Final = 16
# After the source's EOF, how long the last pages may take without any arriving.
LAST_PAGES_SECONDS: Final = 30.0
# When faults could not be answered, until it is tried again.
FAULTS_AGAIN_SECONDS: Final = 1.0
# When no connection could be accepted, likewise.
LISTEN_AGAIN_SECONDS: Final = 1.0
# When what has come could not be parked, likewise.
PARK_AGAIN_SECONDS: Final = 5.0


class Connection:
    """The channels of one source, and what reads from them.

    `known` is what is known of the source, if this is a recovery.
    """

    def __init__(
        self, main: Channel, memory: Memory, known: Record | None = None
    ) -> None:
        self.main = main
        self.loader = Loader(memory, main, preempt=False)
        self.peer = Peer(main)
        if known:
            self.peer.comes_back(is_srcd=known.is_srcd)
            self.loader.begin(known.section_id)
        self.preempt: Channel | None = None
        self.preempt_came = trio.Event()
        self.strangers: list[Channel] = []
        self.stack = ExitStack()
        """What ends with the connection."""

    def break_connection(self) -> None:
        """Loops on the channels see their end."""
        for channel in (self.main, self.preempt):
            if channel:
                channel.break_connection()

    def close(self) -> None:
        """No loop runs on them any more."""
        self.stack.close()
        self.loader.close()
        for channel in (*self.strangers, self.preempt, self.main):
            if channel:
                channel.close()


class IncomingMigration:
    """One migration into `guest`, from listening to the guest running here.

    `emit` sends a QMP event; `run_state` is told "running" or "paused" when the
    guest has arrived. `paused` is asked then: the operator may want it stopped.
    """

    def __init__(
        self,
        guest: Guest,
        settings: Settings,
        status: statuses.StatusMachine[M],
        emit: Callable[[str, Mapping[str, Json] | None], None],
        run_state: Callable[[str], None],
        paused: Callable[[], bool],
        *,
        copy: bool = False,
        overcommit: bool = False,
        tuning: Tuning = USUAL,
        journal: Journal[Record] | None = None,
    ) -> None:
        self.guest = guest
        self.settings = settings
        self.status = status
        self.error: MigrationError | None = None
        self.postcopy = statuses.postcopy()
        self._journal = journal or new_journal(guest, Keeping(guest))
        left = self._journal.keeping.find(RECEIVED) if journal else None
        self.memory = Memory(guest, choose_way(guest, copy=copy), left)
        self.admission = Admission(guest, settings, self.memory, overcommit=overcommit)
        self._devices = Devices(guest)
        self._parking = guest if isinstance(guest, ParkingGuest) else None
        self._tuning = tuning
        self._emit = emit
        self._run_state = run_state
        self._paused = paused
        self._listener: Listener | None = None
        self._standing: trio.Nursery
        self._loaded = False  # PONG 3 has left: the source may give the guest up
        self._running = trio.Event()
        self._asked = trio.Event()  # for a page, of a VM that is being parked
        self._told = False  # SHUT 0 has arrived for certain
        self._link: Connection | None = None  # the one that is, or was last
        self._waiting = trio.CancelScope()  # for a source that resumes
        self._preparation = trio.CancelScope()
        self._prepared = trio.Event()
        self._prepared.set()

    # -- listening

    async def listen(self, target: Address) -> None:
        """Bind; HostError if that is not possible. Afterwards status is setup."""
        self._listener = await self._open(target)
        self.status.set(M.SETUP)

    async def _open(self, target: Address) -> Listener:
        listener = Listener(target, peer_timeout=self._tuning.peer_timeout)
        await listener.open()
        return listener

    @property
    def over(self) -> bool:
        """Nobody need come any more, not even a source that does not know it."""
        now = self.status.now
        return now is M.FAILED or (now is M.COMPLETED and self._told)

    def addresses(self) -> list[dict[str, Json]]:
        return self._listener.describe() if self._listener else []

    # -- orders from outside

    @property
    def pausable(self) -> bool:
        """Before the guest runs here a broken connection ends the migration."""
        return self._running.is_set() or self.status.now is M.POSTCOPY_RECOVER

    def pause(self) -> None:
        """Break the connection of a postcopy; only while `pausable`."""
        if self._link:
            self._link.break_connection()

    async def recover(self, target: Address) -> None:
        """Listen at `target` for the source of a paused postcopy; HostError.

        Where it listened before it listens on if that fails.
        """
        assert self._listener is not None
        if self._listener.is_at(target) and not self._listener.lost:
            return
        listener = await self._open(target)
        if self.status.now is not M.POSTCOPY_PAUSED:
            listener.close()
            raise HostError("the source has come back meanwhile")
        # First: who waits on a listener that is closed gets an error.
        self._waiting.cancel()
        self._listener.close()
        self._listener = listener
        self._journal.write(address=self._lasting_address)

    @property
    def _lasting_address(self) -> Mapping[str, Json] | None:
        return address.to_json(self._listener.lasting) if self._listener else None

    def note_settings(self) -> None:
        """They have changed, and are to hold over our death."""
        self._journal.write(settings=self.settings.snapshot())

    @property
    def way_on(self) -> str:
        """What there is to do if the daemon ends now, in postcopy."""
        return self._journal.keeping.way_on

    # -- after a daemon before us

    async def take_up(self) -> None:
        """Go on with what its record says, by `run`; HostError or GuestError.

        The status tells what there is to do: wait for the source in
        postcopy-paused, tell it in completed, nothing in failed.
        """
        record = self._journal.record
        self._loaded = True
        if record.phase in POSTCOPY:
            await self._take_up_postcopy(record)
        elif (
            record.phase is Phase.ARRIVED and self.guest.state is not GuestState.RUNNING
        ):
            self._run_state("paused")
            self.status.set(M.FAILED)
            self.error = HostError(
                "the daemon ended when the guest was here and had not been run yet:"
                " see whether it runs at the source before you continue it here"
            )
        else:
            self._told = record.phase is Phase.TOLD
            self._show_run_state()
            self.postcopy.set(P.ADVISE)
            self.postcopy.set(P.END)
            self.status.set(M.COMPLETED)
        await self._listen_again(record)

    async def _take_up_postcopy(self, record: Record) -> None:
        if record.phase is Phase.PACKAGED or self._parking:
            package = split_package_untrusted(kept_package(self._journal.keeping))
            self._devices.package_untrusted(package)
        self.postcopy.set(P.ADVISE)
        self.postcopy.set(P.LISTENING)
        if record.phase is Phase.RUNNING or self.guest.state is GuestState.RUNNING:
            if self.guest.state is GuestState.INCOMING and not self._parking:
                await self.guest.cont()
            self._show_run_state()
            self.postcopy.set(P.RUNNING)
            self._running.set()
        # Whoever waits for a page since then faults again.
        self.memory.listen()
        self.memory.wake()
        self.error = ChannelLost("the daemon ended in the middle of postcopy")
        self.status.set(M.POSTCOPY_PAUSED)

    def _show_run_state(self) -> None:
        runs = self.guest.state is GuestState.RUNNING
        self._run_state("running" if runs else "paused")

    async def _listen_again(self, record: Record) -> None:
        """Where it listened, if that is possible; else the operator says where."""
        target = address.of_json_untrusted(dict(record.address or {}))
        self._listener = Listener(target or address.Tcp("", "0"))
        if target is None:
            return
        try:
            self._listener = await self._open(target)
        except HostError as error:
            log.warning("order migrate-recover with another address: %s", error)
            self.error = error

    # -- the whole

    async def run(self) -> None:
        """Take one migration; never raises a MigrationError, the status tells."""
        assert self._listener is not None
        try:
            # The fault loop outlives the connection: what is here is served to
            # the guest while the rest cannot come.
            async with trio.open_nursery() as self._standing:
                if self.status.now is M.SETUP:
                    main = await self._listener.accept("main")
                    self.status.set(M.ACTIVE)
                    await self._take(Connection(main, self.memory), self._receive)
                elif self.status.now is M.POSTCOPY_PAUSED:
                    self._standing.start_soon(self._answer_faults)
                    if self._running.is_set():
                        self._let_serve()
                while self.status.now is M.POSTCOPY_PAUSED:
                    await self._come_back()
                self._standing.cancel_scope.cancel()
            if self.postcopy.now is P.END:
                await self._tell_again(self._listener)
        except BaseException as error:
            cause = cause_of(error)
            if cause is None:
                raise
            await self._failed(cause)
        finally:
            self._listener.close()

    async def _take(
        self,
        link: Connection,
        part: Callable[[Connection, trio.Nursery], Awaitable[None]],
    ) -> None:
        """All that uses one connection, until all has arrived or it fails."""
        self._link = link
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.guest.wait_gone)
                nursery.start_soon(self._accept_more, link)
                await part(link, nursery)
                nursery.cancel_scope.cancel()
        except BaseException as error:
            cause = cause_of(error)
            if cause is None:
                raise
            async with trio.open_nursery() as nursery:
                # A QEMU with multifd hears why only if it can write there, too;
                # else it waits until we close, and then perhaps for ever.
                for channel in (link.preempt, *link.strangers):
                    if channel and link.strangers:
                        nursery.start_soon(channel.drain)
                await self._failed(cause, link.peer)
                nursery.cancel_scope.cancel()
        finally:
            # A request that is being written must not keep us waiting.
            link.main.stop.set()
            self.memory.connect(None)
            link.close()

    async def _accept_more(self, link: Connection) -> None:
        """The connection after main is preempt; a third has nothing to say here."""
        assert self._listener is not None
        while self._listener.many:
            channel = await self._listener.accept("preempt", link.main.stop)
            if self._preempt_expected and link.preempt is None:
                link.preempt = channel
                link.preempt_came.set()
            elif self._parking and len(link.strangers) < STRANGERS_MAX:
                # A QEMU with multifd may wait for ever if one ends too soon for
                # it, and would not hear why it is refused.
                link.strangers.append(channel)
            else:
                log.warning("closing a connection that nobody expects")
                channel.close()

    async def _receive(self, link: Connection, nursery: trio.Nursery) -> None:
        kind = await link.main.decode(self.admission.head_untrusted)
        while kind != c.QEMU_VM_SECTION_START:
            kind = await self._before_ram(link, kind)
        await self._ram_setup(link)
        await self._sections(link, nursery)

    # -- before RAM

    async def _before_ram(self, link: Connection, kind: int) -> int:
        """One record in front of RAM's START; the type byte of the next."""
        if kind != c.QEMU_VM_COMMAND:
            self.admission.settle()
            raise StreamError("unexpected in front of the RAM section", got=kind)
        found = await link.peer.command()
        if not isinstance(found, command.OpenReturnPath | command.Ping):
            self.admission.settle()
        await self._command(link, found)
        return await link.peer.next_kind()

    async def _command(self, link: Connection, found: command.Command) -> None:
        """A command that may come outside of the package."""
        match found:
            case command.OpenReturnPath():
                link.peer.return_path = True
            case command.Ping(value):
                await link.peer.ping(value)
            case command.Advise(page_sizes, target_page) if self.postcopy.may(P.ADVISE):
                self.admission.check_advise(page_sizes, target_page)
                self.postcopy.set(P.ADVISE)
                link.loader.advise()
            case command.SwitchoverStart():
                pass
            case command.AdviseEmpty() if self._parking:
                pass  # capability dirty-bitmaps; it matters if there are any
            case command.Layout() if link.peer.is_srcd:
                if not self._parking:
                    self.memory.expect_untrusted(found)
            case _:
                raise StreamError("command that does not belong here", got=found)

    async def _ram_setup(self, link: Connection) -> None:
        """RAM's START: the last that the source says before there are pages."""
        self.admission.settle()
        advised = self.postcopy.now is P.ADVISE
        if link.peer.is_srcd and advised:
            self.admission.check_preempt(at_source=link.peer.preempts)
        start = await link.main.decode(
            lambda read: section.read_header_untrusted(read, c.QEMU_VM_SECTION_START)
        )
        self.admission.check_start(start)
        blocks = await link.main.decode(
            lambda read: self.admission.block_list_untrusted(read, advised=advised)
        )
        await link.main.decode(
            lambda read: section.read_footer_untrusted(read, start.section_id)
        )
        self.admission.check_blocks(blocks)
        if self._parking:
            await self._parking.adopt(
                self.admission.configuration, blocks, advised=advised
            )
            self.memory.adopt(self.guest)
        # Not before: a source that is refused must not cost us what we hold.
        await trio.to_thread.run_sync(self.memory.empty)
        link.loader.begin(start.section_id)
        await self._keep(link.peer, start.section_id)

    async def _keep(self, peer: Peer, section_id: int) -> None:
        """From now on whoever comes after us learns how far this has come."""
        self._journal.record = Record(
            section_id=section_id,
            is_srcd=peer.is_srcd,
            address=self._lasting_address,
            settings=self.settings.snapshot(),
        )
        await self._journal.keeping.keep(RECEIVED, self.memory.kept)
        await self._journal.begin()

    # -- sections

    async def _sections(self, link: Connection, nursery: trio.Nursery) -> None:
        """The stream from the first page to EOF."""
        while True:
            kind = await link.loader.sections()
            if kind is None:
                raise ChannelLost("the channel was shut down", channel="main")
            await link.peer.next_kind()
            match kind:
                case c.QEMU_VM_COMMAND:
                    found = await link.peer.command()
                    if isinstance(found, command.Packaged):
                        await self._package(link, found.size, nursery)
                    elif found == command.Ping(c.PING_PREPARED):
                        nursery.start_soon(self._prepare, link.peer)
                    elif found == command.Ping(c.PING_SETUP):
                        await self._end_preparation()
                        await self._command(link, found)
                    else:
                        await self._command(link, found)
                case c.QEMU_VM_SECTION_FULL if self._parking and not link.loader.begun:
                    self._devices.early += await receive_early_untrusted(
                        link.main, bytes([kind]), link.loader.section_id
                    )
                    fields.bounded(
                        "device state in front of RAM",
                        len(self._devices.early),
                        c.MAX_PACKAGE,
                    )
                    await self._parking.set_early(self._devices.early)
                case c.QEMU_VM_SECTION_START:
                    await self._refuse_start(link)
                # A background snapshot has no END.
                case c.QEMU_VM_SECTION_FULL if (
                    self._devices.opaque
                    and (link.loader.ended or self._parking)
                    and self.postcopy.now in (P.NONE, P.ADVISE)
                ):
                    ending = await receive_ending_untrusted(
                        link.main, bytes([kind]), self._devices.early
                    )
                    self._devices.ending_untrusted(ending)
                    return await self._arrive(link)
                case c.QEMU_VM_SECTION_FULL if self.postcopy.now is not P.RUNNING:
                    await link.main.decode(self._devices.full_untrusted)
                case c.QEMU_VM_EOF:
                    return await self._end(link)
                case _:
                    raise StreamError("unexpected section type", got=kind)

    async def _refuse_start(self, link: Connection) -> None:
        self.admission.check_start(
            await link.main.decode(
                lambda read: section.read_header_untrusted(
                    read, c.QEMU_VM_SECTION_START
                )
            )
        )
        raise StreamError("RAM is started a second time")

    async def _end(self, link: Connection) -> None:
        if not link.loader.ended:
            raise StreamError("the stream ended before its RAM section did")
        if self.postcopy.now in (P.LISTENING, P.RUNNING):
            return await self._end_postcopy(link)
        if self._parking:
            raise StreamError("the stream has no device state: this is no whole VM")
        # What is behind EOF: QEMU sends a description, others may send nothing.
        with suppress(ChannelLost):
            if await link.peer.next_kind() == c.QEMU_VM_VMDESCRIPTION:
                await link.main.decode(vmdesc.read_untrusted)
        await self._arrive(link)

    async def _prepare(self, peer: Peer) -> None:
        """Memory for what will come; the source goes on with precopy meanwhile."""
        self._preparation = trio.CancelScope()
        self._prepared = trio.Event()
        with self._preparation:
            await self.memory.prepare()
        self._prepared.set()
        await peer.say(returnpath.Pong(c.PING_PREPARED))

    async def _end_preparation(self) -> None:
        """The guest is about to stop; it must not wait for memory."""
        self._preparation.cancel()
        await self._prepared.wait()

    # -- precopy ends

    async def _arrive(self, link: Connection) -> None:
        """All is here: load the device state, take the guest over, run it."""
        await self._devices.load()
        if self._parking and link.peer.return_path:
            await self._park(self._parking)
        elif self._parking:
            await self._park_surely(self._parking)
        self._journal.write(phase=Phase.ARRIVED)
        if link.peer.is_srcd:
            await link.peer.say(returnpath.Pong(c.PING_LOADED))
            await link.peer.wait_for_commit()
        else:
            # Before the guest runs here: if this fails it goes on there.
            await self._let_go(link)
        await self._start_guest(self._devices.running and not self._paused())
        await self._complete(link)

    async def _let_go(self, link: Connection) -> None:
        """The source gives the guest up when it has read this, before we know."""
        if self._parking:
            self._parking.irreplaceable = True
        try:
            await link.peer.let_go()
        except ChannelLost:
            if self._parking:
                self._parking.irreplaceable = False
            raise

    async def _start_guest(self, run: bool) -> None:
        if self._parking:
            self._parking.irreplaceable = True
            return
        if run:
            await self.guest.cont()
            self._run_state("running")
            self._emit("RESUME", None)
        else:
            self._run_state("paused")

    # -- postcopy

    async def _package(
        self, link: Connection, size: int, nursery: trio.Nursery
    ) -> None:
        """The switch: from here on a missing page is a fault."""
        if self.postcopy.now is not P.ADVISE:
            raise StreamError("a package without ADVISE, or a second one")
        blob = await link.main.decode(lambda read: fields.take_untrusted(read, size))
        package = split_package_untrusted(blob)
        if not package.listen or not package.run:
            raise StreamError("a package without LISTEN first and RUN last")
        await self._preempt_needed(link)
        await self._end_preparation()
        if link.loader.discards:
            self.postcopy.set(P.DISCARD)
        self._devices.package_untrusted(package)
        await self._keep_package(link.peer, blob)
        self.memory.connect(link.main)
        self.memory.listen()
        link.stack.enter_context(processors_awake(self._tuning.awake))
        self.postcopy.set(P.LISTENING)
        self.status.set(M.POSTCOPY_ACTIVE)
        self._standing.start_soon(self._answer_faults)
        nursery.start_soon(self._load_urgent, link)
        nursery.start_soon(self._run_package, link.peer, package, nursery)

    async def _keep_package(self, peer: Peer, blob: bytes) -> None:
        """A QEMU has given its guest up with it, srcd waits until it is loaded.

        What is parked needs it at the end.
        """
        if self._parking or not peer.is_srcd:
            keeping = self._journal.keeping
            fd = keeping.make(PACKAGE, len(blob))
            try:
                os.pwrite(fd, blob, 0)
                await keeping.keep(PACKAGE, fd)
            finally:
                os.close(fd)
        self._journal.write(phase=Phase.PACKAGED)

    async def _answer_faults(self) -> None:
        """As long as the guest may wait for a page.

        What the kernel refuses now, memory for instance, it may grant later.
        """
        while True:
            try:
                return await self.memory.faults()
            except (HostError, StreamError) as error:
                log.error("faults are not answered: %s", error)
                self.error = HostError(
                    f"the guest's faults are not answered, trying again: {error}"
                )
            await trio.sleep(FAULTS_AGAIN_SECONDS)
            with suppress(HostError):
                self.memory.wake()

    async def _preempt_needed(self, link: Connection) -> None:
        """The source's urgent pages come there; it connects before the package."""
        if not self.settings.on("postcopy-preempt"):
            return
        with trio.move_on_after(PREEMPT_SECONDS):
            await link.preempt_came.wait()
            return
        raise HostError(
            "postcopy-preempt is on here and the source has opened no preempt channel;"
            " switch it on on both sides or on neither"
        )

    async def _run_package(
        self, peer: Peer, package: Package, nursery: trio.Nursery
    ) -> None:
        """Load the device state, say so, and run the guest."""
        await self._devices.load()
        self._journal.write(phase=Phase.LOADED)
        if self._parking:
            self._parking.irreplaceable = True
        self._loaded = True
        for value in package.pings:
            await peer.say(returnpath.Pong(value))
        if peer.is_srcd:
            await peer.committed.wait()
        await self._run_guest()
        nursery.start_soon(self.memory.sweep)

    async def _run_guest(self) -> None:
        """The guest is ours now, whatever becomes of the connection meanwhile."""
        if not self._running.is_set():
            with trio.CancelScope(shield=True):
                self.postcopy.set(P.RUNNING)
                await self._start_guest(True)
                self._journal.write(phase=Phase.RUNNING)
                self._running.set()
            self._let_serve()

    @property
    def _preempt_expected(self) -> bool:
        """What is parked comes as its source likes it: the channel is there, and
        stays silent until something is asked for.
        """
        return self.settings.on("postcopy-preempt") or self._parking is not None

    async def _load_urgent(self, link: Connection) -> None:
        """The preempt channel; its end is an error only while pages are missing."""
        await link.preempt_came.wait()
        assert link.preempt
        if self._parking:
            await self._asked.wait()
        loader = Loader(self.memory, link.preempt, preempt=True)
        try:
            await loader.urgent_pages()
        except ChannelLost:
            if self.memory.missing:
                raise
        finally:
            loader.close()

    async def _end_postcopy(self, link: Connection) -> None:
        """EOF was read: wait for the last urgent pages, then let the source go."""
        if link.peer.is_srcd and not link.peer.committed.is_set():
            raise StreamError("the stream ended without the source's COMMIT")
        await self._last_pages(link)
        await self._running.wait()
        self.memory.finish()
        if self._parking:
            await self._park_surely(self._parking)
        self._journal.write(phase=Phase.COMPLETE)
        self.postcopy.set(P.END)
        if link.preempt:
            link.preempt.break_connection()
        await self._complete(link)

    async def _last_pages(self, link: Connection) -> None:
        missing = self.memory.missing
        while missing:
            with trio.move_on_after(LAST_PAGES_SECONDS):
                await self.memory.complete()
                return
            if self.memory.missing == missing or not link.preempt:
                raise StreamError(
                    "the source ended the stream and owes pages", got=missing
                )
            missing = self.memory.missing

    # -- recovery

    async def _come_back(self) -> None:
        """Paused: wait for the source, and take what it has left."""
        try:
            main = await self._next_source()
        except BaseException as error:
            cause = cause_of(error)
            if not isinstance(cause, HostError):
                raise
            self.error = cause
            await trio.sleep(LISTEN_AGAIN_SECONDS)
            assert self._listener is not None
            self.error = await open_again(self._listener, self.settings) or cause
            return
        if main:
            self.error = None
            self.status.set(M.POSTCOPY_RECOVER)
            link = Connection(main, self.memory, self._journal.record)
            await self._take(link, self._recover)

    async def _next_source(self) -> Channel | None:
        """The next connection; None: we listen somewhere else now."""
        assert self._listener is not None
        main = None
        with trio.CancelScope() as self._waiting:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.guest.wait_gone)
                nursery.start_soon(notice_loss, self._listener, self.settings)
                main = await self._listener.accept("main")
                nursery.cancel_scope.cancel()
        return main

    async def _recover(self, link: Connection, nursery: trio.Nursery) -> None:
        """From the first word of a source that resumes to the end."""
        self.memory.begin_epoch()
        with trio.move_on_after(self._tuning.patience) as patience:
            await link.peer.wait_for_resume(self.memory)
        if patience.cancelled_caught:
            raise ChannelLost("the source does not resume", channel="main")
        self.status.set(M.POSTCOPY_ACTIVE)
        await link.peer.say(returnpath.ResumeAck())
        await self._preempt_needed(link)
        link.stack.enter_context(processors_awake(self._tuning.awake))
        self.memory.connect(link.main)
        await self.memory.ask_again(link.main)
        nursery.start_soon(self._load_urgent, link)
        nursery.start_soon(self._go_on, nursery)
        await self._sections(link, nursery)

    async def _go_on(self, nursery: trio.Nursery) -> None:
        if self._journal.record.phase is Phase.PACKAGED:
            await self._load_again()
        await self._run_guest()
        nursery.start_soon(self.memory.sweep)

    async def _load_again(self) -> None:
        """A daemon before us died while it loaded the device state, or before."""
        if self.guest.state is GuestState.INCOMING:
            await self._devices.load()
        self._journal.write(phase=Phase.LOADED)

    async def _tell_again(self, listener: Listener) -> None:
        """All is here, but the source may not know: tell it if it comes back."""
        while not self._told:
            main = await listener.accept("main")
            link = Connection(main, self.memory, self._journal.record)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._accept_more, link)
                    with trio.move_on_after(self._tuning.patience):
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
        while await link.loader.sections() is not None:
            if await link.peer.next_kind() == c.QEMU_VM_EOF:
                await self._done(link)
                return
            await self._command(link, await link.peer.command())

    # -- parking

    def _let_serve(self) -> None:
        """A parked VM is ours from now on, so it may be passed on as it comes."""
        if self._parking:
            self._standing.start_soon(self._pass_on, self._parking)

    async def _pass_on(self, guest: ParkingGuest) -> None:
        """Ask for the pages that whoever serves it asks for."""
        try:
            with guest.upstream() as socket:
                await trio.lowlevel.wait_readable(socket)
                self._asked.set()
                await self.memory.pass_on(socket)
        except HostError as error:
            log.warning("this VM is not served before it is complete: %s", error)

    async def _park(self, guest: ParkingGuest) -> None:
        """All has come: make it a parked VM, before the source lets it go."""
        devices = self._devices
        await guest.commit(
            devices.sections,
            devices.description,
            "running" if devices.running else "paused",
            f"migration from {self._link.main.peer() if self._link else '?'}",
        )
        log.info("the guest is parked in %s", guest.directory)

    async def _park_surely(self, guest: ParkingGuest) -> None:
        """Likewise, when the source may have given it up: until it succeeds.

        Its connection stays open meanwhile. A QEMU that loses it behind its EOF
        would run its guest again.
        """
        guest.irreplaceable = True
        while True:
            try:
                return await self._park(guest)
            except HostError as error:
                log.error("the guest is not parked yet: %s", error)
                self.error = HostError(f"not parked yet, trying again: {error}")
            await trio.sleep(PARK_AGAIN_SECONDS)

    # -- the ends

    async def _complete(self, link: Connection) -> None:
        await self._done(link)
        self.error = None
        if self._parking:
            self._parking.let_go()
            self._run_state("postmigrate")
        self.status.set(M.COMPLETED)

    async def _done(self, link: Connection) -> None:
        self._told = await link.peer.done()
        if self._told:
            self._journal.write(phase=Phase.TOLD)

    async def _failed(self, error: MigrationError, peer: Peer | None = None) -> None:
        log.warning("migration failed: %s", error)
        self.error = error
        # The source may have given the guest up: keep all there is of it.
        keep = self._loaded and self.status.may(M.POSTCOPY_PAUSED)
        if keep and not isinstance(error, GuestError):
            self.status.set(M.POSTCOPY_PAUSED)
            return
        # A QEMU that reads SHUT 1 behind RUN would run its guest again.
        if peer and (peer.is_srcd or not self._loaded):
            await peer.tell(error)
        self.status.set(M.FAILED)
        await self._journal.end()
