"""An outgoing migration as `query-migrate` shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from common.native._native import ffi
from common.native.stats import histogram
from common.status import MigrationStatus as M
from common.stream.constants import TARGET_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.qmp.message import Json
    from srcd.outgoing import OutgoingMigration

_PRECOPY: Final = frozenset({M.ACTIVE, M.PRE_SWITCHOVER, M.DEVICE, M.CANCELLING})
_SHOWN: Final = _PRECOPY | {
    M.POSTCOPY_ACTIVE,
    M.POSTCOPY_PAUSED,
    M.POSTCOPY_RECOVER_SETUP,
    M.POSTCOPY_RECOVER,
    M.COMPLETED,
}


def migration_info(
    migration: OutgoingMigration, now: float, recovery: Mapping[str, Json]
) -> Mapping[str, Json]:
    """The reply; `now` is the monotonic clock, in seconds.

    `recovery` is what automatic recovery says of itself.
    """
    status = migration.status.now
    info: dict[str, Json] = {"status": status}
    if migration.error:
        info["error-desc"] = str(migration.error)
    if status in _SHOWN and migration.times.active:
        info |= _times(migration, now)
        info["ram"] = _ram(migration, now)
        info["x-postcopyd"] = {**_ours(migration), "recovery": recovery}
    return info


def _times(migration: OutgoingMigration, now: float) -> Mapping[str, Json]:
    times = migration.times
    end = times.ended or now
    info: dict[str, Json] = {
        "total-time": _ms(times.begun, end),
        "setup-time": _ms(times.begun, times.active),
    }
    if migration.status.now in _PRECOPY:
        expected = migration.convergence.expected_downtime_ms
        limit = migration.settings.number("downtime-limit")
        info["expected-downtime"] = limit if expected is None else expected
    else:
        info["downtime"] = _ms(times.stopped, times.handed_over or end)
    return info


def _ram(migration: OutgoingMigration, now: float) -> Mapping[str, Json]:
    pump = migration.pump
    completed = migration.status.now is M.COMPLETED
    stats = pump.stats
    sent = migration.bytes_sent
    in_postcopy = bool(migration.times.handed_over)
    precopy = migration.sent.precopy or sent
    downtime = migration.sent.downtime
    seconds = max((migration.times.ended or now) - migration.times.active, 1e-3)
    pages = int(stats.normal_pages) + int(stats.zero_pages)
    return {
        "total": pump.total,
        "remaining": 0 if completed else pump.remaining_bytes(),
        "transferred": sent,
        "duplicate": int(stats.zero_pages),
        "normal": int(stats.normal_pages),
        "normal-bytes": int(stats.normal_pages) * TARGET_PAGE_SIZE,
        "page-size": TARGET_PAGE_SIZE,
        "dirty-pages-rate": (
            0 if completed else migration.convergence.dirty_pages_per_second
        ),
        "dirty-sync-count": migration.convergence.passes,
        "mbps": sent * 8 / seconds / 1e6,
        "pages-per-second": int(pages / seconds),
        "postcopy-requests": int(stats.requests),
        "precopy-bytes": precopy,
        "downtime-bytes": downtime,
        "postcopy-bytes": sent - precopy - downtime if in_postcopy else 0,
        "multifd-bytes": 0,
        "dirty-sync-missed-zero-copy": 0,
    }


def _ours(migration: OutgoingMigration) -> Mapping[str, Json]:
    """Figures that QEMU has no name for; experimental."""
    stats = migration.pump.stats
    info: dict[str, Json] = {
        "background-pages": int(stats.background_pages),
        "urgent-pages": int(stats.urgent_pages),
        "neighbour-pages": int(stats.neighbour_pages),
        "urgent-pages-on-preempt": int(stats.urgent_on_preempt),
        "late-requests": int(stats.requests_late),
        "background-waits": int(stats.background_waits),
        "background-pauses": int(stats.background_pauses),
        "hole-pages": int(stats.hole_pages),
        "fault-phases": {
            name: histogram(ffi.addressof(stats, name)) for name in ("queue", "send")
        },
        "window": migration.pump.window_bytes,
        "round-trip": migration.pump.round_trip_ns,
        "time-before-postcopy": _ms(migration.times.begun, migration.times.handed_over),
        "downtime-parts": migration.times.downtime_parts_ms(),
        "converging": migration.convergence.hopeful,
        "dirty-tracking": migration.tracking.how,
        "peer-is-dstd": migration.peer.is_dstd,
    }
    if migration.parked:
        info |= {
            "requested-pages": int(stats.urgent_pages) - int(stats.neighbour_pages),
            "left-out-pages": int(stats.left_out_pages),
            "working-set-pages": int(stats.working_set_pages),
            "verified-regions": migration.pump.verified_regions,
            "awaited-pages": int(stats.awaited_pages),
            "asked-upstream": migration.pump.asked_upstream,
        }
    if not migration.convergence.hopeful:
        info["advice"] = (
            "the guest dirties memory faster than max-bandwidth carries it away:"
            " raise max-bandwidth or downtime-limit, or start postcopy"
        )
    return info


def _ms(begin: float, end: float) -> int:
    return int((end - begin) * 1000) if begin and end else 0
