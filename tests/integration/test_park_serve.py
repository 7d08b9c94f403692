"""srcd serves a parked VM to an unmodified QEMU: lazily, at once, by halves."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import counting_guest
from support.daemons import Destination, Source
from support.machine import Machine
from support.parked_machine import (
    COUNTED,
    EMPTY,
    EVERYWHERE,
    FAST,
    MEMORY,
    MODES,
    PAUSED,
    Place,
    assert_on_preempt,
    assert_unharmed,
    both_modes,
    complete,
    copied,
    park,
    park_running,
    start_slowly,
    wait_for_requests,
)
from support.ram import HUGE_PAGE, MIB, PAGE, Block, SharedRam

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.qemu, pytest.mark.userfaultfd]


def wait_for_preempt(srcd: Source) -> None:
    """Until it has found out that there is a preempt channel."""
    while "preempt channel: yes" not in srcd.said:
        assert srcd.query()["status"] == "postcopy-active", srcd.query()


@pytest.mark.parametrize(("version", "mode"), EVERYWHERE)
def test_lazy(
    originals: dict[str, Path], private_dir: Path, version: str, mode: str
) -> None:
    place = copied(originals, version, private_dir)
    before = place.digests()
    with place.server() as srcd, place.machine() as qemu:
        qemu.set_capabilities(*MODES[mode])
        srcd.migrate(qemu.listen())
        complete(srcd, qemu)
        assert_unharmed(place, qemu)
        counted = srcd.ours
        sent = srcd.query()["ram"]
    assert counted["peer-is-dstd"] is False
    assert counted["requested-pages"] > 0
    assert counted["background-pages"] > 0
    assert counted["verified-regions"] == place.regions
    assert_on_preempt(counted, preempt=mode == "preempt")
    # QEMU 7 is done only when all that it asked for is there.
    leaves_out = (version, mode) != ("7.2", "preempt")
    assert (counted["left-out-pages"] > (MEMORY - EMPTY) // PAGE // 2) == leaves_out
    everything = sent["normal"] + sent["duplicate"] + counted["left-out-pages"]
    assert everything >= place.pages
    assert place.marked
    assert place.digests() == before


@both_modes
def test_runs_before_its_memory_is_there(place: Place, mode: str) -> None:
    with place.server() as srcd, place.machine() as qemu:
        start_slowly(srcd, qemu, mode)
        wait_for_requests(srcd, COUNTED // 2)
        assert srcd.query()["ram"]["remaining"] > MEMORY // 4
        srcd.set_parameters(max_postcopy_bandwidth=FAST)
        complete(srcd, qemu)
        assert_unharmed(place, qemu)


@both_modes
def test_zero_page_on_request(place: Place, mode: str) -> None:
    """It is sent to who asks, whether the scan has left it out or not."""
    with place.server() as srcd, place.machine() as qemu:
        start_slowly(srcd, qemu, mode)
        wait_for_requests(srcd, COUNTED // 2)
        if mode == "preempt":
            wait_for_preempt(srcd)
        before, urgent = srcd.query()["ram"]["duplicate"], srcd.ours
        for number in range(8):
            assert qemu.read(MEMORY - (number * 2 + 1) * PAGE, PAGE) == bytes(PAGE)
        assert srcd.query()["ram"]["duplicate"] >= before + 8
        name = "urgent-pages-on-preempt"
        assert (srcd.ours[name] >= urgent[name] + 8) == (mode == "preempt")
        srcd.set_parameters(max_postcopy_bandwidth=FAST)
        complete(srcd, qemu)


@pytest.mark.parametrize("version", ["10", "7.2"])
def test_whole(originals: dict[str, Path], private_dir: Path, version: str) -> None:
    place = copied(originals, version, private_dir)
    with place.server("--restore", "precopy") as srcd, place.machine() as qemu:
        srcd.migrate(qemu.listen())
        complete(srcd, qemu)
        assert "postcopy-active" not in srcd.statuses
        assert_unharmed(place, qemu)
        sent = srcd.query()["ram"]
        assert sent["normal"] + sent["duplicate"] == place.pages
        assert srcd.ours["verified-regions"] == place.regions
    assert place.marked


def test_whole_by_capability(place: Place) -> None:
    with place.server() as srcd, place.machine() as qemu:
        off = [{"capability": "postcopy-ram", "state": False}]
        srcd.execute("migrate-set-capabilities", capabilities=off)
        srcd.migrate(qemu.listen())
        complete(srcd, qemu)
        assert "postcopy-active" not in srcd.statuses
        assert_unharmed(place, qemu)


@pytest.mark.parametrize(
    ("version", "uri"),
    [("10", "file:{}"), ("10", "exec:cat {}"), ("7.2", "exec:cat {}")],
)
def test_into_a_file_that_qemu_loads(
    originals: dict[str, Path], private_dir: Path, version: str, uri: str
) -> None:
    """A QEMU takes it from there without us."""
    place = copied(originals, version, private_dir)
    file = private_dir / "stream"
    with place.server("--restore", "precopy") as srcd:
        srcd.migrate(f"file:{file}")
        end = srcd.wait_status("completed", "failed")
        assert end == "completed", (srcd.query(), srcd.said)
        assert srcd.ours["verified-regions"] == place.regions
    assert place.marked
    with place.machine() as qemu:
        qemu.execute("migrate-incoming", uri=uri.format(file))
        qemu.wait_status("completed")
        assert_unharmed(place, qemu)


@both_modes
def test_half_in_precopy(place: Place, mode: str) -> None:
    with place.server("--restore", "precopy") as srcd, place.machine() as qemu:
        srcd.set_capabilities("postcopy-ram")
        qemu.set_capabilities(*MODES[mode])
        srcd.set_parameters(max_bandwidth=16 * MIB)
        srcd.migrate(qemu.listen())
        srcd.wait_status("active")
        while srcd.query()["ram"]["transferred"] < MIB:
            pass
        srcd.execute("migrate-start-postcopy")
        complete(srcd, qemu)
        assert "postcopy-active" in srcd.statuses
        assert srcd.query()["ram"]["precopy-bytes"] >= MIB
        assert srcd.ours["background-pages"] > 0
        assert_unharmed(place, qemu)


def test_paused_vm(private_dir: Path) -> None:
    """A QEMU that was told so does not run it; lazily none knows by itself."""
    place = Place(private_dir, park("10", private_dir, stopped=True))
    assert place.manifest["run-state"] == "paused"
    with place.server() as srcd, place.machine("-S") as qemu:
        assert "-S" in srcd.said
        qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        complete(srcd, qemu)
        assert qemu.execute("query-status")["status"] in ("paused", "prelaunch")
        qemu.execute("cont")
        assert_unharmed(place, qemu)


RESTORES = {"lazy": ("postcopy-ram",), "preempt": MODES["preempt"], "precopy": ()}
VIRTIO_MEM = (
    *("-object", "memory-backend-ram,id=more,size=256M"),
    *("-device", "virtio-mem-pci,memdev=more,requested-size=0"),
)


def serve(place: Place, qemu: Machine, restore: str) -> None:
    """Into a QEMU that waits, in one of the ways of RESTORES."""
    qemu.set_capabilities(*RESTORES[restore])
    option = "precopy" if restore == "precopy" else "lazy"
    with place.server("--clone", "--restore", option) as srcd:
        srcd.migrate(qemu.listen())
        complete(srcd, qemu)
        counted = srcd.ours
        assert counted["verified-regions"] == place.regions
        assert_on_preempt(counted, preempt=restore == "preempt")


@pytest.mark.parametrize("restore", RESTORES)
def test_early_state(private_dir: Path, restore: str) -> None:
    """virtio-mem tells in front of the pages which of its memory is plugged."""
    with Machine(
        memory=MEMORY, counting=True, arguments=VIRTIO_MEM, maximum="1G"
    ) as qemu:
        qemu.wait_for_counting()
        place = park_running(qemu, private_dir)
    assert b"virtio-mem-device-early" in (place.parked / "early-state").read_bytes()
    with place.machine(*VIRTIO_MEM, maximum="1G") as qemu:
        serve(place, qemu, restore)
        assert_unharmed(place, qemu)


@pytest.mark.hugepages
@pytest.mark.parametrize("restore", RESTORES)
def test_huge_pages(
    private_dir: Path, reserve_hugepages: Callable[[int], None], restore: str
) -> None:
    """Sent whole. How large they are is known of a VM that came in postcopy."""
    reserve_hugepages(2 * MEMORY // HUGE_PAGE)
    with Machine(memory=MEMORY, counting=True, page_size=HUGE_PAGE) as qemu:
        qemu.ram[0].fill(1, HUGE_PAGE)
        qemu.wait_for_counting()
        place = park_running(qemu, private_dir, "postcopy-ram")
    with place.machine(page_size=HUGE_PAGE) as qemu:
        serve(place, qemu, restore)
        assert_unharmed(place, qemu)


@pytest.mark.hugepages
def test_huge_pages_that_came_by_precopy(
    private_dir: Path, reserve_hugepages: Callable[[int], None]
) -> None:
    """Nobody knows that they were: QEMU refuses them, and srcd says what to do."""
    reserve_hugepages(2 * MEMORY // HUGE_PAGE)
    with Machine(memory=MEMORY, counting=True, page_size=HUGE_PAGE) as qemu:
        qemu.ram[0].fill(1, HUGE_PAGE)
        qemu.wait_for_counting()
        place = park_running(qemu, private_dir)
    with place.server() as srcd, place.machine(page_size=HUGE_PAGE) as qemu:
        qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        assert srcd.wait_status("completed", "failed", PAUSED) == "failed"
        assert "with --restore precopy" in srcd.query()["error-desc"]
    assert not place.marked
    with place.machine(page_size=HUGE_PAGE) as qemu:
        serve(place, qemu, "precopy")
        assert_unharmed(place, qemu)


@pytest.mark.parametrize("restore", RESTORES)
def test_image_in_place(private_dir: Path, restore: str) -> None:
    """A file of QEMU's own in which the blocks have places of their own."""
    saved = private_dir / "saved"
    with Machine(memory=MEMORY, counting=True) as qemu:
        qemu.ram[0].fill(1, counting_guest.LAST)
        qemu.wait_for_counting()
        qemu.set_capabilities("mapped-ram")
        qemu.set_parameters(max_bandwidth=FAST)
        qemu.migrate(f"file:{saved}")
        qemu.wait_status("completed")
    place = Place(private_dir, private_dir / "parked")
    words = [str(Path(sys.executable).with_name("srcd")), "import"]
    subprocess.run([*words, str(saved), str(place.parked)], check=True)
    assert any(block["offset"] for block in place.manifest["blocks"])
    with place.machine() as qemu:
        serve(place, qemu, restore)
        assert_unharmed(place, qemu)


def test_many_blocks(private_dir: Path) -> None:
    """Each takes several descriptors, and a process begins with few."""
    blocks = [Block(f"block-{number}", PAGE) for number in range(100)]
    with contextlib.ExitStack() as stack:
        rams = [SharedRam(block) for block in blocks]
        words = []
        for ram in rams:
            stack.callback(ram.close)
            ram.bytes[0] = 1
            words += ["--ram", f"{ram.block.name}=/proc/{os.getpid()}/fd/{ram.fd}"]
        srcd = stack.enter_context(Source(private_dir, *words))
        place, other = (Place(private_dir, private_dir / name) for name in "ab")
        dstd = stack.enter_context(
            Destination(private_dir, "--park", str(place.parked))
        )
        for side in (srcd, dstd):
            side.set_capabilities()
        srcd.migrate(dstd.listen())
        assert dstd.wait_status("completed", "failed") == "completed", dstd.said
    few = ("sh", "-c", 'ulimit -Sn 256; exec "$@"', "sh")
    with (
        place.server(wrapper=few) as srcd,
        Destination(private_dir, "--park", str(other.parked), wrapper=few) as dstd,
    ):
        dstd.set_capabilities()
        srcd.migrate(dstd.listen())
        assert srcd.wait_status("completed", "failed", PAUSED) == "completed", srcd.said
    assert other.regions == len(blocks)


@pytest.mark.parametrize("restore", ["lazy", "precopy"])
def test_to_another_directory(place: Place, restore: str) -> None:
    """dstd counts pages: it gets every one, and has the same VM then."""
    other = Place(place.folder, place.folder / "other")
    with (
        place.server("--restore", restore) as srcd,
        Destination(place.folder, "--park", str(other.parked)) as dstd,
    ):
        dstd.set_capabilities()
        srcd.migrate(dstd.listen())
        assert srcd.wait_status("completed", "failed", PAUSED) == "completed", srcd.said
        assert dstd.wait_status("completed", "failed") == "completed"
        assert srcd.ours["peer-is-dstd"] is True
        assert srcd.ours["left-out-pages"] == 0
    for name in ("configuration", "device-state", "checksums"):
        there = (other.parked / name).read_bytes()
        assert there == (place.parked / name).read_bytes(), name
