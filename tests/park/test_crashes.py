"""A daemon is killed: the guest is where it can go on, and goes on there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.parking import (
    CRAWL,
    FAST,
    OUT,
    Workshop,
    both_complete,
    end,
    postcopy_in,
    postcopy_out,
    recover,
    wait_for_pages,
)

from common.errors import HostError
from common.store.directory import Parked

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.linux, pytest.mark.userfaultfd]


@pytest.mark.parametrize("version", ["10", "7.2"])
def test_dstd_in_precopy(private_dir: Path, version: str) -> None:
    """The guest runs on where it is, and can be parked elsewhere."""
    with Workshop(private_dir, version=version) as shop:
        with shop.arriving("precopy") as (guest, dstd):
            guest.wait_counter("transferred", 1)
            dstd.process.kill()
            guest.wait_status("failed")
        guest.wait_continued(guest.console())
        with pytest.raises(HostError, match="incomplete"):
            Parked.open(shop.parked)
        shop.parked = private_dir / "elsewhere"
        shop.park(guest, "precopy")
        with Parked.open(shop.parked) as parked:
            parked.verify()


@postcopy_out
def test_srcd_while_it_serves(private_dir: Path, version: str, out: str) -> None:
    """Twice; the next one needs nothing but the directory."""
    options, _ = OUT[out]
    with Workshop(private_dir, version=version) as shop:
        before = shop.boot_parked("precopy")
        with shop.leaving(out) as (srcd, guest):
            guest.wait_console(lambda said: len(said.counts) > len(before.counts))
            srcd.process.kill()
            guest.wait_status("postcopy-paused")
        with shop.server_again(*options) as srcd:
            srcd.set_parameters(max_postcopy_bandwidth=CRAWL)
            recover(srcd, guest)
            wait_for_pages(srcd)
            srcd.process.kill()
            guest.wait_status("postcopy-paused")
        with shop.server_again(*options) as srcd:
            recover(srcd, guest)
            srcd.set_parameters(max_postcopy_bandwidth=FAST)
            both_complete(srcd, guest)
        guest.wait_continued(before)


@postcopy_in
def test_dstd_in_postcopy(private_dir: Path, version: str, into: str) -> None:
    """Twice; the next one needs nothing but the directory."""
    with Workshop(private_dir, version=version) as shop:
        with shop.arriving(into) as (guest, dstd):
            before = guest.console()
            dstd.process.kill()
            guest.wait_status("postcopy-paused")
        with shop.parker_again() as dstd:
            assert dstd.query()["status"] == "postcopy-paused", dstd.said
            recover(guest, dstd)
            dstd.process.kill()
            guest.wait_status("postcopy-paused")
        with shop.parker_again() as dstd:
            recover(guest, dstd)
            guest.set_parameters(max_postcopy_bandwidth=FAST)
            both_complete(guest, dstd)
        end(guest)
        shop.serve("lazy").wait_continued(before)
