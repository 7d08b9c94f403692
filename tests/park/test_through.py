"""A guest passes through a directory: it runs at the far end while it arrives."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from support.parking import (
    FAST,
    OUT,
    Workshop,
    both_complete,
    end,
    recover,
    wait_status,
)
from support.relay import Relay

from common.store.directory import Parked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.daemons import Destination
    from support.linux_guest import Console, LinuxGuest

pytestmark = [pytest.mark.qemu, pytest.mark.linux, pytest.mark.userfaultfd]

LOOK_SECONDS = 0.01
PATIENCE = 30.0


def here(directory: Path) -> tuple[int, int]:
    """How many pages have arrived, and of how many."""
    block_pages = [
        file.stat().st_size >> 12 for file in sorted(directory.glob("ram-*"))
    ]
    kept = (directory / "kept-received").read_bytes()
    at = count = 0
    for pages in block_pages:
        count += int.from_bytes(kept[at : at + (pages + 7) // 8], "little").bit_count()
        at += 2 * (-(-(pages + 63) // 64 * 8 // 4096) * 4096)
    assert at == len(kept)
    return count, sum(block_pages)


def wait_servable(directory: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (directory / "upstream").exists():
        assert time.monotonic() < deadline
        time.sleep(LOOK_SECONDS)  # a name in a directory


@contextmanager
def arriving(
    shop: Workshop, into: str, relay: Relay | None = None
) -> Iterator[tuple[LinuxGuest, Destination, Console]]:
    """A guest on its way, of which a part can be served, and what it said before."""
    with shop.arriving(into, relay) as (guest, dstd):
        wait_servable(shop.parked)
        yield guest, dstd, guest.console()


def goes_on(guest: LinuxGuest, before: Console, lines: int = 1) -> None:
    guest.wait_console(lambda said: len(said.counts) >= len(before.counts) + lines)


def assert_half_to_come(shop: Workshop, source: Any) -> None:
    """At the source as in the directory."""
    found = source.query()
    assert found["status"] == "postcopy-active"
    count, pages = here(shop.parked)
    assert found["ram"]["remaining"] > pages * 4096 // 2
    assert count < pages // 2


def assert_parked(shop: Workshop, before: Console) -> None:
    """It is whole, and a copy of it goes on from where it was."""
    with Parked.open(shop.parked) as parked:
        parked.verify()
        assert parked.running
    clone = shop.clone("postcopy-ram")
    with shop.server("--clone") as srcd:
        srcd.migrate(clone.listen())
        both_complete(srcd, clone)
    first = clone.wait_console(lambda said: len(said.cycles) >= 2)
    assert before.counts[-1] <= first.counts[0] <= before.counts[-1] + 2


@pytest.mark.parametrize(
    ("into", "out"), [("postcopy", "lazy"), ("preempt", "preempt"), ("preempt", "lazy")]
)
def test_guest_runs_before_it_has_arrived(
    private_dir: Path, into: str, out: str
) -> None:
    with Workshop(private_dir, disk=False) as shop:
        with arriving(shop, into) as (source, dstd, before):
            far = shop.waiting(*OUT[out][1])
            with shop.server() as srcd:
                srcd.migrate(far.listen())
                goes_on(far, before)
                assert_half_to_come(shop, source)
                goes_on(far, before, 30)
                assert srcd.ours["awaited-pages"] > 0
                assert srcd.ours["asked-upstream"] > 0
                assert dstd.ours["requests"] > 0
                assert (dstd.ours["preempt-pages"] > 0) == (into == "preempt")
                source.set_parameters(max_postcopy_bandwidth=FAST)
                both_complete(source, dstd)
                both_complete(srcd, far)
        end(source)
        far.wait_continued(before)
        assert_parked(shop, before)


@pytest.mark.parametrize("into", ["postcopy", "preempt"])
def test_cut_upstream(private_dir: Path, into: str) -> None:
    """The far end waits for pages that are to come, and goes on with them."""
    with Workshop(private_dir, disk=False) as shop, Relay() as relay:
        with arriving(shop, into, relay) as (source, dstd, before):
            far = shop.waiting("postcopy-ram")
            with shop.server() as srcd:
                srcd.migrate(far.listen())
                goes_on(far, before)
                for link in relay.links:
                    link.reset()
                relay.links.clear()
                wait_status((source, dstd), "postcopy-paused")
                assert srcd.query()["status"] == "postcopy-active"
                recover(source, dstd, relay)
                assert_half_to_come(shop, source)
                goes_on(far, far.console(), 10)
                source.set_parameters(max_postcopy_bandwidth=FAST)
                both_complete(source, dstd)
                both_complete(srcd, far)
        end(source)
        far.wait_continued(before)
        assert_parked(shop, before)


def test_daemons_die(private_dir: Path) -> None:
    """The one that fills the directory, then the one that serves it."""
    with Workshop(private_dir, disk=False) as shop:
        with arriving(shop, "postcopy") as (source, dstd, before):
            far = shop.waiting("postcopy-ram")
            with shop.server() as srcd:
                srcd.migrate(far.listen())
                goes_on(far, before)
                dstd.process.kill()
                source.wait_status("postcopy-paused")
                with shop.parker_again() as dstd_again:
                    recover(source, dstd_again)
                    goes_on(far, far.console(), 10)
                    srcd.process.kill()
                    far.wait_status("postcopy-paused")
                    with shop.server_again() as srcd_again:
                        recover(srcd_again, far)
                        goes_on(far, far.console(), 10)
                        assert_half_to_come(shop, source)
                        source.set_parameters(max_postcopy_bandwidth=FAST)
                        both_complete(source, dstd_again)
                        both_complete(srcd_again, far)
        end(source)
        far.wait_continued(before)
        assert_parked(shop, before)


def test_not_by_precopy(private_dir: Path) -> None:
    """Nobody can wait for a page there; nothing wrong is sent, or lost."""
    with Workshop(private_dir, disk=False) as shop:
        with arriving(shop, "postcopy") as (source, dstd, before):
            with pytest.raises(RuntimeError, match="incomplete: the VM still arrives"):
                shop.server("--restore", "precopy").__enter__()
            far = shop.waiting()
            with shop.server() as srcd:
                srcd.execute(
                    "migrate-set-capabilities",
                    capabilities=[{"capability": "postcopy-ram", "state": False}],
                )
                srcd.migrate(far.listen())
                assert srcd.wait_status("completed", "failed") == "failed"
                assert "has not wholly arrived" in srcd.query()["error-desc"]
            source.set_parameters(max_postcopy_bandwidth=FAST)
            both_complete(source, dstd)
        end(source)
        shop.serve("full").wait_continued(before)


def test_not_before_it_is_ours(private_dir: Path) -> None:
    """In precopy the guest runs at its source."""
    with (
        Workshop(private_dir, disk=False) as shop,
        shop.arriving("precopy") as (guest, dstd),
    ):
        with pytest.raises(RuntimeError, match="incomplete: only a part"):
            shop.server().__enter__()
        guest.set_parameters(max_bandwidth=FAST)
        both_complete(guest, dstd)


def test_runs_once(private_dir: Path) -> None:
    """Two that serve it at once are refused, before and after it is complete."""
    with Workshop(private_dir, disk=False) as shop:
        with arriving(shop, "postcopy") as (source, dstd, before):
            with shop.server():
                refusal = "is being served by another process"
                with pytest.raises(RuntimeError, match=refusal):
                    shop.server().__enter__()
                source.set_parameters(max_postcopy_bandwidth=FAST)
                both_complete(source, dstd)
                with pytest.raises(RuntimeError, match=refusal):
                    shop.server().__enter__()
            # It was not taken away, so it is still there to be.
            far = shop.serve("lazy")
        end(source)
        far.wait_continued(before)
        with pytest.raises(RuntimeError, match="runs elsewhere"):
            shop.server().__enter__()


def test_copies_while_it_arrives(private_dir: Path) -> None:
    """One server moves the guest, another one copies it, at the same time."""
    with Workshop(private_dir, disk=False) as shop:
        with arriving(shop, "preempt") as (source, dstd, before):
            copy = shop.clone("postcopy-ram")
            far = shop.waiting("postcopy-ram")
            with shop.server("--clone") as copier, shop.server() as srcd:
                copier.migrate(copy.listen())
                srcd.migrate(far.listen())
                goes_on(far, before)
                copy.wait_console(lambda said: len(said.counts) > 1)
                assert_half_to_come(shop, source)
                source.set_parameters(max_postcopy_bandwidth=FAST)
                both_complete(source, dstd)
                both_complete(srcd, far)
                both_complete(copier, copy)
        end(source)
        copy.wait_console(lambda said: len(said.cycles) >= 2)
        far.wait_console(lambda said: len(said.cycles) >= len(before.cycles) + 2)
