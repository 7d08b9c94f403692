"""Many migrations in a row; postcopy begins at random moments.

A failure names the seed's number, which is all it takes to do it again.
"""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest
from support.daemons import (
    POSTCOPY,
    PREEMPT,
    Destination,
    Source,
    assert_unharmed,
    move_postcopy,
    prepare,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.soak, pytest.mark.kvm, pytest.mark.userfaultfd]

# Of each kind of guest; `make soak SEEDS=50` for more.
SEEDS = int(os.environ.get("SEEDS") or 20)
FEW_SEEDS = max(1, SEEDS // 4)

MIB = 1 << 20
# Where the switch may fall: from before the first page to the second pass.
LATEST_SWITCH = 300 * MIB
BANDWIDTH = 400 * MIB
# So that the guest meets missing pages, unless next to nothing was left.
POSTCOPY_BANDWIDTH = 200 * MIB
NEXT_TO_NOTHING = 2000  # pages


def migrate_once(directory: Path, seed: int, *arguments: str, preempt: bool) -> None:
    with (
        Source(directory, "--memory", *arguments) as src,
        Destination(directory, "--memory", *arguments) as dst,
    ):
        before = src.wait_filled()
        prepare(src, dst, *(PREEMPT if preempt else POSTCOPY))
        src.set_parameters(
            max_bandwidth=BANDWIDTH,
            max_postcopy_bandwidth=POSTCOPY_BANDWIDTH,
            downtime_limit=0,
        )
        switch = random.Random(seed).randrange(LATEST_SWITCH)
        move_postcopy(src, dst, after_bytes=switch)
        assert src.wait_status("completed") == dst.wait_status("completed")
        report = assert_unharmed(dst, before)
        assert report.written > before.written, "the guest was not under write load"
        ours, theirs = src.ours, dst.ours
        assert theirs["duplicate-pages"] == 0
        assert theirs["preempt-pages"] == (ours["urgent-pages"] if preempt else 0)
        if theirs["postcopy-pages"] > NEXT_TO_NOTHING:
            assert ours["urgent-pages"] > 0


@pytest.mark.parametrize("seed", range(SEEDS))
def test_256_mib(private_dir: Path, seed: int) -> None:
    migrate_once(private_dir, seed, "256M", preempt=bool(seed % 2))


@pytest.mark.parametrize("seed", range(FEW_SEEDS))
def test_4_vcpus(private_dir: Path, seed: int) -> None:
    migrate_once(private_dir, seed, "256M", "--vcpus", "4", preempt=bool(seed % 2))


@pytest.mark.hugepages
@pytest.mark.parametrize("seed", range(FEW_SEEDS))
def test_huge_pages(
    private_dir: Path, reserve_hugepages: Callable[[int], None], seed: int
) -> None:
    reserve_hugepages(2 * 128)
    migrate_once(private_dir, seed, "256M", "--hugepages", "2M", preempt=bool(seed % 2))


@pytest.mark.alone
def test_12_gib(private_dir: Path) -> None:
    """Two thirds of it filled: both copies have to fit into this machine."""
    with (
        Source(private_dir, "--memory", "12G", "--append", "area=7G") as src,
        Destination(private_dir, "--memory", "12G") as dst,
    ):
        before = src.wait_filled(seconds=300)
        prepare(src, dst, *PREEMPT)
        src.set_parameters(max_bandwidth=0)
        move_postcopy(src, dst, after_bytes=2 << 30)
        assert_unharmed(dst, before)
        assert src.ours["urgent-pages-on-preempt"] > 0
        for side in (src, dst):
            assert side.own_memory() < 64 * MIB
