"""What is measured: one row for each case, the same for every contender."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

POSTCOPYD: Final = "postcopyd"
QEMU: Final = "qemu"
LIMIT: Final = "limit"

BOTH: Final = (POSTCOPYD, QEMU)
ALL: Final = (POSTCOPYD, QEMU, LIMIT)
OURS: Final = (POSTCOPYD,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One migration that every contender makes. Sizes in bytes, rates per second."""

    name: str
    memory: int = 1024 * MIB
    used: int = 960 * MIB
    """The guest's area: filled with data before the migration begins."""
    zeroed: bool = False
    """The rest holds memory, too, all of it zeroes; else it was never touched."""
    vcpus: int = 1
    mode: str = "reading"
    """What the guest does: reading (random pages, checked), writing, idle."""
    write_rate: int = 0
    """0: as fast as it can."""
    page_size: int = 4096
    postcopy: bool = True
    """Starts as soon as the migration is active: nearly all pages are owed."""
    preempt: bool = True
    bandwidth: int = 0
    """Limit of pages that nobody asked for; 0: none."""
    link: str = "loopback"
    """loopback, delay (1 ms there and back) or slow (12.5 MB/s, deep buffers)."""
    faulted_us: float = 20.0
    """An access that took so long has waited for a page. Behind a link that is
    nearly its round trip: what is shorter waited for a processor."""
    watched: bool = False
    """Sampled for the picture of pages over time, which the guest notices."""
    contenders: tuple[str, ...] = BOTH


LIMITED: Final = 120_000_000
DELAY: Final[dict[str, Any]] = {"link": "delay", "faulted_us": 900.0}
SLOW: Final[dict[str, Any]] = {
    **{"link": "slow", "faulted_us": 1800.0},
    **{"memory": 128 * MIB, "used": 96 * MIB},  # 8 s on that link
}
FAULTS: Final[dict[str, Any]] = {
    **{"memory": 256 * MIB, "used": 192 * MIB},
    "bandwidth": 20_000_000,
}
EMPTY: Final[dict[str, Any]] = {"used": 16 * MIB, "mode": "idle", "postcopy": False}

# A dozen GiB of QEMU's do not fit: its destination gives memory to pages of
# zeroes, too, so both sides together would hold 24 GiB.
CASES: Final = (
    Case(name="preempt", contenders=ALL),
    Case(name="watched", watched=True, contenders=ALL),
    Case(name="postcopy", preempt=False),
    Case(name="throughput", mode="idle", contenders=ALL),
    Case(name="limited-preempt", bandwidth=LIMITED, contenders=ALL),
    Case(name="limited", bandwidth=LIMITED, preempt=False),
    Case(name="delay-preempt", **DELAY),
    Case(name="delay", **DELAY, preempt=False),
    Case(name="slow-preempt", **SLOW),
    Case(name="slow", preempt=False, **SLOW),
    Case(name="precopy-idle", mode="idle", postcopy=False, contenders=ALL),
    Case(name="precopy-100MB", mode="writing", write_rate=100_000_000, postcopy=False),
    Case(name="huge-preempt", page_size=2 * MIB),
    Case(name="huge", page_size=2 * MIB, preempt=False),
    # Little of it comes unasked, so that nearly all is faulted in.
    Case(name="faults-1", vcpus=1, **FAULTS),
    Case(name="faults-4", vcpus=4, **FAULTS),
    Case(name="faults-8", vcpus=8, **FAULTS),
    Case(name="4GiB", memory=4 * GIB, used=3 * GIB),
    Case(name="12GiB", memory=12 * GIB, used=6 * GIB, contenders=OURS),
    Case(name="untouched-12GiB", memory=12 * GIB, contenders=OURS, **EMPTY),
    Case(name="zero-12GiB", memory=12 * GIB, zeroed=True, contenders=OURS, **EMPTY),
    Case(name="untouched-4GiB", memory=4 * GIB, **EMPTY),
    Case(name="half", used=512 * MIB),
    Case(name="half-zero", used=512 * MIB, zeroed=True),
)


def by_name(name: str) -> Case:
    """KeyError if there is none."""
    return {case.name: case for case in CASES}[name]
