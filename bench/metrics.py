"""The numbers of the table: how each follows from figures, and medians of them."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cases import GIB, MIB, POSTCOPYD, by_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cases import Case
    from figures import Figures


@dataclass(frozen=True, slots=True)
class Metric:
    """One column. `of` gives None where the figures have no such number."""

    name: str
    unit: str
    of: Callable[[Figures, Case], float | None]


def _latency(name: str) -> Callable[[Figures, Case], float | None]:
    return lambda f, _: getattr(f.latency, name) if f.latency else None


def _cpu(role: str) -> Callable[[Figures, Case], float | None]:
    def seconds_per_gib(f: Figures, _: Case) -> float | None:
        process = f.processes.get(role)
        if process is None or f.moved_bytes < 64 * MIB:
            return None
        return process.cpu_seconds / (f.moved_bytes / GIB)

    return seconds_per_gib


def _own(role: str) -> Callable[[Figures, Case], float | None]:
    return lambda f, _: (
        f.processes[role].own_bytes / MIB if role in f.processes else None
    )


def _faults(f: Figures, _: Case) -> float | None:
    """As the guest saw them; what a contender itself counts is not comparable."""
    if f.latency is None:
        return f.faults_per_second
    return f.latency.accesses / f.moving_seconds


def _cores(f: Figures, _: Case) -> float | None:
    """How many cores the contender and its guest kept busy."""
    used = sum(p.cpu_seconds + p.vcpu_seconds for p in f.processes.values())
    return used / f.total_seconds if used else None


def _held(f: Figures, case: Case) -> float | None:
    """Guest memory at the destination, by that with data at the source."""
    if f.allocated_at_source is None or f.allocated_at_destination is None:
        return None
    data = f.allocated_at_source
    if case.zeroed:
        data = min(data, case.used + case.memory // 1024)
    return f.allocated_at_destination / data


METRICS: Final = {
    metric.name: metric
    for metric in (
        Metric("total", "s", lambda f, _: f.total_seconds),
        Metric("rate", "MB/s", lambda f, _: f.throughput / 1e6),
        Metric("p50", "us", _latency("p50")),
        Metric("p90", "us", _latency("p90")),
        Metric("p99", "us", _latency("p99")),
        Metric("max", "us", _latency("max")),
        Metric("mean", "us", _latency("mean")),
        Metric("faults", "1/s", _faults),
        Metric("downtime", "ms", lambda f, _: f.downtime_ms),
        Metric("cpu-src", "s/GiB", _cpu("source")),
        Metric("cpu-dst", "s/GiB", _cpu("destination")),
        Metric("cores", "", _cores),
        Metric("own-src", "MiB", _own("source")),
        Metric("own-dst", "MiB", _own("destination")),
        Metric("held", "dst/src", _held),
    )
}


@dataclass(slots=True)
class Results:
    """All runs, and what was measured besides."""

    figures: list[Figures] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    round_trips: dict[str, float] = field(default_factory=dict)
    """Of each link that was used, when idle; seconds."""

    def of(self, case: str, contender: str) -> list[Figures]:
        """All its runs."""
        return [f for f in self.figures if (f.case, f.contender) == (case, contender)]

    def median(self, metric: str, case: str, contender: str) -> float | None:
        """None if no run has the number."""
        values = (
            METRICS[metric].of(f, by_name(case)) for f in self.of(case, contender)
        )
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    def phase(self, case: str, group: str, part: str) -> float | None:
        """Median of what postcopyd tells about itself; None if it does not."""
        told = [f.phases.get(group, {}).get(part) for f in self.of(case, POSTCOPYD)]
        known = [value for value in told if value is not None]
        return statistics.median(known) if known else None

    def parts(self, case: str, group: str) -> list[str]:
        """Their names, in order."""
        for figures in self.of(case, POSTCOPYD):
            return list(figures.phases.get(group, {}))
        return []


def distribution(
    histograms: Sequence[Sequence[tuple[float, int]]],
) -> tuple[list[float], list[float]]:
    """Ends of the buckets, and the share of all accesses that is not longer."""
    counts: Counter[float] = Counter()
    for histogram in histograms:
        for end, count in histogram:
            counts[end] += count
    x, y, seen = [], [], 0
    for end in sorted(counts):
        seen += counts[end]
        x.append(end)
        y.append(seen / counts.total())
    return x, y
