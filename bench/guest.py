"""The guest of every contender: how it is told what to do, and what it saw."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Final

from figures import Latency
from support.report import Report, bucket_end

if TYPE_CHECKING:
    from cases import Case

FAULTED_US: Final = 20.0
"""An access at least this long has faulted."""

_MODES: Final = {"reading": ["read-only"], "writing": [], "idle": ["idle"]}

_KVM_CREATE_VM: Final = 0xAE01
_KVM_CREATE_VCPU: Final = 0xAE41
_KVM_GET_TSC_KHZ: Final = 0xAEA3


def line(case: Case) -> str:
    """The guest's command line, but for what the VMM adds."""
    words = [f"area={case.used}", *_MODES[case.mode]]
    if case.write_rate:
        words.append(f"write-rate={case.write_rate}")
    return " ".join(words)


@cache
def tsc_khz() -> int:
    """Speed of a guest's time stamp counter, in kHz, as KVM has it."""
    with ExitStack() as stack:

        def opened(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        kvm = opened(os.open("/dev/kvm", os.O_RDWR))
        vm = opened(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
        vcpu = opened(fcntl.ioctl(vm, _KVM_CREATE_VCPU, 0))
        return fcntl.ioctl(vcpu, _KVM_GET_TSC_KHZ, 0)


def latency(before: Report, after: Report) -> Latency | None:
    """The accesses between two reports that faulted; None if there were none.

    Percentiles lie within a bucket as if its accesses were spread evenly; a
    bucket is at most 1/8 wide.
    """
    buckets = _faulted(before, after)
    accesses = sum(count for _, _, count in buckets)
    if not accesses:
        return None
    total = sum((low + high) / 2 * count for low, high, count in buckets)
    return Latency(
        accesses=accesses,
        p50=_percentile(buckets, 50),
        p90=_percentile(buckets, 90),
        p99=_percentile(buckets, 99),
        mean=total / accesses,
        max=_longest(before, after, buckets[-1][1]),
        counts=[(high, count) for _, high, count in buckets],
    )


def _faulted(before: Report, after: Report) -> list[tuple[float, float, int]]:
    """(from, to in microseconds, accesses) of each bucket that has any."""
    buckets = []
    counts = zip(before.histogram, after.histogram, strict=True)
    for bucket, (first, last) in enumerate(counts):
        low, high = (after.us(bucket_end(b)) for b in (bucket - 1, bucket))
        if last > first and low >= FAULTED_US:
            buckets.append((low, high, last - first))
    return buckets


def _percentile(buckets: list[tuple[float, float, int]], percent: float) -> float:
    left = sum(count for _, _, count in buckets) * percent / 100
    for low, high, count in buckets:
        if left <= count:
            return low + (high - low) * left / count
        left -= count
    return buckets[-1][1]


def _longest(before: Report, after: Report, bound: float) -> float:
    """Exact if it is a vCPU's slowest access so far, else the bucket's end."""
    slowest = [
        after.us(last.slowest_ticks)
        for first, last in zip(before.vcpus, after.vcpus, strict=True)
        if last.slowest_ticks > first.slowest_ticks
    ]
    return max(slowest, default=bound)
