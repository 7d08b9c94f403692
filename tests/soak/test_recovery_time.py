"""How long a guest waits for its page when the link is back, and what that costs.

The guest waits for a page that was asked for before the link broke. What is
measured ends when it has that page and goes on, seen in its memory.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
from support.daemons import POSTCOPY, PREEMPT
from support.ordeal import child, guest_memory
from support.recovery import Ends, in_postcopy
from support.relay import Relay
from support.report import REPORT_ADDRESS, REPORT_SIZE, Report, ReportError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.soak, pytest.mark.kvm, pytest.mark.userfaultfd]

GIB = 1 << 30
# Bytes of RAM for which one byte of a bitmap is sent.
PER_BYTE = 8 * 4096
# What else the destination says: words, names, requests for pages.
WORDS = 4096
BACK_OFF = 1  # seconds, the least that can be set besides 0
GOAL = 1.0  # seconds, on top of the back-off
STILL = 0.3  # seconds in which a guest that does not wait does something
PATIENCE = 60.0


class Guest:
    """What it has done, in its memory; some of that has to be here."""

    def __init__(self, ends: Ends) -> None:
        self._memory = guest_memory(child(ends.dst.process.pid))
        deadline = time.monotonic() + PATIENCE
        while not self._reports():
            assert time.monotonic() < deadline, "the guest does not report"

    def _reports(self) -> bool:
        try:
            return self.counter() > 0
        except ReportError:
            return False

    def counter(self) -> int:
        data = os.pread(self._memory, REPORT_SIZE, REPORT_ADDRESS)
        return Report.parse(data).counter

    def wait_stuck(self) -> int:
        """Until it waits for a page; how far it has come."""
        deadline = time.monotonic() + PATIENCE
        before, since = self.counter(), time.monotonic()
        while time.monotonic() - since < STILL:
            assert time.monotonic() < deadline, "the guest lacks no page"
            if (now := self.counter()) != before:
                before, since = now, time.monotonic()
        return before

    def wait_beyond(self, counter: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.counter() == counter:
            assert time.monotonic() < deadline, "the guest does not go on"

    def close(self) -> None:
        os.close(self._memory)


def cut(ends: Ends) -> str:
    """Nobody gets through any more; where the destination is."""
    (address,) = ends.dst.query()["socket-address"]
    ends.relay.to("tcp:127.0.0.1:9")  # nobody listens there
    for link in ends.relay.links:
        link.reset()
    ends.wait_both("postcopy-paused")
    return f"tcp:{address['host']}:{address['port']}"


def by_order(ends: Ends, there: str) -> float:
    """The operator resumes when the link is back."""
    begun = time.monotonic()
    uri = ends.relay.to(there)
    ends.src.execute("migrate", uri=uri, resume=True)
    return begun


def by_itself(ends: Ends, there: str) -> float:
    """It has been tried in vain before."""
    ends.src.qmp.wait_event("X_POSTCOPYD_RECOVERY", PATIENCE, result="failed")
    begun = time.monotonic()
    ends.relay.to(there)
    return begun


@pytest.mark.parametrize(
    ("gib", "capabilities", "how", "limit"),
    [
        pytest.param(1, POSTCOPY, by_order, GOAL, id="1GiB"),
        pytest.param(4, POSTCOPY, by_order, GOAL, id="4GiB"),
        pytest.param(12, POSTCOPY, by_order, GOAL, id="12GiB"),
        pytest.param(12, PREEMPT, by_order, GOAL, id="12GiB-preempt"),
        pytest.param(12, PREEMPT, by_itself, GOAL + BACK_OFF, id="12GiB-itself"),
    ],
)
def test_recovery_time(
    private_dir: Path,
    gib: int,
    capabilities: tuple[str, ...],
    how: Callable[[Ends, str], float],
    limit: float,
) -> None:
    memory = ("--memory", f"{gib}G")
    with in_postcopy(
        private_dir,
        capabilities,
        network=Relay,
        only_source=(*memory, "--append", "area=256M"),
        only_destination=memory,
    ) as ends:
        delays = {"first-delay": BACK_OFF, "greatest-delay": BACK_OFF}
        for name, value in {"auto": how is by_itself, **delays}.items():
            ends.src.set_parameters(**{f"x-postcopyd-recovery-{name}": value})
        guest = Guest(ends)
        there = cut(ends)
        counter = guest.wait_stuck()
        old = len(ends.relay.links)
        begun = how(ends, there)
        guest.wait_beyond(counter)
        seconds = time.monotonic() - begun
        guest.close()
        said = ends.relay.links[old].carried[1]
        print(f"{gib} GiB: {seconds * 1e3:.1f} ms, {said} bytes from the destination")
        assert seconds < limit
        bitmap = gib * GIB // PER_BYTE
        assert bitmap <= said < bitmap + WORDS
        ends.src.statuses.clear()
        ends.dst.statuses.clear()
        ends.complete()
