"""VMs of an unmodified QEMU go into a directory, and are all there.

RAM is compared byte by byte with what QEMU has when it is done, and device state
is taken apart by the description where there is one. What each test is about is
shown by counters and statuses.
"""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from support.daemons import Destination
from support.machine import MAIN, Machine, differences
from support.qemu import PATIENCE, Qemu, QemuError
from support.ram import HUGE_PAGE, MIB

from common.errors import HostError
from common.qmp.client import CommandFailed
from common.store.directory import Parked, Parking
from common.stream import foreign, vmdesc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.qemu

FAST = 1 << 40  # bytes per second
SLOW = 8 * MIB
CRAWL = 256 * 1024
MODES = {
    "plain": (),
    "precopy": ("return-path",),
    "postcopy": ("return-path", "postcopy-ram"),
    "preempt": ("return-path", "postcopy-ram", "postcopy-preempt"),
}
kinds = pytest.mark.parametrize(
    ("kind", "version"),
    [("pc", "10"), ("q35", "10"), ("microvm", "10"), ("pc", "7.2"), ("q35", "7.2")],
)
versions = pytest.mark.parametrize("version", ["10", "7.2"])
postcopies = pytest.mark.parametrize("mode", ["postcopy", "preempt"])


@dataclass(frozen=True)
class Ends:
    """A QEMU, the dstd that takes its VM, and where that goes."""

    qemu: Machine
    dstd: Destination
    directory: Path

    def migrate(self, mode: str, bandwidth: int = FAST) -> None:
        self.qemu.set_capabilities(*MODES[mode])
        self.qemu.set_parameters(max_bandwidth=bandwidth)
        self.qemu.migrate(self.dstd.listen())

    def into_postcopy(self, mode: str, bandwidth: int) -> None:
        """Until pages come that nobody has asked for."""
        self.migrate(mode, SLOW)
        self.qemu.wait_counter("transferred", 512 * 1024)
        self.qemu.set_parameters(max_postcopy_bandwidth=bandwidth)
        self.qemu.start_postcopy()
        for side in (self.qemu, self.dstd):
            side.wait_status("postcopy-active")
        until(lambda: self.dstd.ours["postcopy-pages"] > 0)

    def complete(self) -> None:
        self.qemu.wait_status("completed")
        assert self.dstd.wait_status("completed", "failed") == "completed", self.said

    @property
    def said(self) -> str:
        return f"{self.dstd.query()} {self.dstd.said}"

    def fail(self) -> str:
        """The source goes on with its guest; why it does not come here."""
        assert self.dstd.wait_status("completed", "failed") == "failed"
        wait_for_end(self.qemu, "failed")
        until(lambda: self.qemu.execute("query-status")["status"] == "running")
        return str(self.dstd.query()["error-desc"])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline


def wait_for_end(qemu: Qemu, status: str) -> None:
    with contextlib.suppress(QemuError):
        qemu.wait_status(status)
    assert qemu.query()["status"] == status


@contextlib.contextmanager
def ends(
    where: Path, *arguments: Any, filled: bool = True, **options: Any
) -> Iterator[Ends]:
    """A machine with something in its RAM, and a daemon that will park it."""
    directory = where / "vm"
    with Machine(*arguments, **options) as qemu:
        if filled:
            qemu.fill(seed=1)
        with Destination(where, "--park", str(directory)) as dstd:
            dstd.set_capabilities()
            yield Ends(qemu, dstd, directory)


def check(found: Ends, *, described: bool = True, moved: int = 0) -> Parked:
    """What is in the directory is what QEMU has; closed by the caller.

    `moved` pages its guest may have written to since.
    """
    parked = Parked.open(found.directory)
    parked.verify()
    (main,) = [block for block in parked.manifest.blocks if block.name == MAIN]
    ram = found.qemu.ram[0].bytes[:]
    assert len(differences(ram, found.directory / main.file)) <= moved
    assert ram.count(0) < len(ram)
    assert foreign.ends_with_globalstate_untrusted(parked.device_state)
    assert (parked.vmdesc is not None) == described
    if parked.vmdesc:
        lengths = vmdesc.lengths_untrusted(parked.vmdesc)
        walked = vmdesc.walk_untrusted(parked.early + parked.device_state, lengths)
        assert len(walked) == len(parked.manifest.devices) > 5
    return parked


@kinds
@pytest.mark.parametrize("mode", ["plain", "precopy"])
def test_precopy(private_dir: Path, kind: str, version: str, mode: str) -> None:
    with ends(private_dir, kind, version=version) as found:
        assert found.dstd.execute("query-status")["status"] == "inmigrate"
        found.migrate(mode)
        found.complete()
        assert found.dstd.execute("query-status")["status"] == "postmigrate"
        with check(found) as parked:
            assert parked.manifest.run_state == "running"
            assert kind in parked.manifest.machine or kind == "pc"
            assert not parked.manifest.advised
        with pytest.raises(CommandFailed, match="srcd serve --parked"):
            found.dstd.execute("cont")


@kinds
@postcopies
def test_postcopy(private_dir: Path, kind: str, version: str, mode: str) -> None:
    with ends(private_dir, kind, version=version) as found:
        found.into_postcopy(mode, FAST)
        found.complete()
        ours = found.dstd.ours
        assert ours["precopy-pages"] > 0
        assert ours["requests"] == ours["duplicate-pages"] == 0
        with check(found, described=False) as parked:
            assert parked.manifest.advised
            assert parked.manifest.run_state == "running"


@versions
@postcopies
def test_pages_that_were_written_to_again(
    private_dir: Path, version: str, mode: str
) -> None:
    """Discarded, they leave a hole until they come again."""
    with ends(private_dir, version=version, counting=True) as found:
        found.qemu.wait_for_counting()
        found.into_postcopy(mode, FAST)
        found.complete()
        check(found, described=False).close()


@versions
@postcopies
def test_cut_and_recovered(private_dir: Path, version: str, mode: str) -> None:
    with ends(private_dir, version=version) as found:
        found.into_postcopy(mode, CRAWL)
        for pauser in (found.dstd, found.qemu):
            pauser.execute("migrate-pause")
            for side in (found.qemu, found.dstd):
                side.wait_status("postcopy-paused")
            with pytest.raises(HostError, match="is incomplete"):
                Parked.open(found.directory)
            uri = f"unix:{private_dir}/{type(pauser).__name__}"
            found.dstd.execute("migrate-recover", uri=uri)
            found.qemu.migrate(uri, resume=True)
            for side in (found.qemu, found.dstd):
                side.wait_status("postcopy-active")
        found.qemu.set_parameters(max_postcopy_bandwidth=FAST)
        found.complete()
        assert found.dstd.ours["duplicate-pages"] == 0
        check(found, described=False).close()


def test_zero_pages_stay_holes(private_dir: Path) -> None:
    with ends(private_dir, filled=False) as found:
        found.migrate("precopy")
        found.complete()
        assert found.dstd.ours["zero-pages"] > 10_000
        with check(found):
            file = found.directory / "ram-0000"
            assert file.stat().st_blocks * 512 < 4 * MIB


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_a_paused_vm_is_known_to_be(private_dir: Path, mode: str) -> None:
    with ends(private_dir) as found:
        found.qemu.execute("stop")
        if mode == "postcopy":
            found.into_postcopy(mode, FAST)
        else:
            found.migrate(mode)
        found.complete()
        with check(found, described=mode == "precopy") as parked:
            assert parked.manifest.run_state == "paused"


@pytest.mark.parametrize("mode", ["plain", "precopy"])
def test_without_a_description(private_dir: Path, mode: str) -> None:
    """Its end is seen by the connection's, or by silence."""
    with ends(private_dir, options="suppress-vmdesc=on") as found:
        found.migrate(mode)
        found.complete()
        check(found, described=False).close()


@pytest.mark.userfaultfd
def test_background_snapshot(private_dir: Path) -> None:
    """Its guest never stops; there is no END of RAM."""
    with ends(private_dir) as found:
        found.qemu.set_capabilities("background-snapshot")
        found.migrate("plain")
        found.complete()
        assert found.qemu.execute("query-status")["running"]
        check(found, moved=8).close()


VIRTIO_MEM = (
    *("-object", "memory-backend-ram,id=more,size=256M"),
    *("-device", "virtio-mem-pci,memdev=more,requested-size=0"),
)


@pytest.mark.parametrize("mode", ["precopy", "postcopy", "preempt"])
def test_virtio_mem(private_dir: Path, mode: str) -> None:
    """Device state comes early, and pages that are not plugged never."""
    with ends(private_dir, arguments=VIRTIO_MEM, maximum="1G") as found:
        if mode == "precopy":
            found.migrate(mode)
        else:
            found.into_postcopy(mode, FAST)
        found.complete()
        with check(found, described=mode == "precopy") as parked:
            assert b"virtio-mem-device-early" in parked.early
            blocks = {b.name: b.length for b in parked.manifest.blocks}
        (more,) = [name for name in blocks if name.endswith("/more")]
        ours = found.dstd.ours
        pages = ours["precopy-pages"] + ours["postcopy-pages"]
        assert pages * 4096 < sum(blocks.values()) - blocks[more] + MIB


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_huge_pages(
    private_dir: Path, reserve_hugepages: Callable[[int], None], mode: str
) -> None:
    reserve_hugepages(16)
    with ends(private_dir, memory=32 * MIB, page_size=HUGE_PAGE) as found:
        if mode == "precopy":
            found.migrate(mode)
        else:
            found.into_postcopy(mode, FAST)
        found.complete()
        with check(found, described=mode == "precopy") as parked:
            sizes = {b.name: b.page_size for b in parked.manifest.blocks}
            assert sizes[MAIN] == (4096 if mode == "precopy" else HUGE_PAGE)
            assert sizes["pc.bios"] == 4096


# --- refused, and the source goes on -----------------------------------------


# What it says, if it is refused.
REFUSED = {
    "multifd": "capability multifd on",
    "x-ignore-shared": "x-ignore-shared; switch them off there",
    "validate-uuid": None,
}


@pytest.mark.parametrize("capability", REFUSED)
def test_capabilities_that_change_the_stream(
    private_dir: Path, capability: str
) -> None:
    uuid = ("-uuid", "00112233-4455-6677-8899-aabbccddeeff")
    with ends(private_dir, arguments=uuid) as found:
        found.qemu.set_capabilities(capability)
        found.migrate("precopy")
        if sentence := REFUSED[capability]:
            assert sentence in found.fail()
        else:
            found.complete()
            with check(found) as parked:
                assert b"configuration/uuid" in parked.configuration


def test_xbzrle(private_dir: Path) -> None:
    """It is used for a page that is sent the third time, so there must be rounds.

    At a crawl each lasts seconds, and the guest writes to all its pages meanwhile;
    what fits in the downtime is less than a page, and not measured: a busy QEMU
    finds that nothing was sent for a moment, and looks for written pages no more.
    """
    with ends(private_dir, counting=True, filled=False) as found:
        found.qemu.wait_for_counting()
        found.qemu.set_capabilities("xbzrle")
        found.qemu.set_parameters(downtime_limit=1, avail_switchover_bandwidth=MIB)
        found.migrate("precopy", CRAWL)
        assert "switch capability xbzrle off" in found.fail()


def test_sections_in_parts_other_than_ram(private_dir: Path) -> None:
    disk = ("-blockdev", "driver=null-co,node-name=disk,size=67108864")
    with ends(private_dir, arguments=disk) as found:
        found.qemu.execute(
            "block-dirty-bitmap-add", node="disk", name="changes", persistent=False
        )
        found.qemu.set_capabilities("dirty-bitmaps")
        found.migrate("precopy")
        said = found.fail()
        assert "starts a section" in said
        assert "dirty-bitmap" in said


def test_a_directory_that_is_taken(private_dir: Path) -> None:
    with ends(private_dir) as found:
        found.migrate("precopy")
        found.complete()
        with pytest.raises(CommandFailed, match="already been started"):
            found.dstd.listen()
        with (
            pytest.raises(RuntimeError, match="holds a parked VM already"),
            Destination(private_dir, "--park", str(found.directory), name="late"),
        ):
            pass
        check(found).close()


# --- deaths --------------------------------------------------------------------


def test_killed_in_precopy(private_dir: Path) -> None:
    with ends(private_dir) as found:
        found.migrate("precopy", SLOW)
        until(lambda: found.dstd.ours["precopy-pages"] > 100)
        found.dstd.process.send_signal(signal.SIGKILL)
        wait_for_end(found.qemu, "failed")
        assert found.qemu.execute("query-status")["running"]
        with pytest.raises(HostError, match="is incomplete"):
            Parked.open(found.directory)
        with pytest.raises(HostError, match="only a part arrived"):
            Parking.create(found.directory)


def test_cancelled_in_precopy(private_dir: Path) -> None:
    """What is of no use to anybody is gone with the daemon."""
    with ends(private_dir) as found:
        found.migrate("precopy", SLOW)
        until(lambda: found.dstd.ours["precopy-pages"] > 100)
        found.qemu.execute("migrate_cancel")
        assert found.dstd.wait_status("completed", "failed") == "failed"
        assert found.directory.exists()
    assert not found.directory.exists()
