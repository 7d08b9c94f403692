"""The guest of every contender: how it is told what to do, and what it saw."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Final

from figures import Latency
from support.report import Report, ReportError, bucket_end

if TYPE_CHECKING:
    from cases import Case
    from memory import GuestMemory

FAULTED_US: Final = 20.0
"""An access at least this long has waited for a page.

A hit takes less than 2 us here, a page that is there but not in the page tables
yet 3 to 20 us. From 20 to 40 us there is next to nothing, and above it as many
accesses as the source has had requests.
"""

STEP_SECONDS: Final = 60.0
LOOK_SECONDS: Final = 0.0002

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


def latency(
    before: Report, after: Report, at_least: float = FAULTED_US
) -> Latency | None:
    """The accesses between two reports that faulted; None if there were none.

    Those are the ones that took `at_least` so many microseconds. Percentiles lie
    within a bucket as if its accesses were spread evenly; a bucket is at most
    1/8 wide.
    """
    buckets = _faulted(before, after, at_least)
    accesses = sum(count for _, _, count in buckets)
    if not accesses:
        return None
    longest = _longest(before, after, buckets[-1][1])
    total = sum((low + high) / 2 * count for low, high, count in buckets)
    return Latency(
        accesses=accesses,
        p50=min(_percentile(buckets, 50), longest),
        p90=min(_percentile(buckets, 90), longest),
        p99=min(_percentile(buckets, 99), longest),
        mean=total / accesses,
        max=longest,
        counts=[(high, count) for _, high, count in buckets],
    )


def first_step(memory: GuestMemory, before: Report) -> float:
    """When a vCPU was seen to go on behind `before`, by the wall clock.

    Looks every 0.2 ms; an idle guest takes a step only every 10 ms.
    """
    deadline = time.monotonic() + STEP_SECONDS
    while not _goes_on(memory, before):
        if time.monotonic() > deadline:
            raise TimeoutError("the guest takes no step at the destination")
        time.sleep(LOOK_SECONDS)  # memory has no events
    return time.time()


def _goes_on(memory: GuestMemory, before: Report) -> bool:
    try:
        now = memory.report()
    except ReportError:  # its first page is still to come
        return False
    return any(
        vcpu.counter > then.counter
        for vcpu, then in zip(now.vcpus, before.vcpus, strict=True)
    )


def _faulted(
    before: Report, after: Report, at_least: float
) -> list[tuple[float, float, int]]:
    """(from, to in microseconds, accesses) of each bucket that has any."""
    buckets = []
    counts = zip(before.histogram, after.histogram, strict=True)
    for bucket, (first, last) in enumerate(counts):
        low, high = (after.us(bucket_end(b)) for b in (bucket - 1, bucket))
        if last > first and low >= at_least:
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
