"""One directory for several guests: clones, forks, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.parking import OUT, Workshop, both_complete

from common.qmp.client import CommandFailed

if TYPE_CHECKING:
    from pathlib import Path

    from support.linux_guest import Console, LinuxGuest

pytestmark = [pytest.mark.qemu, pytest.mark.linux, pytest.mark.userfaultfd]

LINK = 50 << 20  # bytes per second; serving both takes a while


def serve_two(shop: Workshop) -> list[LinuxGuest]:
    """At once, each by a srcd of its own."""
    options, capabilities = OUT["lazy"]
    clones = [shop.clone(*capabilities) for _ in range(2)]
    with (
        shop.server("--clone", *options) as first,
        shop.server("--clone", *options) as second,
    ):
        servers = [first, second]
        for srcd, clone in zip(servers, clones, strict=True):
            srcd.set_parameters(max_postcopy_bandwidth=LINK)
            srcd.migrate(clone.listen())
        for srcd in servers:
            srcd.wait_status("postcopy-active")
        for srcd, clone in zip(servers, clones, strict=True):
            both_complete(srcd, clone)
    return clones


def assert_goes_on(clone: LinuxGuest, parked_at: Console) -> None:
    """Its own console begins where that of the parked guest was."""
    start = clone.console()
    said = clone.wait_continued(start)
    assert parked_at.counts[-1] <= said.counts[0] <= parked_at.counts[-1] + 2


def test_two_at_once(private_dir: Path) -> None:
    with Workshop(private_dir, disk=False) as shop:
        parked_at = shop.boot_parked("precopy")
        for clone in serve_two(shop):
            assert_goes_on(clone, parked_at)
        # Clones leave no mark: the guest itself can still run.
        shop.serve("lazy").wait_continued(parked_at)


def test_second_run_is_refused(private_dir: Path) -> None:
    """The VM belongs to the QEMU that it has gone to."""
    with Workshop(private_dir) as shop:
        before = shop.boot_parked("precopy")
        running = shop.serve("lazy")
        with pytest.raises((RuntimeError, CommandFailed), match="--clone"):
            shop.serve("lazy")
        running.wait_continued(before)


def test_fork_of_a_running_guest(private_dir: Path) -> None:
    """A snapshot that QEMU takes in the background becomes two more guests."""
    with Workshop(private_dir, disk=False) as shop:
        original = shop.boot()
        before = original.console()
        original.set_capabilities("background-snapshot")
        with shop.parker() as dstd:
            original.set_parameters(max_bandwidth=0)
            original.migrate(dstd.listen())
            both_complete(original, dstd)
        assert original.execute("query-status")["running"]
        clones = serve_two(shop)
        for guest in (original, *clones):
            guest.wait_continued(before if guest is original else guest.console())
        after = original.console()
        for clone in clones:
            assert before.counts[-1] <= clone.console().counts[0] <= after.counts[-1]
