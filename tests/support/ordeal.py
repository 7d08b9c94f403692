"""A migration in postcopy in which something fails again and again.

    with in_postcopy(directory, PREEMPT) as ends:
        ordeal = Ordeal(ends, random.Random(seed))
        for _ in range(10):
            ordeal.suffer(kill("dst"))
        ordeal.complete()

A daemon that is killed counts from 0 again, so what it has counted is read
before. What the guest says is read from its memory, of which we hold a
descriptor: a daemon shows none before all of it is there.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.daemons import assert_unharmed
from support.report import REPORT_ADDRESS, REPORT_SIZE, Report, ReportError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from support.recovery import Ends

    Strike = Callable[["Ordeal"], None]

PAUSED = "postcopy-paused"
SETUP = "postcopy-recover-setup"
RECOVER = "postcopy-recover"
ENOUGH = 16 << 20  # bytes: what else the guest's process has is smaller
PATIENCE = 30.0  # seconds
# To recover, after one failure.
ATTEMPTS = 5
# A failure comes after so many pages have come since the one before.
PAGES = range(1, 40)


class Ordeal:
    """What `ends` go through; `random` says when, and what else is by chance.

    `memory` is a descriptor of the guest's; without it the daemon's child has it.
    """

    def __init__(
        self, ends: Ends, random: random.Random, memory: int | None = None
    ) -> None:
        self.ends = ends
        self.random = random
        self.counted: Counter[str] = Counter()
        """By daemons that are no more."""
        self.pauses: Counter[str] = Counter()
        """How often each end has said that it is paused."""
        self.restarts: Counter[str] = Counter()
        self.attempts = 0
        """To recover, without those in vain on purpose."""
        self._memory = memory or guest_memory(child(ends.dst.process.pid))
        self._last = 0

    def suffer(self, strike: Strike) -> None:
        """Let it fail after some pages, recover, and see the guest go on."""
        self.ends.wait_pages(self.random.choice(PAGES))
        assert self.ends.src.query()["ram"]["remaining"] > 0
        strike(self)
        self.wait_paused()
        while not self._recovers():
            assert self.attempts < ATTEMPTS * self.pauses["srcd"], self.ends.src.query()
        self._wait_progress()

    def restart(self, number: int, *names: str) -> None:
        """End daemons with a signal and start them again; they come up paused."""
        sides = [getattr(self.ends, name) for name in names]
        for side in sides:
            self.note(side)
        for side in sides:
            side.end(number)
        for side in sides:
            side.start()
            assert side.query()["status"] == PAUSED, side.said
            side.statuses.append(PAUSED)
            self.restarts[side.program] += 1

    def wait_paused(self) -> None:
        """Both know it, and both have kept what they have."""
        self.ends.wait_both(PAUSED)
        for side in (self.ends.src, self.ends.dst):
            self.pauses[side.program] += 1
        assert self.ends.dst.execute("query-status")["running"]
        assert self.ends.src.query()["ram"]["remaining"] > 0

    def recover(self) -> None:
        """Where the destination listens anyway, or at an address of its own."""
        (address,) = self.ends.dst.query()["socket-address"]
        same = f"tcp:{address['host']}:{address['port']}"
        self.ends.recover(self.random.choice([same, None]))

    def _recovers(self) -> bool:
        """Whether the source goes on; then the destination does, too."""
        self.attempts += 1
        self.recover()
        src, dst = self.ends.src, self.ends.dst
        src.wait_status(SETUP)
        if src.wait_status("postcopy-active", PAUSED) == PAUSED:
            self.settle()  # the destination may be about to notice
            return False
        dst.wait_status("postcopy-active")
        return True

    def settle(self) -> None:
        """Until both are paused, whatever came before that."""
        deadline = time.monotonic() + PATIENCE
        for side in (self.ends.src, self.ends.dst):
            while side.query()["status"] != PAUSED:
                assert time.monotonic() < deadline, side.query()
            side.qmp.events()
            side.statuses[:] = [PAUSED]

    def in_vain(self, uri: str, *why: str) -> None:
        """The source tries to recover there, and is paused again; any of `why`."""
        src = self.ends.src
        src.wait_status(PAUSED)
        src.execute("migrate", uri=uri, resume=True)
        src.wait_status(SETUP)
        src.wait_status(PAUSED)
        told = src.query()["error-desc"]
        assert any(one in told for one in why), told

    def complete(self) -> Report:
        """At full speed to the end; every page came once, and the guest is well."""
        ends = self.ends
        ends.wait_pages(1)
        ends.src.set_parameters(max_postcopy_bandwidth=0)
        ends.wait_both("completed")
        for side in (ends.src, ends.dst):
            self.note(side)
            assert "error-desc" not in side.query()
        os.close(self._memory)
        assert self.counted["duplicate-pages"] == 0, "a page was placed twice"
        assert ends.src.query()["ram"]["remaining"] == 0
        assert (self.counted["preempt-pages"] > 0) == ends.preempt
        return assert_unharmed(ends.dst, ends.before)

    def note(self, side: Any) -> None:
        """Before a daemon ends: what it has counted."""
        ours = side.ours
        assert ours.get("duplicate-pages", 0) == 0, "a page was placed twice"
        self.counted.update({k: v for k, v in ours.items() if isinstance(v, int)})

    def _report(self) -> Report:
        """Once its pages are here."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                data = os.pread(self._memory, REPORT_SIZE, REPORT_ADDRESS)
                return Report.parse(data)
            except ReportError:
                assert time.monotonic() < deadline, "the guest does not report"

    def _wait_progress(self) -> None:
        """The guest's counter goes on, and it has found no wrong page."""
        deadline = time.monotonic() + PATIENCE
        while (now := self._report()).counter <= self._last:
            assert time.monotonic() < deadline, "the guest does not go on"
        assert now.wrong == 0, now
        self._last = now.counter


def guest_memory(process: Path) -> int:
    """A descriptor of the memory of a guest, whose folder of /proc this is."""
    for fd in (process / "fd").iterdir():
        if os.readlink(fd).startswith("/memfd:") and fd.stat().st_size > ENOUGH:
            return os.open(fd, os.O_RDONLY)
    raise LookupError(f"{process} has no memory of a guest")


def child(daemon: int) -> Path:
    """The folder of /proc of the only process that a daemon has started."""
    (pid,) = [
        pid
        for task in Path(f"/proc/{daemon}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    return Path(f"/proc/{pid}")
