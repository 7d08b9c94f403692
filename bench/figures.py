"""What one run of one contender gives: the unit of every figure in one place."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(slots=True, kw_only=True)
class Latency:
    """Guest-seen accesses that faulted, in microseconds.

    `counts` is a histogram: (upper end of the bucket in microseconds, accesses).
    """

    accesses: int
    p50: float
    p90: float
    p99: float
    mean: float
    max: float
    counts: list[tuple[float, int]]


@dataclass(slots=True, kw_only=True)
class Process:
    """One process of a contender, over the migration alone."""

    cpu_seconds: float
    """User and system time of all its threads but the guest's vCPUs."""
    vcpu_seconds: float
    own_bytes: int
    """Memory besides guest RAM: anonymous and file pages."""


@dataclass(slots=True, kw_only=True)
class Figures:
    """One migration. What a contender cannot know is None."""

    contender: str
    case: str
    moved_bytes: int
    """Guest pages with data that went over; the base of throughput and CPU per GiB."""
    total_seconds: float
    """From `migrate` to both sides being done."""
    moving_seconds: float
    """The phase the case is about: postcopy if it has one, else precopy."""
    latency: Latency | None = None
    downtime_ms: float | None = None
    """As the guest saw it: from the last step at the source to the first after it."""
    processes: dict[str, Process] = field(default_factory=dict)
    """By role: source, destination."""
    allocated_at_source: int | None = None
    allocated_at_destination: int | None = None
    """Bytes of guest RAM that hold memory, afterwards."""
    timeline: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since `migrate`, bytes of guest pages that have arrived)."""
    faults_per_second: float | None = None
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    """Parts of a fault or of the downtime, as the contender itself tells them."""

    @classmethod
    def of(cls, told: dict[str, Any]) -> Figures:
        """From what `asdict` made of it; other members are left out."""
        known = {field.name: told[field.name] for field in fields(cls)}
        known["processes"] = {r: Process(**p) for r, p in told["processes"].items()}
        if told["latency"]:
            known["latency"] = Latency(**told["latency"])
        return cls(**known)

    @property
    def throughput(self) -> float:
        """Bytes per second in the phase the case is about."""
        return self.moved_bytes / self.moving_seconds if self.moving_seconds else 0.0
