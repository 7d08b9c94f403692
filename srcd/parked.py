"""What a migration of a parked VM does besides: mark it, learn what it asks for."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from common.errors import ChannelLost, HostError, MigrationError, Refused
from common.guest.stored import Mark, StoredGuest
from common.native._native import lib
from common.store.arriving import Arriving

if TYPE_CHECKING:
    from common.guest.base import Guest
    from srcd.pump import Pump

log = logging.getLogger(__name__)

MAX_PAGES: Final = int(lib.WORKING_SET_MAX)


class Serving:
    """One migration of the parked VM `guest`, whose pages `pump` sends.

    `preempt`: whether the destination has a preempt channel; None: not known yet.
    """

    def __init__(self, guest: StoredGuest, pump: Pump) -> None:
        self.gone = guest.mark
        """Where a daemon before this one had it sent; not all of it."""
        if not guest.clone and not self.gone:
            guest.check_elsewhere()
        self.lazy = guest.lazy
        self.preempt: bool | None = None
        self._guest = guest
        self._pump = pump
        known = guest.learns and not guest.learn_seconds
        self._first = guest.parked.working_set if known else ()
        self._mark: Mark | None = self.gone  # the one that there is to be
        self._written = self.gone
        pump.send_only_asked(guest.learn_seconds)
        parked = guest.parked
        if isinstance(parked, Arriving):
            pump.serve_stored(None, ())
            pump.serve_arriving(parked.received, parked.socket, parked.filler)
        else:
            pump.serve_stored(parked.checksums(), self._first)

    @classmethod
    def of(cls, guest: Guest, pump: Pump) -> Serving | None:
        """None: this guest is not parked. HostError if it runs elsewhere."""
        if not isinstance(guest, StoredGuest):
            return None
        try:
            return cls(guest, pump)
        except HostError:
            pump.close()
            raise

    @property
    def where(self) -> str:
        """Where it has gone, if it has."""
        return self._mark.address if self._mark else ""

    @property
    def state_after(self) -> str:
        """QEMU's run state once the VM has gone; a copy can be served again."""
        return "prelaunch" if self._guest.clone else "postmigrate"

    def explained(self, error: MigrationError) -> MigrationError:
        """What a QEMU means that refuses, and has said why on its own stderr only."""
        silent = isinstance(error, Refused) and not error.text
        if not (silent and self.lazy) or self._guest.parked.manifest.advised:
            return error
        return Refused(
            "its own log tells why; if it says that page sizes do not match: this VM"
            " came by precopy, which does not tell how large its pages were, so to a"
            " QEMU with huge pages it is served with --restore precopy"
        )

    async def mark_before(self, mark: Mark) -> None:
        """The VM may run there before we know; should we die, nobody serves it again.

        HostError if that cannot be marked: it must not run then.
        """
        if self._guest.clone or mark == self._written:
            return
        self._mark = mark
        await trio.to_thread.run_sync(self._guest.parked.mark_running, str(mark))
        self._written = mark

    async def mark_running(self, mark: Mark) -> None:
        """From now on the VM runs there; nobody may serve it a second time."""
        try:
            await self.mark_before(mark)
        except HostError as error:
            # It runs there all the same, and needs its pages; `completed` tries again.
            log.error("no mark that the VM runs at %s: %s", mark, error)

    async def unmark(self) -> None:
        """It does not run there after all."""
        if not self._mark:
            return
        self._mark = self._written = None
        try:
            await trio.to_thread.run_sync(self._guest.parked.unmark_running)
        except HostError as error:
            log.error("the VM is marked as running and is not: %s", error)

    async def completed(self) -> None:
        """All is there: remember what was asked for, for the next time."""
        if self._mark:
            await self.mark_running(replace(self._mark, pending=False))
        pages = tuple(dict.fromkeys((*self._first, *self._pump.asked)))[:MAX_PAGES]
        if not self._guest.learns or pages == self._first:
            return
        try:
            await trio.to_thread.run_sync(self._guest.parked.save_working_set, pages)
        except HostError as error:
            log.warning("the working set is not remembered: %s", error)


def may_run(error: MigrationError) -> bool:
    """Whether a QEMU that was told to run the VM may do so, after this error.

    It does not if it refused, or closed in order: it answers before it runs.
    """
    if isinstance(error, ChannelLost):
        return error.errno is not None
    return not isinstance(error, Refused)
