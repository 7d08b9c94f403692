"""The link is cut ten times on the way in and on the way out; nothing is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.parking import (
    FAST,
    Workshop,
    both_complete,
    end,
    postcopy_in,
    postcopy_out,
    recover,
    wait_for_pages,
    wait_status,
)
from support.qemu import QemuError, QemuProcess
from support.relay import Relay

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.linux, pytest.mark.userfaultfd]

CUTS = 10
PAUSED = "postcopy-paused"
NOTICED = 10.0  # seconds


def wait_paused(side: Any) -> None:
    """A QEMU may not notice by itself; then it is told, as the runbook has it."""
    if not isinstance(side, QemuProcess):
        return wait_status((side,), PAUSED)
    try:
        side.wait_status(PAUSED, NOTICED)
    except QemuError:
        side.pause()
        side.wait_status(PAUSED)


def cut_and_recover(relay: Relay, source: Any, destination: Any) -> None:
    """Ten times: half of them cleanly closed, half of them reset."""
    for number in range(CUTS):
        wait_for_pages(source)
        for link in relay.links:
            link.reset() if number % 2 else link.close()
        relay.links.clear()
        for side in (source, destination):
            wait_paused(side)
        recover(source, destination, relay)
        assert relay.links


@postcopy_in
def test_on_the_way_in(private_dir: Path, version: str, into: str) -> None:
    with Workshop(private_dir, version=version) as shop, Relay() as relay:
        with shop.arriving(into, relay) as (guest, dstd):
            cut_and_recover(relay, guest, dstd)
            guest.set_parameters(max_postcopy_bandwidth=FAST)
            both_complete(guest, dstd)
        end(guest)
        before = guest.console()
        shop.serve("lazy").wait_continued(before)


@postcopy_out
def test_on_the_way_out(private_dir: Path, version: str, out: str) -> None:
    with Workshop(private_dir, version=version) as shop, Relay() as relay:
        before = shop.boot_parked("precopy")
        with shop.leaving(out, relay) as (srcd, guest):
            cut_and_recover(relay, srcd, guest)
            srcd.set_parameters(max_postcopy_bandwidth=FAST)
            both_complete(srcd, guest)
        guest.wait_continued(before)
