"""Failures of postcopy at random moments, with a QEMU at the other end.

What arrives is compared byte by byte. Our end's guest is a process of its own,
so our daemon can be killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from conformance.test_interop import FAST, MODES, PREEMPT_EARLY
from support.attached_guest import AttachedGuest
from support.daemons import Destination, Source
from support.parked import fill, shared_ram
from support.ports import free_address
from support.preempt_thread import NAMED_THREADS, wait_reads_preempt
from support.qemu import Qemu
from support.ram import MIB, PAGE, Block, SharedRam, assert_equal_ram
from support.relay import Link, Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.soak, pytest.mark.qemu, pytest.mark.userfaultfd]

SEED = int(os.environ.get("SEED") or random.randrange(1 << 32))
PAUSED = "postcopy-paused"
SLOW = 512 * 1024  # bytes per second
BLOCKS = (Block("ram", 96 * MIB), Block("one", MIB))
# In each of two modes and two directions.
CUTS = {"10": 50, "7.2": 15}
# Of a killed daemon's counters.
SENT = ("background-pages", "postcopy-pages")


@dataclass
class Ordeal:
    """A QEMU and a daemon, one of them the source, and the RAM of both."""

    source: Any
    destination: Any
    qemu: Qemu
    daemon: Any
    ram: list[SharedRam]
    relay: Relay
    random: random.Random
    channels: int
    restarts: int = 0
    pages: Counter[str] = field(default_factory=Counter)
    links: list[Link] = field(default_factory=list)
    """Of the connection there is now: main, and preempt if there is one."""

    def begin(self, mode: str) -> None:
        """Until the guest runs at the destination."""
        for side in (self.source, self.destination):
            side.set_capabilities(*MODES[mode])
        self.source.set_parameters(max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
        self.source.migrate(self.relay.to(self.destination.listen()))
        self.source.wait_status("active")
        self.source.execute("migrate-start-postcopy")
        self.wait_both("postcopy-active")
        self.wait_connected(0)
        # A QEMU that has not run the guest yet would fail instead of pausing.
        events = self.qemu if self.destination is self.qemu else self.daemon.qmp
        events.wait_event("RESUME")

    def wait_both(self, status: str) -> None:
        for side in (self.source, self.destination):
            side.wait_status(status)

    def wait_connected(self, before: int) -> None:
        """By links behind so many that were made before.

        Both ends may be postcopy-active before the relay has taken the one for
        preempt, and before QEMU reads it.
        """
        self.links = self.relay.wait_links(before + self.channels)[before:]
        if self.destination is self.qemu and self.channels > 1:
            wait_reads_preempt(self.qemu)

    def wait_pages(self) -> None:
        """A few of them, however they are counted there."""
        before, more = self._here(), self.random.randrange(1, 30)
        while self._here() < before + more:
            assert self.daemon.query()["status"] == "postcopy-active"

    def _here(self) -> int:
        ours = self.daemon.ours
        return sum(ours.get(name, 0) for name in SENT)

    def suffer(self, strike: Callable[[Ordeal], None]) -> None:
        self.wait_pages()
        strike(self)
        self.wait_both(PAUSED)
        assert self.remaining > 0
        self.destination_listens("tcp:127.0.0.1:0")
        self.resume(self.where)

    def resume(self, uri: str) -> None:
        before = len(self.relay.links)
        self.source.execute("migrate", uri=self.relay.to(uri), resume=True)
        self.wait_both("postcopy-recover")
        self.wait_both("postcopy-active")
        self.wait_connected(before)

    def destination_listens(self, uri: str) -> None:
        if self.destination is self.qemu:
            self.qemu.recover(uri)
        else:
            self.daemon.execute("migrate-recover", uri=uri)

    @property
    def where(self) -> str:
        """The destination listens."""
        (address,) = self.destination.query()["socket-address"]
        return f"tcp:{address['host']}:{address['port']}"

    @property
    def remaining(self) -> int:
        left: int = self.source.query()["ram"]["remaining"]
        return left

    def note(self) -> None:
        """What our daemon has counted."""
        ours = self.daemon.ours
        assert ours.get("duplicate-pages", 0) == 0
        self.pages.update({name: ours.get(name, 0) for name in SENT})

    def complete(self) -> None:
        self.wait_pages()
        self.source.set_parameters(max_postcopy_bandwidth=FAST)
        self.qemu.wait_status("completed")
        assert self.daemon.wait_status("completed", "failed", PAUSED) == "completed"
        self.note()
        assert_equal_ram(self.qemu.ram, self.ram)


# --- what fails -----------------------------------------------------------------


def pause(which: str) -> Callable[[Ordeal], None]:
    return lambda ordeal: getattr(ordeal, which).execute("migrate-pause")


def broken(how: Callable[[Link], None], *channels: int) -> Callable[[Ordeal], None]:
    def strike(ordeal: Ordeal) -> None:
        for number in channels:
            if number < ordeal.channels:
                how(ordeal.links[number])

    return strike


def killed(ordeal: Ordeal) -> None:
    """Ours; its guest lives on."""
    ordeal.note()
    ordeal.daemon.end(signal.SIGKILL)
    ordeal.daemon.start()
    assert ordeal.daemon.query()["status"] == PAUSED, ordeal.daemon.said
    ordeal.daemon.statuses.append(PAUSED)
    ordeal.restarts += 1


STRIKES = (
    *(pause("source"), pause("destination")),
    # Of main alone no reset: now and then a QEMU that sends does not notice it.
    broken(Link.close, 0),
    *(broken(Link.close, 0, 1), broken(Link.reset, 1, 0)),
    killed,
)


# --- with whom ------------------------------------------------------------------


@contextlib.contextmanager
def ordeal_of(
    directory: Path,
    version: str,
    mode: str,
    *,
    from_qemu: bool,
    blocks: tuple[Block, ...] = BLOCKS,
) -> Iterator[Ordeal]:
    attach = directory / "guest"
    program = Destination if from_qemu else Source
    options = () if from_qemu else PREEMPT_EARLY.get((version, mode), ())
    with (
        Relay() as relay,
        Qemu(
            *blocks, version=version, incoming=not from_qemu, arguments=NAMED_THREADS
        ) as qemu,
        shared_ram(qemu) as ram,
    ):
        if from_qemu:
            qemu.fill(seed=1)
        else:
            fill(ram, seed=1)
        state = "incoming" if from_qemu else "running"
        with (
            AttachedGuest(attach, qemu.machine, ram, state=state),
            program(directory, "--guest", str(attach), *options) as daemon,
        ):
            source, destination = (qemu, daemon) if from_qemu else (daemon, qemu)
            ends = (source, destination, qemu, daemon)
            chance = random.Random(f"{SEED}-{version}-{mode}-{from_qemu}")
            channels = 2 if mode == "preempt" else 1
            ordeal = Ordeal(*ends, ram, relay, chance, channels)
            ordeal.begin(mode)
            yield ordeal


@pytest.mark.parametrize("from_qemu", [True, False], ids=["from-qemu", "to-qemu"])
@pytest.mark.parametrize("mode", ["postcopy", "preempt"])
@pytest.mark.parametrize("version", CUTS)
def test_failures(private_dir: Path, version: str, mode: str, from_qemu: bool) -> None:
    print(f"SEED={SEED}")
    with ordeal_of(private_dir, version, mode, from_qemu=from_qemu) as ordeal:
        cuts = CUTS[version]
        for number in range(cuts):
            ordeal.suffer(STRIKES[number % len(STRIKES)])
        ordeal.complete()
        assert ordeal.qemu.statuses.count(PAUSED) == cuts
        assert ordeal.restarts == cuts // len(STRIKES)
        assert ordeal.pages.total() > cuts
        if from_qemu:
            size = sum(block.size for block in BLOCKS)
            assert ordeal.pages.total() * PAGE <= size, "a page came twice"


@pytest.mark.parametrize("mode", ["postcopy", "preempt"])
def test_qemu_waits_for_a_page(private_dir: Path, mode: str) -> None:
    """Its main thread does, so it takes nothing but orders out of band."""
    # Its monitor reaches the RAM of a machine with one block.
    with ordeal_of(
        private_dir, "10", mode, from_qemu=False, blocks=BLOCKS[:1]
    ) as ordeal:
        out = private_dir / "page"
        page = {"val": BLOCKS[0].size - PAGE, "size": PAGE, "filename": str(out)}
        ordeal.daemon.execute("migrate-pause")
        ordeal.wait_both(PAUSED)
        answer = ordeal.qemu.monitor.begin("pmemsave", **page)
        uri = free_address()
        ordeal.destination_listens(uri)
        ordeal.resume(uri)
        ordeal.qemu.monitor.result(answer)
        assert out.read_bytes() == ordeal.ram[0].bytes[-PAGE:]
        ordeal.suffer(killed)
        ordeal.complete()
