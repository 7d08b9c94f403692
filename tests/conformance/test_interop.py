"""srcd and dstd with an unmodified QEMU at the other end.

The machine has no CPUs, so that its RAM can be compared byte by byte when both
sides say that they are done. What each test is about is shown by counters: that
pages came in postcopy, that they were asked for, and on which channel they went.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from support.attached_guest import AttachedGuest
from support.daemons import Destination, Source
from support.parked import fill, ram_arguments, shared_ram
from support.preempt_thread import NAMED_THREADS
from support.qemu import PATIENCE, Qemu
from support.ram import HUGE_PAGE, MIB, PAGE, Block, SharedRam, assert_equal_ram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.qemu

FAST = 1 << 40  # bytes per second
SLOW = 16 * MIB
SLOWER = 8 * MIB
# Bytes that go in precopy before postcopy is started.
BEGUN = 256 * 1024

LAYOUTS = {
    "one": (Block("ram", 32 * MIB),),
    "several": (Block("ram", 16 * MIB), Block("one", MIB), Block("two", 8 * MIB)),
    "huge": (Block("ram", 12 * MIB, HUGE_PAGE), Block("small", 16 * MIB)),
}
# Pages of the last block are touched. A slow QEMU looks for orders only once in
# 64 pages, whatever their size, and begins with the largest block.
TOUCHED_HERE = {
    "small": (Block("ram", 32 * MIB),),
    "huge": (Block("ram", 24 * MIB), Block("huge", 16 * MIB, HUGE_PAGE)),
}
# QEMU's monitor reaches the first block only.
TOUCHED_IN_QEMU = {
    "small": (Block("ram", 32 * MIB),),
    "huge": (Block("ram", 32 * MIB, HUGE_PAGE),),
}
MODES = {
    "precopy": ("return-path",),
    "postcopy": ("return-path", "postcopy-ram"),
    "preempt": ("return-path", "postcopy-ram", "postcopy-preempt"),
}

# QEMU 7.x makes the preempt connection right behind the main one, and expects
# that of others.
PREEMPT_EARLY = {("7.2", "preempt"): ("--preempt-early",)}

machines = pytest.mark.parametrize(
    ("version", "layout"),
    [
        ("10", "one"),
        ("10", "several"),
        ("10", "huge"),
        ("7.2", "several"),
        ("7.2", "huge"),
    ],
)
modes = pytest.mark.parametrize("mode", MODES)
# With what pages are asked for; 7.2 differs in the preempt channel alone.
URGENT = [
    ("10", "small", "postcopy"),
    ("10", "small", "preempt"),
    ("10", "huge", "postcopy"),
    ("10", "huge", "preempt"),
    ("7.2", "small", "preempt"),
    ("7.2", "huge", "preempt"),
]


@dataclass(frozen=True)
class Ends:
    """A QEMU and a daemon, and the RAM on both sides."""

    qemu: Qemu
    daemon: Any
    ram: list[SharedRam]

    @property
    def pages(self) -> int:
        return sum(ram.block.size for ram in self.ram) // PAGE

    def assert_equal(self) -> None:
        assert_equal_ram(self.qemu.ram, self.ram)


@contextlib.contextmanager
def qemu_and_dstd(
    directory: Path,
    blocks: tuple[Block, ...],
    version: str = "10",
    capabilities: tuple[str, ...] = (),
    *options: str,
) -> Iterator[Ends]:
    """A full QEMU, and dstd with room for what is in it."""
    with Qemu(*blocks, version=version) as qemu, shared_ram(qemu) as ram:
        qemu.fill(seed=1)
        qemu.set_parameters(max_bandwidth=FAST)
        options = (*ram_arguments(qemu, ram), *options)
        with Destination(directory, *options) as dstd:
            for side in (qemu, dstd):
                side.set_capabilities(*capabilities)
            yield Ends(qemu, dstd, ram)


@contextlib.contextmanager
def srcd_and_qemu(
    directory: Path,
    blocks: tuple[Block, ...],
    version: str = "10",
    capabilities: tuple[str, ...] = (),
    *options: str,
) -> Iterator[Ends]:
    """A full srcd, and a QEMU that waits."""
    incoming = Qemu(*blocks, version=version, incoming=True, arguments=NAMED_THREADS)
    with incoming as qemu, shared_ram(qemu) as ram:
        fill(ram, seed=1)
        options = (*ram_arguments(qemu, ram), *options)
        with Source(directory, *options) as srcd:
            srcd.set_parameters(max_bandwidth=FAST)
            for side in (qemu, srcd):
                side.set_capabilities(*capabilities)
            yield Ends(qemu, srcd, ram)


def transferred(source: Qemu | Source) -> int:
    value: int = source.execute("query-migrate").get("ram", {}).get("transferred", 0)
    return value


def migrate(source: Qemu | Source, uri: str, mode: str) -> None:
    """Send all in precopy, or a part of it and the rest in postcopy."""
    if mode == "precopy":
        source.migrate(uri)
        return
    source.set_parameters(max_bandwidth=SLOW)
    source.migrate(uri)
    source.wait_status("active")
    while transferred(source) < BEGUN:
        pass
    source.execute("migrate-start-postcopy")


def both_complete(ends: Ends) -> None:
    ends.qemu.wait_status("completed")
    end = ends.daemon.wait_status("completed", "failed", "postcopy-paused")
    assert end == "completed", ends.daemon.query()
    ends.assert_equal()


# --- from QEMU to dstd --------------------------------------------------------


@pytest.mark.userfaultfd
@pytest.mark.hugepages
@machines
@modes
def test_from_qemu(
    private_dir: Path,
    reserve_hugepages: Callable[[int], None],
    version: str,
    layout: str,
    mode: str,
) -> None:
    blocks = LAYOUTS[layout]
    reserve_hugepages(2 * huge_pages(blocks))
    with qemu_and_dstd(private_dir, blocks, version, MODES[mode]) as ends:
        migrate(ends.qemu, ends.daemon.listen(), mode)
        both_complete(ends)
        counted = ends.daemon.ours
        assert counted["duplicate-pages"] == 0
        assert counted["precopy-pages"] > 0
        assert counted["precopy-pages"] + counted["postcopy-pages"] >= ends.pages
        assert (counted["postcopy-pages"] > 0) == (mode != "precopy")


@pytest.mark.userfaultfd
@pytest.mark.hugepages
@pytest.mark.parametrize(
    ("version", "pages", "mode", "place"),
    [
        *((*case, "auto") for case in URGENT),
        ("10", "small", "preempt", "copy"),
        ("10", "huge", "preempt", "copy"),
    ],
)
def test_urgent_pages_from_qemu(
    private_dir: Path,
    reserve_hugepages: Callable[[int], None],
    version: str,
    pages: str,
    mode: str,
    place: str,
) -> None:
    blocks = TOUCHED_HERE[pages]
    block = blocks[-1]
    reserve_hugepages(2 * huge_pages(blocks))
    touches = 2 if block.page_size == HUGE_PAGE else 4
    touch = [block.size - n * block.page_size for n in range(1, touches + 1)]
    per_touch = block.page_size // PAGE
    attach = private_dir / "guest"
    with contextlib.ExitStack() as stack:
        qemu = stack.enter_context(Qemu(*blocks, version=version))
        ram = stack.enter_context(shared_ram(qemu))
        qemu.fill(seed=1)
        for offset in touch:
            qemu.ram[-1].bytes[offset] = 1 + offset // PAGE % 255
        guest = AttachedGuest(attach, qemu.machine, ram, touch)
        stack.enter_context(guest)
        options = ("--guest", str(attach), "--place", place)
        dstd = stack.enter_context(Destination(private_dir, *options))
        ends = Ends(qemu, dstd, ram)
        for side in (qemu, dstd):
            side.set_capabilities(*MODES[mode])
        qemu.set_parameters(max_postcopy_bandwidth=SLOWER)
        migrate(qemu, dstd.listen(), mode)
        found = guest.wait_touched()
        assert found == [qemu.ram[-1].bytes[offset] for offset in touch]
        assert qemu.counter("remaining") > 0, qemu.query()
        qemu.set_parameters(max_postcopy_bandwidth=FAST)
        both_complete(ends)
        counted = dstd.ours
        assert counted["way"] == {"auto": "continue"}.get(place, place)
        assert counted["duplicate-pages"] == 0
        assert 0 < counted["requests"] <= len(touch)
        assert qemu.counter("postcopy-requests") == counted["requests"]
        on_preempt = counted["requests"] * per_touch if mode == "preempt" else 0
        assert counted["preempt-pages"] == on_preempt


# --- from srcd to QEMU --------------------------------------------------------


@pytest.mark.userfaultfd
@pytest.mark.hugepages
@machines
@modes
def test_to_qemu(
    private_dir: Path,
    reserve_hugepages: Callable[[int], None],
    version: str,
    layout: str,
    mode: str,
) -> None:
    blocks = LAYOUTS[layout]
    reserve_hugepages(2 * huge_pages(blocks))
    options = PREEMPT_EARLY.get((version, mode), ())
    with srcd_and_qemu(private_dir, blocks, version, MODES[mode], *options) as ends:
        migrate(ends.daemon, ends.qemu.listen(), mode)
        both_complete(ends)
        postcopy = mode != "precopy"
        assert ("postcopy-active" in ends.qemu.statuses) == postcopy
        assert ends.daemon.ours["peer-is-dstd"] is False
        assert (ends.daemon.ours["background-pages"] > 0) == postcopy
        sent = ends.daemon.query()["ram"]
        assert sent["precopy-bytes"] >= BEGUN
        assert sent["normal"] + sent["duplicate"] >= ends.pages


@pytest.mark.userfaultfd
@pytest.mark.hugepages
@pytest.mark.parametrize(("version", "pages", "mode"), URGENT)
def test_urgent_pages_to_qemu(
    private_dir: Path,
    reserve_hugepages: Callable[[int], None],
    version: str,
    pages: str,
    mode: str,
) -> None:
    (block,) = blocks = TOUCHED_IN_QEMU[pages]
    reserve_hugepages(2 * huge_pages(blocks))
    options = PREEMPT_EARLY.get((version, mode), ())
    with srcd_and_qemu(private_dir, blocks, version, MODES[mode], *options) as ends:
        srcd, qemu = ends.daemon, ends.qemu
        ends.ram[0].bytes[-PAGE:] = bytes([0x5A]) * PAGE
        srcd.set_parameters(max_postcopy_bandwidth=SLOWER)
        migrate(srcd, qemu.listen(), mode)
        qemu.wait_status("postcopy-active")
        # QEMU's monitor waits for the page, as a device would.
        assert qemu.read(block.size - PAGE, PAGE) == bytes([0x5A]) * PAGE
        assert srcd.query()["ram"]["remaining"] > 0
        srcd.set_parameters(max_postcopy_bandwidth=FAST)
        both_complete(ends)
        counted = srcd.ours
        assert srcd.query()["ram"]["postcopy-requests"] == 1
        assert counted["urgent-pages"] == block.page_size // PAGE
        on_preempt = counted["urgent-pages"] if mode == "preempt" else 0
        assert counted["urgent-pages-on-preempt"] == on_preempt


@pytest.mark.userfaultfd
def test_preempt_early_to_later_qemu(private_dir: Path) -> None:
    """What QEMU 7 needs does not hurt a later one."""
    option = "--preempt-early"
    blocks, mode = LAYOUTS["one"], "preempt"
    with srcd_and_qemu(private_dir, blocks, "10", MODES[mode], option) as ends:
        migrate(ends.daemon, ends.qemu.listen(), mode)
        both_complete(ends)
        assert "postcopy-active" in ends.qemu.statuses


def huge_pages(blocks: tuple[Block, ...]) -> int:
    """How many of them one side needs."""
    huge = (block.size for block in blocks if block.page_size == HUGE_PAGE)
    return sum(huge) // HUGE_PAGE


# --- streams in files and pipes -----------------------------------------------

# A named pipe has a reader and a writer at once, and ends with the writer.
WAYS = {
    "file": ("file:{0}", "file:{0}"),
    "offset": ("file:{0},offset=0x3000", "file:{0},offset=0x3000"),
    "exec": ("exec:cat > {0}", "exec:cat {0}"),
}
# file: came with 8.2.
stored = pytest.mark.parametrize(
    ("version", "way"),
    [("10", "file"), ("10", "offset"), ("10", "exec"), ("7.2", "exec")],
)


def through(directory: Path, way: str) -> tuple[str, str]:
    """Where to write a stream, and where to read it."""
    path = directory / "stream"
    if way == "exec":
        os.mkfifo(path)
    out, back = WAYS[way]
    return out.format(path), back.format(path)


def move_stored(source: Any, destination: Any, uris: tuple[str, str]) -> None:
    """The source ends before the destination begins, unless it is a pipe."""
    out, back = uris
    source.migrate(out)
    if out.startswith("file:"):
        source.wait_status("completed")
    destination.execute("migrate-incoming", uri=back)
    if out.startswith("exec:"):
        source.wait_status("completed")


@stored
def test_stored_for_qemu(private_dir: Path, version: str, way: str) -> None:
    with srcd_and_qemu(private_dir, LAYOUTS["several"], version) as ends:
        move_stored(ends.daemon, ends.qemu, through(private_dir, way))
        ends.qemu.wait_status("completed")
        ends.assert_equal()
        sent = ends.daemon.query()["ram"]
        assert sent["normal"] + sent["duplicate"] == ends.pages
        assert ends.daemon.statuses[-2:] == ["device", "completed"]


@stored
def test_stored_by_qemu(private_dir: Path, version: str, way: str) -> None:
    with qemu_and_dstd(private_dir, LAYOUTS["several"], version) as ends:
        move_stored(ends.qemu, ends.daemon, through(private_dir, way))
        assert ends.daemon.wait_status("completed", "failed") == "completed"
        ends.assert_equal()
        assert ends.daemon.ours["precopy-pages"] == ends.pages


def test_stored_read_at_start(private_dir: Path) -> None:
    """dstd --incoming file: begins before anybody can ask it."""
    out, back = through(private_dir, "file")
    with Qemu(*LAYOUTS["one"]) as qemu, shared_ram(qemu) as ram:
        qemu.fill(seed=1)
        qemu.set_parameters(max_bandwidth=FAST)
        qemu.migrate(out)
        qemu.wait_status("completed")
        options = (*ram_arguments(qemu, ram), "--incoming", back)
        with Destination(private_dir, *options) as dstd:
            deadline = time.monotonic() + PATIENCE
            while dstd.query()["status"] != "completed":
                assert time.monotonic() < deadline, dstd.query()
            assert_equal_ram(qemu.ram, ram)


def test_stored_offset_is_kept_free(private_dir: Path) -> None:
    """What the file had in front of the offset is still there afterwards."""
    path = private_dir / "stream"
    path.write_bytes(b"header")
    with srcd_and_qemu(private_dir, LAYOUTS["one"]) as ends:
        ends.daemon.migrate(f"file:{path},offset=0x3000")
        ends.daemon.wait_status("completed")
    written = path.read_bytes()
    assert written[:6] == b"header"
    assert written[0x3000:0x3008] == b"QEVM\0\0\0\3"
