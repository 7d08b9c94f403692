"""An incoming migration as `query-migrate` shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from common.status import MigrationStatus as M

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.qmp.message import Json
    from dstd.fault import Memory
    from dstd.incoming import IncomingMigration

_POSTCOPY: Final = frozenset(
    {M.POSTCOPY_ACTIVE, M.POSTCOPY_PAUSED, M.POSTCOPY_RECOVER, M.COMPLETED}
)


def migration_info(migration: IncomingMigration) -> Mapping[str, Json]:
    """The reply; fields of QEMU's where it has one, ours under x-postcopyd."""
    status = migration.status.now
    info: dict[str, Json] = {"status": status}
    if migration.error:
        info["error-desc"] = str(migration.error)
    if not migration.over and (addresses := migration.addresses()):
        info["socket-address"] = addresses
    if status in _POSTCOPY and migration.settings.on("postcopy-blocktime"):
        info |= _blocktime(migration.memory)
    info["x-postcopyd"] = _ours(migration.memory)
    return info


def _blocktime(memory: Memory) -> Mapping[str, Json]:
    """QEMU 10.1's figures of what postcopy did to the guest."""
    return {
        "postcopy-blocktime": memory.blocktime_ms(),
        "postcopy-vcpu-blocktime": memory.vcpu_blocktimes_ms(),
        "postcopy-latency": memory.latency_ns(),
        "postcopy-latency-dist": memory.latency_distribution(),
        "postcopy-vcpu-latency": memory.vcpu_latencies_ns(),
        "postcopy-non-vcpu-latency": memory.other_latency_ns(),
    }


def _ours(memory: Memory) -> Mapping[str, Json]:
    """Figures that QEMU has no name for; experimental. Latency in nanoseconds."""
    stats = memory.stats
    return {
        "way": memory.way_name,
        "precopy-pages": int(stats.precopy_pages),
        "postcopy-pages": int(stats.postcopy_pages),
        "preempt-pages": int(stats.preempt_pages),
        "zero-pages": int(stats.zero_pages),
        "duplicate-pages": int(stats.duplicate_pages),
        "faults": int(stats.faults),
        "faults-on-pages-here": int(stats.faults_here),
        "faults-on-pages-asked-for": int(stats.faults_known),
        "requests": memory.requests,
        "prepared-bytes": memory.prepared_bytes,
        "fault-latency": memory.latency(),
        "fault-phases": memory.latency_phases(),
    }
