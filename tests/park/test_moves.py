"""A guest is parked and served in every way, and goes on where it stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import pytest
from support.linux_guest import MEMORY
from support.parking import FAST, INTO, OUT, Workshop, both_complete

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.linux, pytest.mark.userfaultfd]

# Every way in with every way out; a guest goes through several of them, because
# what was served can be parked again.
WAYS = list(product(INTO, OUT))
CHAINS = {
    ("10", "pc"): WAYS[0::2],
    ("10", "q35"): WAYS[1::2],
    ("7.2", "pc"): [("precopy", "lazy"), ("preempt", "preempt")],
    ("7.2", "q35"): [("postcopy", "full"), ("postcopy", "preempt")],
}


@pytest.mark.parametrize(("version", "machine"), CHAINS)
def test_guest_goes_on(private_dir: Path, version: str, machine: str) -> None:
    with Workshop(private_dir, version=version, machine=machine) as shop:
        guest = shop.boot()
        for into, out in CHAINS[version, machine]:
            shop.parked = private_dir / f"{into}-{out}"
            shop.park(guest, into)
            before = guest.console()
            guest = shop.serve(out)
            guest.wait_continued(before)
            shutil.rmtree(shop.parked)


@pytest.mark.parametrize("out", ["lazy", "preempt"])
def test_guest_runs_before_its_memory_is_there(private_dir: Path, out: str) -> None:
    with Workshop(private_dir, machine="q35") as shop:
        before = shop.boot_parked("precopy")
        with shop.leaving(out) as (srcd, guest):
            guest.wait_console(lambda said: len(said.counts) > len(before.counts) + 10)
            found = srcd.query()
            assert found["status"] == "postcopy-active"
            assert found["ram"]["remaining"] > MEMORY // 4
            srcd.set_parameters(max_postcopy_bandwidth=FAST)
            both_complete(srcd, guest)
            ours = srcd.ours
            assert ours["urgent-pages"] > 0
            assert (ours["urgent-pages-on-preempt"] > 0) == (out == "preempt")
        guest.wait_continued(before)


@pytest.mark.parametrize(("out", "arguments"), [("full", ()), ("lazy", ("-S",))])
def test_paused_guest_stays_paused(
    private_dir: Path, out: str, arguments: tuple[str, ...]
) -> None:
    with Workshop(private_dir) as shop:
        guest = shop.boot()
        guest.execute("stop")
        before = guest.console()
        shop.park(guest, "precopy")
        guest = shop.serve(out, arguments=arguments)
        assert not guest.execute("query-status")["running"]
        assert guest.console().counts == before.counts
        guest.execute("cont")
        guest.wait_continued(before)


def test_guest_of_an_older_qemu(private_dir: Path) -> None:
    """The machine's version is what has to be the same."""
    with Workshop(private_dir, version="7.2", machine="pc-i440fx-7.2") as shop:
        before = shop.boot_parked("postcopy")
        shop.kind = replace(shop.kind, version="10")
        guest = shop.serve("preempt")
        assert guest.version == "10"
        guest.wait_continued(before)


def test_two_vcpus(private_dir: Path) -> None:
    with Workshop(private_dir, machine="q35", arguments=("-smp", "2")) as shop:
        before = shop.boot_parked("preempt")
        shop.serve("preempt").wait_continued(before)
