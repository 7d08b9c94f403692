"""Waiting times from the guest's histograms, and what a process has used."""

from __future__ import annotations

import os

import account
import guest
import pytest
from support.report import BUCKETS, Report, VcpuReport, bucket_of

KHZ = 1_000_000  # a microsecond has 1000 ticks


def report(*accesses_us):
    """A guest with one vCPU that has made accesses of these lengths."""
    ticks = [us * KHZ // 1000 for us in accesses_us]
    histogram = [0] * BUCKETS
    for length in ticks:
        histogram[bucket_of(length)] += 1
    zeroes = ("counter", "checked", "wrong", "written", "filled", "sweeps")
    vcpu = VcpuReport(
        **dict.fromkeys(zeroes, 0),
        **{"state": "running", "slice_first": 0, "slice_pages": 1},
        first_wrong=None,
        slowest_ticks=max(ticks, default=0),
        **{"slowest_page": 0, "slow_count": 0, "slow": ()},
        histogram=tuple(histogram),
    )
    return Report(
        **{"tsc_khz": KHZ, "area_offset": 0, "area_pages": 1, "table_offset": 0},
        **{"seed": 1, "write_rate": 0, "mode": "reading", "filled": True},
        vcpus=(vcpu,),
    )


def test_only_accesses_between_the_reports_that_waited_count() -> None:
    before, after = report(1, 70), report(1, 70, 2, 15, 100, 300)
    found = guest.latency(before, after)
    assert found is not None
    assert found.accesses == 2
    assert found.max == 300
    assert found.p50 == pytest.approx(100, rel=1 / 8)
    assert found.mean == pytest.approx(200, rel=1 / 8)


def test_no_percentile_is_longer_than_the_longest() -> None:
    found = guest.latency(report(), report(*[1000] * 10))
    assert found is not None
    assert found.p99 == found.max == 1000


def test_another_bound() -> None:
    found = guest.latency(report(), report(100, 2000), at_least=900)
    assert found is not None
    assert found.accesses == 1
    assert guest.latency(report(), report(100), at_least=900) is None


def test_cpu_time_of_a_process_without_vcpus() -> None:
    usage = account.Usage([os.getpid()])
    begun = os.times()
    while os.times().user - begun.user < 0.05:
        pass
    own, vcpus = usage.end()
    assert own >= 0.04
    assert vcpus == 0


def test_own_memory_grows_with_anonymous_memory() -> None:
    before = account.own_bytes(os.getpid())
    data = bytearray(os.urandom(32 << 20))
    assert account.own_bytes(os.getpid()) - before > len(data) * 3 // 4
