"""QEMU against QEMU: what the conformance tests of the daemons are measured by.

If these fail, it's the support or the machine that is broken, not our daemons.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from support.counting_guest import assert_consistent, counters
from support.qemu import Qemu, QemuError
from support.ram import HUGE_PAGE, MIB, PAGE, Block, assert_equal_ram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.qemu

ONE = (Block("ram", 64 * MIB),)
TWO = (Block("ram", 32 * MIB), Block("extra", 16 * MIB))
POSTCOPY = ("postcopy-ram",)
PREEMPT = ("postcopy-ram", "postcopy-preempt")
FAST = 1 << 40  # bytes per second
SLOW = 16 * MIB

# 7.2 doesn't know the command that 10 announces the switchover with, and
# expects the preempt channel at another moment.
NO_SWITCHOVER_START = ("-global", "migration.send-switchover-start=off")

versions = pytest.mark.parametrize(
    ("older", "newer"), [("10", "10"), ("7.2", "10"), ("10", "7.2")]
)
blocks = pytest.mark.parametrize("blocks", [ONE, TWO], ids=["one", "two"])
capabilities = pytest.mark.parametrize(
    "capabilities", [POSTCOPY, PREEMPT], ids=["plain", "preempt"]
)


@contextlib.contextmanager
def pair(
    *blocks: Block,
    capabilities: tuple[str, ...] = (),
    source: str = "10",
    destination: str = "10",
    counting: bool = False,
) -> Iterator[tuple[Qemu, Qemu]]:
    """Two machines, the first full of a pattern, the second waiting."""
    arguments = NO_SWITCHOVER_START if destination == "7.2" else ()
    with (
        Qemu(*blocks, version=source, counting=counting, arguments=arguments) as one,
        Qemu(*blocks, version=destination, counting=counting, incoming=True) as two,
    ):
        one.fill(seed=1)
        for side in (one, two):
            side.set_capabilities("return-path", *capabilities)
        yield one, two


def both_complete(source: Qemu, destination: Qemu) -> None:
    for side in (source, destination):
        side.wait_status("completed")
    assert_equal_ram(source.ram, destination.ram)


def both_complete_counting(source: Qemu, destination: Qemu) -> None:
    """The guest has gone on at the destination, and no page is out of step."""
    for side in (source, destination):
        side.wait_status("completed")
    before = counters(source.ram[0].bytes)
    destination.wait_for_counting()
    destination.execute("stop")
    assert_consistent(source.ram[0].bytes)
    assert_consistent(destination.ram[0].bytes)
    assert counters(destination.ram[0].bytes) != before


def into_postcopy(source: Qemu, destination: Qemu, uri: str) -> None:
    """Send a part in precopy, slowly, then switch over."""
    source.set_parameters(max_bandwidth=SLOW)
    source.migrate(uri)
    source.wait_status("active")
    source.wait_counter("normal", at_least=16)
    source.start_postcopy()
    for side in (source, destination):
        side.wait_status("postcopy-active")
    assert source.counter("postcopy-bytes") < sum(r.block.size for r in source.ram)


@versions
@blocks
def test_precopy(older: str, newer: str, blocks: tuple[Block, ...]) -> None:
    with pair(*blocks, source=older, destination=newer) as (source, destination):
        source.set_parameters(max_bandwidth=FAST)
        source.migrate(destination.listen())
        both_complete(source, destination)
        assert source.counter("duplicate") > 0
        assert source.counter("normal") > 0
        assert "postcopy-active" not in source.statuses


def test_precopy_unix(private_dir: Path) -> None:
    with pair() as (source, destination):
        source.set_parameters(max_bandwidth=FAST)
        source.migrate(destination.listen(f"unix:{private_dir}/migration"))
        both_complete(source, destination)


def test_precopy_second_pass() -> None:
    with pair(Block("ram", 32 * MIB), counting=True) as (source, destination):
        source.wait_for_counting()
        source.set_parameters(max_bandwidth=SLOW)
        source.migrate(destination.listen())
        source.wait_counter("dirty-sync-count", at_least=2)
        source.set_parameters(max_bandwidth=FAST)
        both_complete_counting(source, destination)
        assert source.counter("dirty-sync-count") >= 3


@pytest.mark.userfaultfd
@capabilities
def test_postcopy_running_guest(capabilities: tuple[str, ...]) -> None:
    with pair(counting=True, capabilities=capabilities) as (source, destination):
        source.wait_for_counting()
        into_postcopy(source, destination, destination.listen())
        both_complete_counting(source, destination)
        assert source.counter("postcopy-requests") > 0


@pytest.mark.userfaultfd
@versions
@blocks
def test_postcopy(older: str, newer: str, blocks: tuple[Block, ...]) -> None:
    with pair(*blocks, capabilities=POSTCOPY, source=older, destination=newer) as (
        source,
        destination,
    ):
        into_postcopy(source, destination, destination.listen())
        both_complete(source, destination)
        assert source.counter("postcopy-bytes") > MIB


@pytest.mark.userfaultfd
@blocks
def test_postcopy_preempt(blocks: tuple[Block, ...]) -> None:
    with pair(*blocks, capabilities=PREEMPT) as (source, destination):
        into_postcopy(source, destination, destination.listen())
        both_complete(source, destination)
        assert source.counter("postcopy-bytes") > MIB


@pytest.mark.userfaultfd
@capabilities
def test_postcopy_urgent_page(capabilities: tuple[str, ...]) -> None:
    with pair(capabilities=capabilities) as (source, destination):
        source.ram[0].bytes[-PAGE:] = bytes([0x5A]) * PAGE
        source.set_parameters(max_postcopy_bandwidth=SLOW)
        into_postcopy(source, destination, destination.listen())
        got = destination.read(source.ram[0].block.size - PAGE, PAGE)
        assert got == bytes([0x5A]) * PAGE
        assert source.counter("postcopy-requests") == 1
        assert source.counter("remaining") > 0
        source.set_parameters(max_postcopy_bandwidth=0)
        both_complete(source, destination)


@pytest.mark.userfaultfd
@capabilities
def test_postcopy_recovery(capabilities: tuple[str, ...], private_dir: Path) -> None:
    with pair(capabilities=capabilities) as (source, destination):
        source.set_parameters(max_postcopy_bandwidth=SLOW)
        into_postcopy(source, destination, destination.listen())
        # A failure while it still loads the package would end the destination.
        destination.wait_event("RESUME")
        source.pause()
        for side in (source, destination):
            side.wait_status("postcopy-paused")
        destination.recover(f"unix:{private_dir}/recovery")
        source.set_parameters(max_postcopy_bandwidth=0)
        source.migrate(f"unix:{private_dir}/recovery", resume=True)
        both_complete(source, destination)
        assert "postcopy-recover" in source.statuses
        assert "postcopy-recover" in destination.statuses


@pytest.mark.userfaultfd
@pytest.mark.hugepages
@capabilities
def test_postcopy_hugepages(
    capabilities: tuple[str, ...], reserve_hugepages: Callable[[int], None]
) -> None:
    mixed = (Block("ram", 32 * MIB, HUGE_PAGE), Block("extra", 16 * MIB))
    reserve_hugepages(2 * 16)
    with pair(*mixed, capabilities=capabilities) as (source, destination):
        into_postcopy(source, destination, destination.listen())
        both_complete(source, destination)


def test_failure_is_seen_at_both_ends() -> None:
    with (
        Qemu(Block("ram", 16 * MIB)) as source,
        Qemu(Block("other", 16 * MIB), incoming=True) as destination,
    ):
        source.set_capabilities("return-path")
        source.migrate(destination.listen())
        with pytest.raises(QemuError, match="the migration is failed"):
            source.wait_status("completed")
        with pytest.raises(QemuError, match="Unknown ramblock"):
            destination.wait_status("completed")


def test_difference_is_found() -> None:
    with pair() as (source, destination):
        destination.ram[0].bytes[:] = source.ram[0].bytes[:]
        assert_equal_ram(source.ram, destination.ram)
        destination.ram[0].bytes[0x1234] ^= 0xFF
        with pytest.raises(AssertionError, match="ram differs first at 0x1234"):
            assert_equal_ram(source.ram, destination.ram)


@pytest.mark.parametrize(
    ("blocks", "counting"), [(ONE, False), (TWO, False), (ONE, True)]
)
def test_blocks_are_named_as_qemu_does(
    blocks: tuple[Block, ...], counting: bool
) -> None:
    with Qemu(*blocks, counting=counting) as qemu:
        table = qemu.execute("human-monitor-command", command_line="info ramblock")
        rows = [line.split() for line in table.splitlines()[1:]]
        # Name, page size in two words, offset, used, total.
        named = sorted((row[0], int(row[5], 16)) for row in rows)
        assert named == sorted((block.name, block.size) for block in qemu.blocks())
