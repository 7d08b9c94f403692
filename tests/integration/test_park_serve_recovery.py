"""srcd serves a parked VM and is cut off, or killed: it goes on from there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.daemons import Destination
from support.parked_machine import (
    COUNTED,
    CRAWL,
    EVERYWHERE,
    FAST,
    PAUSED,
    Place,
    assert_unharmed,
    complete,
    copied,
    start_slowly,
    wait_for_requests,
)
from support.preempt_thread import NAMED_THREADS, wait_reads_preempt

from common.qmp.client import CommandFailed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.userfaultfd]


@pytest.mark.parametrize(("version", "mode"), EVERYWHERE)
def test_recovery(
    originals: dict[str, Path], private_dir: Path, version: str, mode: str
) -> None:
    place = copied(originals, version, private_dir)
    with place.server() as srcd, place.machine(*NAMED_THREADS) as qemu:
        start_slowly(srcd, qemu, mode)
        for number in range(2):
            wait_for_requests(srcd, COUNTED // 4)
            (srcd.execute("migrate-pause") if number else qemu.pause())
            for side in (srcd, qemu):
                side.wait_status(PAUSED)
            uri = f"unix:{private_dir}/again-{number}"
            qemu.recover(uri)
            srcd.execute("migrate", uri=uri, resume=True)
            for side in (srcd, qemu):
                side.wait_status("postcopy-active")
            if mode == "preempt":
                wait_reads_preempt(qemu)
        srcd.set_parameters(max_postcopy_bandwidth=FAST)
        complete(srcd, qemu)
        assert_unharmed(place, qemu)


@pytest.mark.parametrize(("version", "mode"), EVERYWHERE)
def test_server_is_killed(
    originals: dict[str, Path], private_dir: Path, version: str, mode: str
) -> None:
    """What is in the directory, and what QEMU says that it has, is enough."""
    place = copied(originals, version, private_dir)
    with place.machine() as qemu:
        with place.server() as srcd:
            start_slowly(srcd, qemu, mode)
            wait_for_requests(srcd, COUNTED // 2)
            srcd.process.kill()
            srcd.process.wait()
        qemu.wait_status(PAUSED)
        with place.server(name="next") as srcd:
            assert srcd.query()["status"] == PAUSED
            srcd.set_parameters(max_postcopy_bandwidth=0)
            with pytest.raises(CommandFailed):
                srcd.migrate("tcp:127.0.0.1:1")
            uri = f"unix:{private_dir}/again"
            qemu.recover(uri)
            srcd.execute("migrate", uri=uri, resume=True)
            qemu.wait_status("postcopy-active")
            complete(srcd, qemu)
            assert_unharmed(place, qemu)
            on_preempt = srcd.ours["urgent-pages"] if mode == "preempt" else 0
            assert srcd.ours["urgent-pages-on-preempt"] == on_preempt
    with pytest.raises(RuntimeError, match=r"runs elsewhere.*--clone"), place.server():
        pass


def test_server_is_killed_before_dstd_has_all(place: Place) -> None:
    """The next one knows that dstd has to get every page, zero or not."""
    other = Place(place.folder, place.folder / "other")
    with Destination(place.folder, "--park", str(other.parked)) as dstd:
        dstd.set_capabilities()
        with place.server() as srcd:
            srcd.set_parameters(max_postcopy_bandwidth=CRAWL)
            srcd.migrate(dstd.listen())
            srcd.wait_status("postcopy-active")
            srcd.process.kill()
            srcd.process.wait()
        dstd.wait_status(PAUSED)
        with place.server(name="next") as srcd:
            uri = f"unix:{place.folder}/again"
            dstd.execute("migrate-recover", uri=uri)
            srcd.set_parameters(max_postcopy_bandwidth=0)
            srcd.execute("migrate", uri=uri, resume=True)
            assert srcd.wait_status("completed", "failed") == "completed", srcd.said
            assert dstd.wait_status("completed", "failed") == "completed"
            assert srcd.ours["left-out-pages"] == 0
    assert (other.parked / "checksums").read_bytes() == (
        place.parked / "checksums"
    ).read_bytes()
