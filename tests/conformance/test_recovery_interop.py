"""A postcopy with a QEMU at the other end pauses, recovers and completes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from conformance.test_interop import (
    FAST,
    LAYOUTS,
    MODES,
    PREEMPT_EARLY,
    Ends,
    both_complete,
    migrate,
    qemu_and_dstd,
    srcd_and_qemu,
)
from support.attached_guest import AttachedGuest
from support.daemons import Destination
from support.parked import shared_ram
from support.preempt_thread import wait_reads_preempt
from support.qemu import Qemu
from support.ram import MIB, PAGE, Block

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.userfaultfd]

# So slow that postcopy does not end before it is cut.
CRAWL = 64 * 1024
PAUSED = "postcopy-paused"

machines = pytest.mark.parametrize(
    ("version", "layout"), [("10", "one"), ("10", "several"), ("7.2", "several")]
)
modes = pytest.mark.parametrize("mode", ["postcopy", "preempt"])


def wait_event(side: Any, name: str) -> None:
    """Of either kind of end."""
    (side if isinstance(side, Qemu) else side.qmp).wait_event(name)


def into_postcopy(source: Any, destination: Any, mode: str) -> None:
    """Until the guest runs at the destination and most of it is owed."""
    source.set_parameters(max_postcopy_bandwidth=CRAWL)
    migrate(source, destination.listen(), mode)
    for side in (source, destination):
        side.wait_status("postcopy-active")
    # A QEMU that has not run the guest yet would fail instead of pausing.
    wait_event(destination, "RESUME")


def remaining(source: Any) -> int:
    found: int = source.execute("query-migrate")["ram"]["remaining"]
    return found


def cut(source: Any, destination: Any, pauser: str) -> None:
    {"source": source, "destination": destination}[pauser].execute("migrate-pause")
    for side in (source, destination):
        side.wait_status(PAUSED)
    assert remaining(source) > MIB


def recover(source: Any, destination: Any, uri: str) -> None:
    destination.execute("migrate-recover", uri=uri)
    source.execute("migrate", uri=uri, resume=True)
    for side in (source, destination):
        side.wait_status("postcopy-active")
        assert "postcopy-recover" in side.statuses
    if getattr(source, "version", "10") != "7.2":
        assert "postcopy-recover-setup" in source.statuses


def cut_and_recover(
    ends: Ends, source: Any, destination: Any, where: Path, mode: str
) -> None:
    """Twice; then at full speed to the end."""
    for pauser in ("source", "destination"):
        cut(source, destination, pauser)
        recover(source, destination, f"unix:{where}/{pauser}")
        if destination is ends.qemu and mode == "preempt":
            wait_reads_preempt(ends.qemu)
    source.set_parameters(max_postcopy_bandwidth=FAST)
    both_complete(ends)
    assert ends.daemon.statuses.count(PAUSED) == 2
    assert ends.qemu.statuses.count(PAUSED) == 2


@machines
@modes
def test_from_qemu(private_dir: Path, version: str, layout: str, mode: str) -> None:
    with qemu_and_dstd(private_dir, LAYOUTS[layout], version, MODES[mode]) as ends:
        into_postcopy(ends.qemu, ends.daemon, mode)
        cut_and_recover(ends, ends.qemu, ends.daemon, private_dir, mode)
        assert ends.daemon.ours["duplicate-pages"] == 0


@machines
@modes
def test_to_qemu(private_dir: Path, version: str, layout: str, mode: str) -> None:
    options = PREEMPT_EARLY.get((version, mode), ())
    blocks = LAYOUTS[layout]
    with srcd_and_qemu(private_dir, blocks, version, MODES[mode], *options) as ends:
        into_postcopy(ends.daemon, ends.qemu, mode)
        cut_and_recover(ends, ends.daemon, ends.qemu, private_dir, mode)
        assert ends.daemon.ours["background-pages"] > 0


@modes
def test_a_waiting_guest_is_served_after_recovery(private_dir: Path, mode: str) -> None:
    """Its request was lost with the connection, so dstd asks again."""
    block = Block("ram", 32 * MIB)
    touch = [block.size - PAGE]
    attach = private_dir / "guest"
    with contextlib.ExitStack() as stack:
        qemu = stack.enter_context(Qemu(block))
        ram = stack.enter_context(shared_ram(qemu))
        qemu.fill(seed=1)
        qemu.ram[0].bytes[touch[0]] = 0x5A
        guest = AttachedGuest(attach, qemu.machine, ram, touch)
        stack.enter_context(guest)
        dstd = stack.enter_context(Destination(private_dir, "--guest", str(attach)))
        for side in (qemu, dstd):
            side.set_capabilities(*MODES[mode])
        into_postcopy(qemu, dstd, mode)
        cut(qemu, dstd, "source")
        recover(qemu, dstd, f"unix:{private_dir}/again")
        assert guest.wait_touched() == [0x5A]
        qemu.set_parameters(max_postcopy_bandwidth=FAST)
        both_complete(Ends(qemu, dstd, ram))
        assert dstd.ours["requests"] > 0
        assert dstd.ours["duplicate-pages"] == 0
