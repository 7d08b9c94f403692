"""Whose the guest is: each step forward, written down before it is taken.

It belongs to the source until the destination has proven that it has loaded the
device state. Before that every failure leaves the guest running here. After that
none does.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from common.errors import GuestError
from srcd import parked
from srcd.departure import Owner
from srcd.record import Phase

if TYPE_CHECKING:
    from common.errors import MigrationError
    from srcd.departure import Departure
    from srcd.urgent import Urgent

log = logging.getLogger(__name__)


class Ownership:
    """Moves `Departure.owner` forward. A parked VM is marked besides."""

    def __init__(self, departure: Departure, urgent: Urgent) -> None:
        self._departure = departure
        self._urgent = urgent

    async def about_to_send(self, *, postcopy: bool) -> None:
        """From here on a QEMU may run the guest; dstd asks before, and waits for
        COMMIT. HostError: it must not be sent.
        """
        departure = self._departure
        departure.postcopy = postcopy
        if departure.parked and not departure.peer.is_dstd:
            await departure.parked.mark_before(departure.mark)
        departure.owner = Owner.PACKAGED
        departure.journal.write(
            phase=Phase.PACKAGED,
            postcopy=postcopy,
            preempt=self._urgent.known,
            preempt_early=self._urgent.early,
        )

    async def give_away(self) -> None:
        """The guest is the destination's, and this daemon's death changes nothing."""
        departure = self._departure
        departure.owner = Owner.DESTINATION
        departure.journal.write(phase=Phase.GONE)
        if departure.parked:
            await departure.parked.mark_running(departure.mark)

    def may_be_lost(self, error: MigrationError) -> bool:
        """A QEMU has a parked VM, and its answer, if there was one, is lost."""
        departure = self._departure
        in_doubt = departure.owner is Owner.PACKAGED and not departure.cancellable
        return in_doubt and departure.parked is not None and parked.may_run(error)

    async def take_back(self) -> None:
        """The guest goes on here as it was before the migration, which has ended."""
        if self._departure.times.stopped:
            await self._go_on()
        await self._departure.journal.end()

    async def _go_on(self) -> None:
        departure = self._departure
        if departure.parked:
            await departure.parked.unmark()
        if not departure.was_running:
            departure.run_state("paused")
            return
        try:
            await departure.guest.cont()
        except GuestError as error:
            log.error("the guest cannot go on here: %s", error)
            departure.run_state("internal-error")
            return
        departure.run_state("running")
        departure.emit("RESUME", None)
