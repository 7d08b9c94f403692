"""Postcopy at the destination: package, run, last page; and again after a pause.

When the package is there, a second task loads the device state out of it while
the first goes on with the pages, because loading may touch pages that are still
to come. Faults are answered as long as the guest may wait for a page, whatever
becomes of connections: what is here is served while the rest cannot come.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from common.errors import HostError, StreamError
from common.guest.base import GuestState
from common.status import MigrationStatus as M
from common.status import PostcopyState as P
from common.stream import returnpath
from common.tuning import processors_awake
from dstd.record import PACKAGE, Phase

if TYPE_CHECKING:
    from common.stream.package import Package
    from dstd.arrival import Arrival
    from dstd.connection import Connection
    from dstd.peer import Peer

log = logging.getLogger(__name__)

# After the source's EOF, how long the last pages may take without any arriving.
LAST_PAGES_SECONDS: Final = 30.0
# When faults could not be answered, until it is tried again.
FAULTS_AGAIN_SECONDS: Final = 1.0


class Postcopy:
    """Of one migration. In `standing` runs what outlives connections."""

    def __init__(self, arrival: Arrival, standing: trio.Nursery) -> None:
        self._arrival = arrival
        self._memory = arrival.memory
        self._standing = standing

    # -- it begins, or goes on

    async def begin(
        self, link: Connection, package: Package, blob: bytes, nursery: trio.Nursery
    ) -> None:
        """The switch: from here on a missing page is a fault.

        `blob` is the package as it came. `nursery` ends with the connection.
        """
        arrival = self._arrival
        if link.loader.discards:
            arrival.postcopy.set(P.DISCARD)
        arrival.devices.package_untrusted(package)
        await self._keep_package(link.peer, blob)
        self._memory.connect(link.main)
        self._memory.listen()
        link.stack.enter_context(processors_awake(arrival.tuning.awake))
        arrival.postcopy.set(P.LISTENING)
        arrival.status.set(M.POSTCOPY_ACTIVE)
        self._standing.start_soon(self._answer_faults)
        nursery.start_soon(link.load_urgent)
        nursery.start_soon(self._load_and_run, link.peer, package, nursery)

    def take_up(self) -> None:
        """A daemon before us began it; it is paused."""
        self._standing.start_soon(self._answer_faults)
        if self._arrival.running.is_set():
            self._let_serve()

    async def resume(self, link: Connection, nursery: trio.Nursery) -> None:
        """The source on `link` resumes it; `nursery` ends with the connection."""
        self._arrival.status.set(M.POSTCOPY_ACTIVE)
        await link.peer.say(returnpath.ResumeAck())
        await link.preempt_needed()
        link.stack.enter_context(processors_awake(self._arrival.tuning.awake))
        self._memory.connect(link.main)
        await self._memory.ask_again(link.main)
        nursery.start_soon(link.load_urgent)
        nursery.start_soon(self._go_on, nursery)

    # -- the guest

    async def _keep_package(self, peer: Peer, blob: bytes) -> None:
        """A QEMU has given its guest up with it, srcd waits until it is loaded.

        What is parked needs it at the end.
        """
        journal = self._arrival.journal
        if self._arrival.parking or not peer.is_srcd:
            await journal.keeping.keep_content(PACKAGE, blob)
        journal.write(phase=Phase.PACKAGED)
        await journal.settle()

    async def _load_and_run(
        self, peer: Peer, package: Package, nursery: trio.Nursery
    ) -> None:
        """Load the device state, say so, and run the guest."""
        arrival = self._arrival
        await arrival.devices.load()
        arrival.journal.write(phase=Phase.LOADED)
        if peer.is_srcd:  # of a QEMU's guest it was as good that it is packaged
            await arrival.journal.settle()
        if arrival.parking:
            arrival.parking.keep()
        arrival.loaded = True
        for value in package.pings:
            await peer.say(returnpath.Pong(value))
        if peer.is_srcd:
            await peer.committed.wait()
        await self._run_guest()
        nursery.start_soon(self._memory.sweep)

    async def _go_on(self, nursery: trio.Nursery) -> None:
        """RESUME stands for a COMMIT that was lost."""
        if self._arrival.journal.record.phase is Phase.PACKAGED:
            await self._load_again()
        await self._run_guest()
        nursery.start_soon(self._memory.sweep)

    async def _load_again(self) -> None:
        """A daemon before us died while it loaded the device state, or before."""
        if self._arrival.guest.state is GuestState.INCOMING:
            await self._arrival.devices.load()
        self._arrival.journal.write(phase=Phase.LOADED)

    async def _run_guest(self) -> None:
        """The guest is ours now, whatever becomes of the connection meanwhile."""
        arrival = self._arrival
        if not arrival.running.is_set():
            with trio.CancelScope(shield=True):
                arrival.postcopy.set(P.RUNNING)
                await arrival.start()
                arrival.journal.write(phase=Phase.RUNNING)
                arrival.running.set()
            self._let_serve()

    def _let_serve(self) -> None:
        """A parked VM is ours from now on, so it may be passed on as it comes."""
        if parking := self._arrival.parking:
            self._standing.start_soon(parking.serve, self._memory)

    # -- faults

    async def _answer_faults(self) -> None:
        """As long as the guest may wait for a page.

        What the kernel refuses now, memory for instance, it may grant later.
        """
        while True:
            try:
                return await self._memory.faults()
            except (HostError, StreamError) as error:
                log.error("faults are not answered: %s", error)
                self._arrival.trouble(
                    HostError(
                        f"the guest's faults are not answered, trying again: {error}"
                    )
                )
            await trio.sleep(FAULTS_AGAIN_SECONDS)
            with suppress(HostError):
                self._memory.wake()

    # -- the end

    async def end(self, link: Connection) -> None:
        """EOF was read: wait for the last urgent pages, then let the source go."""
        arrival = self._arrival
        if link.peer.is_srcd and not link.peer.committed.is_set():
            raise StreamError("the stream ended without the source's COMMIT")
        await self._last_pages(link)
        await arrival.running.wait()
        self._memory.finish()
        if arrival.parking:
            await arrival.parking.commit_surely(link.main.peer())
        arrival.journal.write(phase=Phase.COMPLETE)
        arrival.postcopy.set(P.END)
        link.end_preempt()
        await arrival.complete(link.peer)

    async def _last_pages(self, link: Connection) -> None:
        missing = self._memory.missing
        while missing:
            with trio.move_on_after(LAST_PAGES_SECONDS):
                await self._memory.complete()
                return
            if self._memory.missing == missing or not link.has_preempt:
                raise StreamError(
                    "the source ended the stream and owes pages", got=missing
                )
            missing = self._memory.missing
