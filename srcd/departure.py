"""What the parts of one outgoing migration share: the guest on its way out.

How far it has gone is in its status, its record, its times, and in whose the
guest is. What the parts do is in a file each.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from common.guest.keeping import Keeping
from common.guest.stored import Mark
from srcd.account import Sent, Times
from srcd.channels import Channels
from srcd.convergence import Convergence
from srcd.parked import Serving
from srcd.peer import Peer
from srcd.pump import Pump, Tracking
from srcd.record import new_journal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.address import Address
    from common.errors import MigrationError
    from common.guest.base import Guest
    from common.guest.journal import Journal
    from common.qmp.message import Json
    from common.settings import Settings
    from common.status import MigrationStatus, StatusMachine
    from common.tuning import Tuning
    from srcd.record import Record


class Owner(Enum):
    """Whose the guest is; it only ever moves forward."""

    SOURCE = "the source: any failure leaves it running here"
    PACKAGED = "the source still, but its state is on the way: QEMU may run it"
    DESTINATION = "the destination: it never runs here again"


class Departure:
    """One per migration. `emit`, `run_state` and `track` as for OutgoingMigration."""

    def __init__(
        self,
        guest: Guest,
        settings: Settings,
        status: StatusMachine[MigrationStatus],
        emit: Callable[[str, Mapping[str, Json] | None], None],
        run_state: Callable[[str], None],
        *,
        track: bool,
        tuning: Tuning,
        journal: Journal[Record] | None,
    ) -> None:
        self.guest = guest
        self.journal = journal or new_journal(guest, Keeping(guest))
        self.settings = settings
        self.status = status
        self.emit = emit
        self.run_state = run_state
        self.tuning = tuning
        self.error: MigrationError | None = None
        self.times = Times()
        self.sent = Sent()
        self.convergence = Convergence()
        self.pump = Pump(guest.blocks)
        self.tracking = Tracking(guest, self.pump.ram, allowed=track)
        self.peer = Peer()
        self.channels = Channels(tuning)
        self.parked = Serving.of(guest, self.pump)
        self.address: Address | None = None
        """Where it goes, or went last."""
        self.where = ""
        """The same, as a parked VM is marked with it."""
        self.owner = Owner.SOURCE
        self.postcopy = False
        """The package has left, or is about to; else this is precopy to its end."""
        self.was_running = False
        """When it was stopped for the switchover."""
        # A parked VM may run at once, and needs no precopy then.
        self._postcopy_asked = self.parked is not None and self.parked.lazy

    # -- postcopy

    def ask_for_postcopy(self) -> None:
        """As soon as the stream is active; once the guest has stopped, too late."""
        if not self.times.stopped:
            self._postcopy_asked = True
            self.pump.cut_short(self.wants_postcopy)

    @property
    def advises(self) -> bool:
        """Whether postcopy is possible."""
        return self.channels.answers and self.settings.on("postcopy-ram")

    @property
    def wants_postcopy(self) -> bool:
        return self._postcopy_asked and self.advises

    async def tell_migration(self) -> None:
        """A dstd learns which migration this is, or refuses another's pages."""
        number = self.journal.record.migration
        await self.peer.tell_migration(self.channels.main, number)

    # -- whose the guest is

    @property
    def cancellable(self) -> bool:
        """Until the destination may have got the guest.

        dstd waits for COMMIT, and a file or a command runs nothing.
        """
        if self.owner is Owner.PACKAGED:
            return self.peer.is_dstd or not self.channels.answers
        return self.owner is Owner.SOURCE

    @property
    def mark(self) -> Mark:
        """Of a parked VM that is there."""
        return Mark(self.where, self.peer.is_dstd, pending=self.postcopy)

    # -- what holds in each phase

    def apply_limits(self) -> None:
        """Bandwidth parameters have changed, or the phase has."""
        precopy = self.owner is Owner.SOURCE
        if precopy and self.times.stopped:
            self.pump.limit(0)  # the guest waits for every byte
            return
        name = "max-bandwidth" if precopy else "max-postcopy-bandwidth"
        self.pump.limit(self.settings.number(name))

    def next_pass(self) -> None:
        self.convergence.passes += 1
        self.emit("MIGRATION_PASS", {"pass": self.convergence.passes})
