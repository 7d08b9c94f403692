"""A guest's writes, for a measurement outside of a migration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcd.pump import Pump, Tracking

if TYPE_CHECKING:
    from common.guest.base import Guest


class Written:
    """Dirty tracking with bitmaps of its own."""

    def __init__(self, guest: Guest) -> None:
        self._pump = Pump(guest.blocks)
        self.tracking = Tracking(guest, self._pump.ram)
        self._started = False

    @classmethod
    def of(cls, guest: Guest) -> Written | None:
        """None where writes cannot be seen."""
        found = cls(guest)
        if found.tracking.able:
            return found
        found.stop()
        return None

    def start(self) -> None:
        self._started = True
        self.tracking.start()

    def sync(self) -> int:
        """Target pages written since the start or the last call."""
        return self.tracking.sync()

    def stop(self) -> None:
        if self._started:
            self.tracking.stop()
        self._pump.close()
