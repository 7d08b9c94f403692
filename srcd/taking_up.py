"""Taking up what a daemon before us has left: a guest that has moved.

The status tells what there is to do then: resume in postcopy-paused, nothing in
completed and failed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from common import address
from common.errors import ChannelLost
from common.status import MigrationStatus as M
from srcd.departure import Owner
from srcd.record import Phase

if TYPE_CHECKING:
    from srcd.departure import Departure
    from srcd.record import Record
    from srcd.urgent import Urgent


def take_up(departure: Departure, urgent: Urgent) -> None:
    """Bring `departure` where its record says that it was."""
    record = departure.journal.record
    _recall(departure, urgent, record)
    if record.phase is Phase.COMPLETED:
        departure.times.ended = time.monotonic()
        departure.run_state("postmigrate")
        departure.status.set(M.COMPLETED)
    elif record.postcopy:
        _pause(departure)
    else:
        _in_doubt(departure)


def _recall(departure: Departure, urgent: Urgent, record: Record) -> None:
    departure.owner = Owner.DESTINATION
    departure.channels.answers = True
    departure.postcopy = record.postcopy
    departure.was_running = record.was_running
    departure.address = address.of_json_untrusted(record.address)
    departure.peer.is_dstd = record.is_dstd
    urgent.early = record.preempt_early
    if departure.parked:
        departure.parked.preempt = record.preempt
        departure.where = departure.parked.where
    # What there was before is not known any more.
    now, times = time.monotonic(), departure.times
    times.begun = times.active = times.stopped = times.handed_over = now


def _pause(departure: Departure) -> None:
    departure.pump.owe_dirty()
    departure.apply_limits()
    departure.run_state("finish-migrate")
    departure.error = ChannelLost("the daemon ended in the middle of postcopy")
    departure.status.set(M.POSTCOPY_PAUSED)


def _in_doubt(departure: Departure) -> None:
    """After precopy nothing can be resumed."""
    departure.run_state("paused")
    departure.error = ChannelLost(
        "the daemon ended when the destination was told to run the guest: see"
        " whether it does before you continue it here"
    )
    departure.status.set(M.FAILED)
