"""An outgoing migration that does nothing but pause and resume.

It has the status machine and the settings of a real one, and no guest, no channel
and no pages: a test says what becomes of each attempt, and when.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from common import address, status
from common.errors import ChannelLost, MigrationError
from common.settings import Settings
from common.status import MigrationStatus as M

if TYPE_CHECKING:
    from common.address import Address

RUNNING = (M.SETUP, M.ACTIVE, M.DEVICE, M.POSTCOPY_ACTIVE)


class PausedMigration:
    """What automatic recovery sees of an OutgoingMigration.

    `asked` is set by an order to resume, and anew when one has succeeded. `lacking`
    is how many bytes the destination has not received.
    """

    def __init__(self, target: Address | None = None) -> None:
        self.settings = Settings()
        self.status = status.outgoing()
        self.error: MigrationError | None = None
        self.address: Address | None = target or address.Tcp("there", "4444")
        self.pump = self
        self.lacking = 100
        self.asked = trio.Event()
        self.resumed: list[Address] = []
        self.abandoned = 0

    def remaining_bytes(self) -> int:
        return self.lacking

    def begin(self) -> None:
        """As far as postcopy."""
        for step in RUNNING:
            self.status.set(step)

    def resume(self, target: Address) -> None:
        self.address = target
        self.resumed.append(target)
        self.asked.set()
        self.status.set(M.POSTCOPY_RECOVER_SETUP)

    def abandon(self) -> None:
        self.abandoned += 1
        self.pause("abandoned")

    def pause(self, why: str = "cut") -> None:
        """The connection is lost, or cannot be made."""
        self.error = ChannelLost(why)
        self.status.set(M.POSTCOPY_PAUSED)

    def goes_on(self) -> None:
        """The attempt has succeeded."""
        self.asked = trio.Event()
        self.error = None
        self.status.set(M.POSTCOPY_RECOVER)
        self.status.set(M.POSTCOPY_ACTIVE)
