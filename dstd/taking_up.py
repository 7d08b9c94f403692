"""Taking up what a daemon before us has left of an incoming migration.

The status tells what there is to do then: wait for the source in
postcopy-paused, tell it in completed, nothing in failed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import ChannelLost, HostError
from common.guest.base import GuestState
from common.status import MigrationStatus as M
from common.status import PostcopyState as P
from common.stream.package import split_package_untrusted
from dstd.record import POSTCOPY, Phase, kept_package

if TYPE_CHECKING:
    from dstd.arrival import Arrival
    from dstd.record import Record


async def take_up(arrival: Arrival) -> None:
    """Bring `arrival` where its record says that it was; HostError or GuestError."""
    record = arrival.journal.record
    arrival.loaded = True
    if record.phase in POSTCOPY:
        await _postcopy(arrival, record)
    elif (
        record.phase is Phase.ARRIVED and arrival.guest.state is not GuestState.RUNNING
    ):
        _not_run_yet(arrival)
    else:
        _complete(arrival, record)


async def _postcopy(arrival: Arrival, record: Record) -> None:
    if record.phase is Phase.PACKAGED or arrival.parking:
        package = split_package_untrusted(kept_package(arrival.journal.keeping))
        arrival.devices.package_untrusted(package)
    arrival.postcopy.set(P.ADVISE)
    arrival.postcopy.set(P.LISTENING)
    if record.phase is Phase.RUNNING or arrival.guest.state is GuestState.RUNNING:
        await _run_on(arrival)
    # Whoever waits for a page since then faults again.
    arrival.memory.listen()
    arrival.memory.wake()
    arrival.error = ChannelLost("the daemon ended in the middle of postcopy")
    arrival.status.set(M.POSTCOPY_PAUSED)


async def _run_on(arrival: Arrival) -> None:
    """The guest was started, or was about to be."""
    if arrival.guest.state is GuestState.INCOMING and not arrival.parking:
        await arrival.guest.cont()
    arrival.show_run_state()
    arrival.postcopy.set(P.RUNNING)
    arrival.running.set()


def _not_run_yet(arrival: Arrival) -> None:
    """Whether the source knows that the guest can run here is not known."""
    arrival.show_run_state()
    arrival.status.set(M.FAILED)
    arrival.error = HostError(
        "the daemon ended when the guest was here and had not been run yet:"
        " see whether it runs at the source before you continue it here"
    )


def _complete(arrival: Arrival, record: Record) -> None:
    arrival.told = record.phase is Phase.TOLD
    arrival.show_run_state()
    arrival.postcopy.set(P.ADVISE)
    arrival.postcopy.set(P.END)
    arrival.status.set(M.COMPLETED)
