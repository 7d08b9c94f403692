"""A real guest moves between two real daemons, in every way there is.

The guest's memory proves the result; the counters prove the way it went.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.daemons import (
    POSTCOPY,
    PREEMPT,
    Destination,
    Source,
    assert_unharmed,
    move_postcopy,
    move_precopy,
    prepare,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.report import Report

pytestmark = [pytest.mark.userfaultfd]

MIB = 1 << 20
# Slow enough that the guest meets pages that are not there yet.
SLOW = 200 * MIB


def test_precopy(private_dir: Path) -> None:
    with (
        Source(private_dir, "--memory", "256M", "--append", "write-rate=20M") as src,
        Destination(private_dir, "--memory", "256M") as dst,
    ):
        before = src.wait_filled()
        prepare(src, dst)
        src.set_parameters(max_bandwidth=0)
        move_precopy(src, dst)
        assert src.statuses == ["setup", "active", "device", "completed"]
        assert dst.statuses == ["setup", "active", "completed"]
        ram = src.query()["ram"]
        assert ram["dirty-sync-count"] >= 2, "no second pass over memory"
        assert ram["remaining"] == 0
        assert dst.ours["faults"] == 0
        assert_unharmed(dst, before)
        assert src.execute("query-status")["status"] == "postmigrate"


VARIANTS = {
    "plain": ((), POSTCOPY, ()),
    "preempt": ((), PREEMPT, ()),
    "preempt-4-vcpus": (("--vcpus", "4"), PREEMPT, ()),
    "preempt-process": (("--accel", "process"), PREEMPT, ()),
    "plain-copy": ((), POSTCOPY, ("--place", "copy")),
    "preempt-copy": ((), PREEMPT, ("--place", "copy")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_postcopy(private_dir: Path, variant: str) -> None:
    both, capabilities, only_destination = VARIANTS[variant]
    with (
        Source(private_dir, "--memory", "256M", *both) as src,
        Destination(private_dir, "--memory", "256M", *both, *only_destination) as dst,
    ):
        before = src.wait_filled()
        prepare(src, dst, *capabilities)
        src.set_parameters(max_postcopy_bandwidth=SLOW)
        move_postcopy(src, dst, after_bytes=random.Random(variant).randrange(40 * MIB))
        assert src.statuses == [
            "setup",
            "active",
            "device",
            "postcopy-active",
            "completed",
        ]
        assert dst.statuses == ["setup", "active", "postcopy-active", "completed"]
        after = assert_unharmed(dst, before)
        assert len(after.vcpus) == len(before.vcpus)
        assert_urgent_pages(src, dst, preempt=capabilities is PREEMPT)
        assert dst.ours["way"] == ("copy" if only_destination else "continue")


def assert_urgent_pages(src: Source, dst: Destination, *, preempt: bool) -> None:
    """Urgent pages went where they should, and nobody waited for them there."""
    ours, theirs, ram = src.ours, dst.ours, src.query()["ram"]
    assert ours["peer-is-dstd"]
    assert ram["postcopy-requests"] == theirs["requests"] > 0
    assert ours["urgent-pages"] > 0
    assert theirs["duplicate-pages"] == 0
    assert theirs["postcopy-pages"] == ours["urgent-pages"] + ours["background-pages"]
    assert ours["urgent-pages-on-preempt"] == (ours["urgent-pages"] if preempt else 0)
    assert theirs["preempt-pages"] == ours["urgent-pages-on-preempt"]
    if preempt:
        # COMMIT goes over main as well, and the pump may meet it; no page does.
        assert ours["background-waits"] <= 1
    info = dst.query()
    faulted = sum(info["postcopy-latency-dist"])
    # Two vCPUs may wait for one page.
    assert 0 < faulted <= theirs["requests"] + theirs["faults-on-pages-asked-for"]
    assert info["postcopy-latency"] > 0
    assert max(info["postcopy-vcpu-latency"]) > 0
    # Each part of a fault was measured, and the stream was bounded by answers.
    for parts in (ours["fault-phases"], theirs["fault-phases"]):
        assert all(part["count"] > 0 and part["mean"] > 0 for part in parts.values())
    assert ours["round-trip"] > 0
    assert ours["background-pauses"] > 0
    assert info["postcopy-blocktime"] <= max(info["postcopy-vcpu-blocktime"])


def test_memory_is_prepared_and_never_more_than_there_was(private_dir: Path) -> None:
    """Half of the guest was never touched, the other half is full of data."""
    half = ("--memory", "512M", "--append", "area=256M")
    with (
        Source(private_dir, *half) as src,
        Destination(private_dir, "--memory", "512M") as dst,
    ):
        before = src.wait_filled()
        prepare(src, dst, *PREEMPT)
        move_postcopy(src, dst)
        assert_unharmed(dst, before)
        # All of it, or what was quicker than the pages: never what is empty.
        assert 0 < dst.ours["prepared-bytes"] <= 256 * MIB
        ram = src.query()["ram"]
        assert ram["normal"] + ram["duplicate"] < 1.1 * 256 * MIB / 4096
        assert guest_memory(dst) <= 1.05 * guest_memory(src)


def guest_memory(side: Source | Destination) -> int:
    """Bytes of guest RAM that hold memory, all behind descriptors of the VMM."""
    children = Path(f"/proc/{side.process.pid}/task/{side.process.pid}/children")
    return max(
        file.stat().st_blocks * 512
        for pid in [side.process.pid, *map(int, children.read_text().split())]
        for file in Path(f"/proc/{pid}/fd").iterdir()
        if "memfd:" in str(file.readlink())
    )


@pytest.mark.hugepages
@pytest.mark.parametrize("place", ["auto", "copy"])
@pytest.mark.parametrize("capabilities", [(), POSTCOPY, PREEMPT], ids=len)
def test_huge_pages(
    private_dir: Path,
    reserve_hugepages: Callable[[int], None],
    capabilities: tuple[str, ...],
    place: str,
) -> None:
    reserve_hugepages(2 * 64)
    huge = ("--memory", "128M", "--hugepages", "2M")
    with (
        Source(private_dir, *huge) as src,
        Destination(private_dir, *huge, "--place", place) as dst,
    ):
        before = src.wait_filled()
        prepare(src, dst, *capabilities)
        src.set_parameters(max_bandwidth=0, max_postcopy_bandwidth=SLOW)
        if capabilities:
            move_postcopy(src, dst)
            assert dst.ours["requests"] > 0
            assert src.ours["urgent-pages"] % 512 == 0, "a part of a huge page was sent"
        else:
            move_precopy(src, dst)
        assert_unharmed(dst, before)


def test_a_paused_guest_arrives_paused(private_dir: Path) -> None:
    with (
        Source(private_dir, "--memory", "128M") as src,
        Destination(private_dir, "--memory", "128M") as dst,
    ):
        src.wait_filled()
        src.execute("stop")
        before = src.report()
        prepare(src, dst)
        src.set_parameters(max_bandwidth=0)
        move_precopy(src, dst)
        assert dst.execute("query-status")["status"] == "paused"
        assert dst.report().counter == before.counter
        dst.execute("cont")
        assert_unharmed(dst, before)


def test_cancel_leaves_the_guest_running(private_dir: Path) -> None:
    with Source(private_dir, "--memory", "256M") as src:
        before = src.wait_filled()
        with Destination(private_dir, "--memory", "256M", name="first") as dst:
            prepare(src, dst, *PREEMPT)
            src.set_parameters(max_bandwidth=8 * MIB)
            src.migrate(dst.listen())
            src.wait_status("active")
            src.execute("migrate_cancel")
            assert src.wait_status("cancelled") == "cancelled"
            assert src.statuses == ["setup", "active", "cancelling", "cancelled"]
            assert dst.wait_status("failed") == "failed"
            assert src.execute("query-status")["running"]
            assert_still_there(src, before)
        with Destination(private_dir, "--memory", "256M", name="second") as dst:
            dst.set_capabilities(*PREEMPT)
            src.set_parameters(max_bandwidth=0)
            move_postcopy(src, dst, after_bytes=8 * MIB)
            assert_unharmed(dst, before)


def assert_still_there(src: Source, before: Report) -> None:
    after = src.wait_report(lambda r: r.counter > before.counter + 1000)
    assert after.wrong == 0


def test_a_busy_guest_converges(private_dir: Path) -> None:
    """100 MB/s of writes under the default bandwidth: precopy gets there alone."""
    with (
        Source(private_dir, "--memory", "256M", "--append", "write-rate=100M") as src,
        Destination(private_dir, "--memory", "256M") as dst,
    ):
        before = src.wait_filled()
        prepare(src, dst)
        move_precopy(src, dst)
        info = src.query()
        assert info["ram"]["dirty-sync-count"] >= 2
        assert (
            info["downtime"]
            < 2 * src.execute("query-migrate-parameters")["downtime-limit"]
        )
        assert_unharmed(dst, before)


def test_a_hopeless_precopy_says_so(private_dir: Path) -> None:
    with (
        Source(private_dir, "--memory", "64M") as src,
        Destination(private_dir, "--memory", "64M") as dst,
    ):
        before = src.wait_filled()
        prepare(src, dst, *PREEMPT)
        src.set_parameters(max_bandwidth=100 * MIB, downtime_limit=1)
        src.migrate(dst.listen())
        src.wait_status("active")
        while src.ours["converging"]:
            src.qmp.wait_event("MIGRATION_PASS", 30)
        ours = src.ours
        assert "start postcopy" in ours["advice"]
        assert src.query()["ram"]["dirty-pages-rate"] > 0
        assert src.query()["expected-downtime"] > 1
        src.execute("migrate-start-postcopy")
        assert src.wait_status("completed", "failed") == "completed"
        dst.wait_status("completed")
        assert_unharmed(dst, before)


def test_without_tracking_every_page_counts_as_dirty(private_dir: Path) -> None:
    """A kernel or a VMM that cannot tell; postcopy gets the guest away all the same."""
    with (
        Source(private_dir, "--memory", "128M", "--dirty-tracking", "none") as src,
        Destination(private_dir, "--memory", "128M") as dst,
    ):
        before = src.wait_filled()
        prepare(src, dst, *PREEMPT)
        src.set_parameters(downtime_limit=1)
        src.migrate(dst.listen())
        src.wait_status("active")
        while src.ours["converging"]:
            src.qmp.wait_event("MIGRATION_PASS", 30)
        assert src.ours["dirty-tracking"].startswith("none")
        src.execute("migrate-start-postcopy")
        assert src.wait_status("completed", "failed") == "completed"
        dst.wait_status("completed")
        assert_unharmed(dst, before)


@pytest.mark.alone
def test_each_daemon_stays_small(private_dir: Path) -> None:
    """12 GiB of guest, most of it never touched: 64 MiB for a daemon's own."""
    with (
        Source(private_dir, "--memory", "12G", "--append", "area=256M") as src,
        Destination(private_dir, "--memory", "12G") as dst,
    ):
        before = src.wait_filled()
        prepare(src, dst, *PREEMPT)
        src.set_parameters(max_bandwidth=0)
        move_postcopy(src, dst, after_bytes=1)
        assert_unharmed(dst, before)
        ram = src.query()["ram"]
        # What was never touched is told in a layout, not sent page by page.
        assert ram["normal"] + ram["duplicate"] < 0.05 * 12 * 1024 * 256
        for side in (src, dst):
            assert side.own_memory() < 64 * MIB
