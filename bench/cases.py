"""What is measured: one row for each case, the same for every contender."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One migration that every contender makes. Sizes in bytes, rates per second."""

    name: str
    memory: int = 1024 * MIB
    used: int = 960 * MIB
    """The guest's area: filled with data before the migration begins."""
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
