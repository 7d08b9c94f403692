"""srcd serves a parked VM to an unmodified QEMU: lazily, at once, by halves.

The VM is a whole PC whose CPU adds to a word of each of 128 pages, in a circle:
a page that was lost, or is an older one, is out of step with the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import counting_guest
from support.daemons import Destination, Source
from support.machine import MAIN, Machine
from support.mute import MuteDestination
from support.parking import recover
from support.preempt_thread import NAMED_THREADS, wait_reads_preempt
from support.ram import HUGE_PAGE, MIB, PAGE, Block, SharedRam

from common.qmp.client import CommandFailed
from common.store.parked import Parked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = [pytest.mark.qemu, pytest.mark.userfaultfd]

MEMORY = 32 * MIB
COUNTED = (counting_guest.LAST - counting_guest.FIRST) // PAGE
CRAWL = 64 * 1024  # bytes per second: postcopy does not end by itself
FAST = 0
PAUSED = "postcopy-paused"
# Main memory that the CPU leaves alone, and that is all zero.
EMPTY = 24 * MIB

MODES = {
    "plain": ("postcopy-ram",),
    "preempt": ("postcopy-ram", "postcopy-preempt"),
}
both_modes = pytest.mark.parametrize("mode", MODES)
EVERYWHERE = [(version, mode) for version in ("10", "7.2") for mode in MODES]


def park(version: str, folder: Path, *, stopped: bool = False) -> Path:
    """A VM in a directory of its own."""
    parked = folder / "parked"
    with (
        Machine(memory=MEMORY, version=version, counting=True) as qemu,
        Destination(folder, "--park", str(parked)) as dstd,
    ):
        qemu.ram[0].fill(1, counting_guest.LAST)
        qemu.ram[0].bytes[EMPTY:] = bytes(MEMORY - EMPTY)
        qemu.wait_for_counting()
        if stopped:
            qemu.execute("stop")
        dstd.set_capabilities()
        qemu.set_capabilities("return-path")
        qemu.set_parameters(max_bandwidth=FAST)
        qemu.migrate(dstd.listen())
        qemu.wait_status("completed")
        assert dstd.wait_status("completed", "failed") == "completed", dstd.said
    return parked


@pytest.fixture(scope="module")
def originals() -> Iterator[dict[str, Path]]:
    """A parked VM of each version of QEMU, made when it is asked for."""
    with tempfile.TemporaryDirectory(prefix="pc-", dir="/tmp") as path:
        yield Lazily(Path(path))


class Lazily(dict[str, Path]):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, version: str) -> Path:
        folder = self._folder / version
        folder.mkdir()
        self[version] = park(version, folder)
        return self[version]


@dataclass
class Place:
    """A parked VM of a test's own."""

    folder: Path
    parked: Path
    version: str = "10"

    @contextlib.contextmanager
    def server(
        self, *options: str, name: str = "srcd", wrapper: Sequence[str] = ()
    ) -> Iterator[Source]:
        words = ("--parked", str(self.parked), *options)
        with Source(self.folder, *words, name=name, wrapper=wrapper) as srcd:
            if srcd.query().get("status") != PAUSED:
                srcd.set_capabilities()
            srcd.set_parameters(max_bandwidth=FAST)
            yield srcd

    def machine(self, *arguments: str, **more: Any) -> Machine:
        """A QEMU that waits for it."""
        return Machine(
            memory=MEMORY,
            version=self.version,
            counting=True,
            incoming=True,
            arguments=arguments,
            **more,
        )

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.parked / "manifest.json").read_text())
        return found

    @property
    def regions(self) -> int:
        return sum(-(-block["length"] // 65536) for block in self.manifest["blocks"])

    @property
    def pages(self) -> int:
        return sum(block["length"] for block in self.manifest["blocks"]) // PAGE

    def file_of(self, block: str) -> Path:
        (found,) = (b for b in self.manifest["blocks"] if b["name"] == block)
        return self.parked / str(found["file"])

    @property
    def marked(self) -> bool:
        return (self.parked / "running").exists()

    def digests(self) -> dict[str, str]:
        """Of all files but those that serving may make."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.parked.iterdir()
            if path.name not in ("running", "working-set")
        }


def copied(originals: dict[str, Path], version: str, folder: Path) -> Place:
    shutil.copytree(originals[version], folder / "parked")
    return Place(folder, folder / "parked", version)


@pytest.fixture
def place(originals: dict[str, Path], private_dir: Path) -> Place:
    return copied(originals, "10", private_dir)


def assert_unharmed(place: Place, qemu: Machine) -> None:
    """All is there; the guest runs, and all that it does not write is as it was."""
    before = counting_guest.counters(qemu.ram[0].bytes)
    assert any(before), "the counters were lost"
    qemu.wait_for_counting()
    qemu.execute("stop")
    counting_guest.assert_consistent(qemu.ram[0].bytes)
    (block,) = (b for b in place.manifest["blocks"] if b["name"] == MAIN)
    with (place.parked / block["file"]).open("rb") as file:
        file.seek(block["offset"] + counting_guest.LAST)
        rest = block["length"] - counting_guest.LAST
        assert qemu.ram[0].bytes[counting_guest.LAST :] == file.read(rest)


def complete(srcd: Source, qemu: Machine) -> None:
    end = srcd.wait_status("completed", "failed", PAUSED)
    assert end == "completed", (srcd.query(), srcd.said, qemu.stderr)
    qemu.wait_status("completed")


def start_slowly(srcd: Source, qemu: Machine, mode: str) -> None:
    """Until the guest runs, and most of its memory is still to come."""
    qemu.set_capabilities(*MODES[mode])
    srcd.set_parameters(max_postcopy_bandwidth=CRAWL)
    srcd.migrate(qemu.listen())
    srcd.wait_status("postcopy-active")
    qemu.wait_event("RESUME")


def wait_for_requests(srcd: Source, count: int) -> None:
    while srcd.ours["requested-pages"] < count:
        assert srcd.query()["status"] == "postcopy-active", srcd.query()


def wait_for_preempt(srcd: Source) -> None:
    """Until it has found out that there is a preempt channel."""
    while "preempt channel: yes" not in srcd.said:
        assert srcd.query()["status"] == "postcopy-active", srcd.query()


def assert_on_preempt(counted: dict[str, Any], *, preempt: bool) -> None:
    """What was asked for went there, but for the first, when it was not known."""
    there, asked = (
        counted[name] for name in ("urgent-pages-on-preempt", "urgent-pages")
    )
    assert there <= asked if preempt else there == 0


def wait_for_counted(srcd: Source, qemu: Machine) -> None:
    """Until all pages that the CPU counts in are there.

    It need not have asked for each: some may come before it gets to them.
    """
    # Not through a mapping: that would fill what QEMU waits for.
    while not all(
        counting_guest.counters(os.pread(qemu.ram[0].fd, counting_guest.LAST, 0))
    ):
        assert srcd.query()["status"] == "postcopy-active", srcd.query()


# --- there ------------------------------------------------------------------------


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


def park_running(qemu: Machine, folder: Path, *capabilities: str) -> Place:
    """Put this VM into a directory, in postcopy if that is among them."""
    place = Place(folder, folder / "parked", qemu.version)
    with Destination(folder, "--park", str(place.parked)) as dstd:
        dstd.set_capabilities()
        qemu.set_capabilities("return-path", *capabilities)
        qemu.set_parameters(max_bandwidth=8 * MIB if capabilities else FAST)
        qemu.migrate(dstd.listen())
        if capabilities:
            qemu.wait_status("active")
            qemu.start_postcopy()
        qemu.wait_status("completed")
        assert dstd.wait_status("completed", "failed") == "completed", dstd.said
    return place


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


# --- cut --------------------------------------------------------------------------


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


# --- once -------------------------------------------------------------------------


def test_it_runs_once(place: Place) -> None:
    with place.server() as srcd, place.machine() as qemu:
        assert not place.marked
        with pytest.raises(RuntimeError, match="--clone"), place.server(name="second"):
            pass
        start_slowly(srcd, qemu, "plain")
        assert place.marked
        srcd.set_parameters(max_postcopy_bandwidth=FAST)
        complete(srcd, qemu)
        with pytest.raises(CommandFailed):
            srcd.migrate("tcp:127.0.0.1:1")
    with pytest.raises(RuntimeError, match=r"runs elsewhere.*--clone"), place.server():
        pass


def test_marked_before_it_may_run(place: Place) -> None:
    """A srcd that dies before it knows whether the VM runs has not lost that it may."""
    with MuteDestination() as mute, place.server() as srcd:
        srcd.migrate(mute.uri)
        mute.wait_package()
        assert srcd.query()["status"] == "device"
        assert place.marked
        srcd.process.kill()
        srcd.process.wait()
    with place.server(name="next") as srcd:
        assert srcd.query()["status"] == PAUSED
        with pytest.raises(CommandFailed):
            srcd.migrate("tcp:127.0.0.1:1")


def test_mark_is_removed_when_it_does_not_run(place: Place) -> None:
    with MuteDestination() as mute, place.server() as srcd:
        srcd.migrate(mute.uri)
        mute.wait_package()
        assert place.marked
        mute.close_main()
        assert srcd.wait_status("failed", PAUSED) == "failed"
        assert not place.marked


def test_not_served_where_no_mark_can_be_made(place: Place) -> None:
    (place.parked / "running.new").mkdir()
    with place.server() as srcd, place.machine() as qemu:
        qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        assert srcd.wait_status("failed", PAUSED, "completed") == "failed"
        assert "running.new" in srcd.query()["error-desc"]
    assert not place.marked


def test_clones_at_once_and_again(place: Place) -> None:
    with (
        place.server("--clone", name="one") as one,
        place.server("--clone", name="two") as two,
        place.machine() as first,
        place.machine() as second,
        place.machine() as third,
    ):
        for srcd, qemu in ((one, first), (two, second)):
            start_slowly(srcd, qemu, "plain")
        for srcd, qemu in ((one, first), (two, second)):
            srcd.set_parameters(max_postcopy_bandwidth=FAST)
            complete(srcd, qemu)
            assert_unharmed(place, qemu)
        third.set_capabilities("postcopy-ram")
        one.migrate(third.listen())
        complete(one, third)
        assert_unharmed(place, third)
    assert not place.marked


@pytest.mark.parametrize(
    "other", [{"kind": "q35"}, {"arguments": ("-device", "pci-bridge,chassis_nr=1")}]
)
@pytest.mark.parametrize("restore", ["lazy", "precopy"])
def test_other_machine_leaves_no_mark(
    place: Place, restore: str, other: dict[str, Any]
) -> None:
    """QEMU refuses it: the one of another kind, or the one with a device less."""
    if "kind" not in other:
        shutil.rmtree(place.parked)
        with Machine(memory=MEMORY, counting=True, **other) as qemu:
            qemu.wait_for_counting()
            park_running(qemu, place.folder)
    with place.server("--restore", restore) as srcd:
        wrong = place.machine(**{k: v for k, v in other.items() if k == "kind"})
        with wrong as qemu:
            if restore == "lazy":
                qemu.set_capabilities("postcopy-ram")
            srcd.migrate(qemu.listen())
            end = srcd.wait_status("completed", "failed", PAUSED)
            assert end == "failed", srcd.said
        assert not place.marked, srcd.said
        assert not srcd.execute("query-status")["running"]
        with place.machine(*other.get("arguments", ())) as qemu:
            if restore == "lazy":
                qemu.set_capabilities("postcopy-ram")
            srcd.migrate(qemu.listen())
            complete(srcd, qemu)
    assert place.marked


def test_destination_without_postcopy(place: Place) -> None:
    with place.server() as srcd, place.machine() as qemu:
        srcd.migrate(qemu.listen())
        assert srcd.wait_status("completed", "failed", PAUSED) == "failed"
    assert not place.marked


# --- damaged ----------------------------------------------------------------------


@pytest.mark.parametrize("restore", ["lazy", "precopy"])
def test_damage_is_named_and_not_sent(place: Place, restore: str) -> None:
    at = 5 * MIB + 3 * PAGE
    with place.file_of(MAIN).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    with place.server("--restore", restore) as srcd, place.machine() as qemu:
        if restore == "lazy":
            qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        end = srcd.wait_status("completed", "failed", PAUSED)
        assert end == (PAUSED if restore == "lazy" else "failed")
        said = srcd.query()["error-desc"]
        assert MAIN in said
        assert f"{at // 65536 * 65536:#x}" in said
        assert qemu.ram[0].bytes[at : at + 1] == b"\0"
    assert place.marked == (restore == "lazy")


def flip(file: Path, bit: int) -> None:
    """A second time, it is as it was."""
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0] ^ 1 << bit % 8
        opened.seek(bit // 8)
        opened.write(bytes([byte]))


def unlike(qemu: Machine, right: bytes) -> list[int]:
    """Pages that came and are not as they were, but for what the CPU counts.

    Not read through a mapping: that would fill what QEMU waits for.
    """
    found = os.pread(qemu.ram[0].fd, MEMORY, 0)
    pages = [(at, found[at : at + PAGE]) for at in range(0, MEMORY, PAGE)]
    return [
        at
        for at, page in pages
        if page[2:] != right[at + 2 : at + PAGE] and page.count(0) < PAGE
    ]


@both_modes
def test_running_guest_sees_no_damaged_page(place: Place, mode: str) -> None:
    """It waits for it, wherever it is, and goes on when the file is right again."""
    file = place.file_of(MAIN)
    right = file.read_bytes()
    dice = random.Random(mode)
    # Where the CPU counts, in front of that, and behind it.
    for first, last in (
        (counting_guest.FIRST, counting_guest.LAST),
        (1, counting_guest.FIRST),
        (counting_guest.LAST, EMPTY),
    ):
        bit = 8 * dice.randrange(first, last, PAGE) + dice.randrange(16, 8 * PAGE)
        flip(file, bit)
        with place.server("--clone") as srcd, place.machine() as qemu:
            qemu.set_capabilities(*MODES[mode])
            srcd.migrate(qemu.listen())
            assert srcd.wait_status("completed", "failed", PAUSED) == PAUSED
            said = srcd.query()["error-desc"]
            assert f"offset {bit // 8 // 65536 * 65536:#x}: " in said
            qemu.wait_status(PAUSED)
            assert unlike(qemu, right) == []
            flip(file, bit)
            recover(srcd, qemu)
            complete(srcd, qemu)
            assert_unharmed(place, qemu)
            qemu.execute("stop")
            assert unlike(qemu, right) == []


def test_directory_that_is_no_parked_vm(private_dir: Path) -> None:
    place = Place(private_dir, private_dir)
    with pytest.raises(RuntimeError, match=r"manifest\.json"), place.server():
        pass


# --- the working set --------------------------------------------------------------


@both_modes
def test_working_set(place: Place, mode: str) -> None:
    """What was asked for once is there before it is asked for."""
    with place.server("--clone") as srcd, place.machine() as qemu:
        start_slowly(srcd, qemu, mode)
        wait_for_counted(srcd, qemu)
        srcd.set_parameters(max_postcopy_bandwidth=FAST)
        complete(srcd, qemu)
        asked = srcd.ours["urgent-pages"]
    all_come_unasked(place, mode, asked)


def test_learning(place: Place) -> None:
    """Nothing comes unasked for a while, so all that is asked for is known."""
    with place.server("--clone", "--learn", "5") as srcd, place.machine() as qemu:
        qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        srcd.wait_status("postcopy-active")
        wait_for_requests(srcd, COUNTED)
        assert srcd.ours["background-pages"] == 0
        complete(srcd, qemu)
        asked = srcd.ours["urgent-pages"]
    with Parked.open(place.parked) as parked:
        assert len(parked.working_set) == asked
    all_come_unasked(place, "plain", asked)


def all_come_unasked(place: Place, mode: str, asked: int) -> None:
    """To a machine whose CPU stands still and asks for nothing meanwhile."""
    with place.server("--clone") as srcd, place.machine("-S") as qemu:
        qemu.set_capabilities(*MODES[mode])
        srcd.migrate(qemu.listen())
        complete(srcd, qemu)
        # Its devices may have asked for some.
        early = srcd.ours["urgent-pages"]
        assert asked - early <= srcd.ours["working-set-pages"] <= asked
        assert early < asked
        qemu.execute("cont")
        assert_unharmed(place, qemu)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--learn", "-1"), "--learn must be 0 to 3600 seconds"),
        (("--learn", "3601"), "--learn must be 0 to 3600 seconds"),
        (("--learn", "1", "--restore", "precopy"), "--learn goes with --parked"),
        (("--learn", "1", "--no-working-set"), "leave one out"),
    ],
)
def test_learning_refused(
    place: Place, options: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(RuntimeError, match=sentence), place.server(*options):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff" * 12, bytes(1 << 12)])
def test_malformed_working_set(place: Place, content: bytes) -> None:
    (place.parked / "working-set").write_bytes(content)
    with place.server() as srcd, place.machine() as qemu:
        qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        complete(srcd, qemu)
        assert "working-set" in srcd.said
        assert srcd.ours["working-set-pages"] == 0
        assert_unharmed(place, qemu)


def test_no_working_set(place: Place) -> None:
    with place.server("--no-working-set") as srcd, place.machine() as qemu:
        qemu.set_capabilities("postcopy-ram")
        srcd.migrate(qemu.listen())
        complete(srcd, qemu)
    assert not (place.parked / "working-set").exists()
