"""What a migration does besides if its guest is to be parked, and not run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Self

import trio

from common.errors import HostError
from common.guest.parking import ParkingGuest

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.guest.base import Guest
    from dstd.devices import Devices
    from dstd.fault import Memory

log = logging.getLogger(__name__)

# When what has come could not be parked, until it is tried again.
PARK_AGAIN_SECONDS: Final = 5.0


class Parking:
    """One VM on its way into the directory of `guest`, with its `devices`.

    `asked` is set when a page of it is asked for. `trouble` is told what keeps it
    from being parked, as long as that is so.
    """

    def __init__(
        self,
        guest: ParkingGuest,
        devices: Devices,
        trouble: Callable[[HostError], None],
    ) -> None:
        self.guest = guest
        self.asked = trio.Event()
        self._devices = devices
        self._trouble = trouble

    @classmethod
    def of(
        cls, guest: Guest, devices: Devices, trouble: Callable[[HostError], None]
    ) -> Self | None:
        """None: this guest is to run here."""
        if not isinstance(guest, ParkingGuest):
            return None
        return cls(guest, devices, trouble)

    def keep(self, *, yes: bool = True) -> None:
        """Nobody else may have the VM any more: what is here of it is not removed."""
        self.guest.irreplaceable = yes

    async def serve(self, memory: Memory) -> None:
        """It is ours, and is passed on as it comes: ask for the pages that whoever
        serves it asks for.
        """
        try:
            with self.guest.upstream() as socket:
                await trio.lowlevel.wait_readable(socket)
                self.asked.set()
                await memory.pass_on(socket)
        except HostError as error:
            log.warning("this VM is not served before it is complete: %s", error)

    async def commit(self, source: str) -> None:
        """All has come: make it a parked VM, before the source lets it go.

        `source` is where it is from. HostError, and it may be tried again.
        """
        devices = self._devices
        await self.guest.commit(
            devices.sections,
            devices.description,
            "running" if devices.running else "paused",
            f"migration from {source}",
        )
        log.info("the guest is parked in %s", self.guest.directory)

    async def commit_surely(self, source: str) -> None:
        """Likewise, when the source may have given it up: until it succeeds.

        Its connection stays open meanwhile. A QEMU that loses it behind its EOF
        would run its guest again.
        """
        self.keep()
        while True:
            try:
                return await self.commit(source)
            except HostError as error:
                log.error("the guest is not parked yet: %s", error)
                self._trouble(HostError(f"not parked yet, trying again: {error}"))
            await trio.sleep(PARK_AGAIN_SECONDS)
