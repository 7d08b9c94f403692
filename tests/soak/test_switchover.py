"""Daemons are killed while the guest changes hands: it runs once, and goes on."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from support.daemons import (
    POSTCOPY,
    PREEMPT,
    Destination,
    Source,
    assert_unharmed,
    prepare,
)
from support.recovery import GUEST, LITTLE, SLOW, Ends
from support.relay import Relay

if TYPE_CHECKING:
    from pathlib import Path

    from support.report import Report

pytestmark = [pytest.mark.soak, pytest.mark.kvm, pytest.mark.userfaultfd]

SEED = int(os.environ.get("SEED") or random.randrange(1 << 32))
TIMES = 20
# Seconds after the order to switch; most of it is over then.
MOMENT = 0.04
PATIENCE = 30.0
PAUSED = "postcopy-paused"
RECOVER = ("postcopy-recover-setup", "postcopy-recover")
UNDER_WAY = (PAUSED, *RECOVER, "postcopy-active")


def settled(side: Any, *undecided: str) -> str:
    """What the migration has come to; "none" if nobody knows of one."""
    deadline = time.monotonic() + PATIENCE
    while (status := side.query().get("status", "none")) in undecided:
        assert time.monotonic() < deadline, (side.query(), side.said)
    return str(status)


def runs(side: Any) -> bool:
    found: bool = side.execute("query-status")["running"]
    return found


def switch_and_kill(ends: Ends, chance: random.Random) -> str:
    """At a moment by chance; the source's status afterwards."""
    src, dst = ends.src, ends.dst
    src.migrate(dst.listen())
    src.wait_status("active")
    src.execute("migrate-start-postcopy")
    time.sleep(chance.uniform(0, MOMENT))  # the moment is what it is about
    sides = chance.sample([src, dst], chance.choice([1, 1, 2]))
    for side in sides:
        side.end(signal.SIGKILL)
    for side in sides:
        side.start()
    return settled(src, "active", "device", "postcopy-active")


def comes_back(ends: Ends, before: Report) -> None:
    """The guest is the source's, and the destination does not run it."""
    assert runs(ends.src), ends.src.query()
    report = ends.src.wait_report(lambda r: r.counter > before.counter)
    assert report.wrong == 0
    assert not runs(ends.dst), ends.dst.query()


def goes_on(ends: Ends) -> None:
    """It is the destination's; the source has the pages that are missing."""
    assert settled(ends.dst, "postcopy-active") == PAUSED, ends.dst.said
    assert not runs(ends.src)
    ends.recover()
    ends.src.set_parameters(max_postcopy_bandwidth=0)
    for side in (ends.src, ends.dst):
        end = settled(side, *UNDER_WAY)
        assert end == "completed", (side.query(), side.said)
    assert ends.dst.ours["duplicate-pages"] == 0
    assert not runs(ends.src)
    assert_unharmed(ends.dst, ends.before)


def test_killed_while_it_switches(private_dir: Path) -> None:
    print(f"SEED={SEED}")
    seen: Counter[str] = Counter()
    for number in range(TIMES):
        chance = random.Random(f"{SEED}-{number}")
        preempt = bool(number % 2)
        folder = private_dir / str(number)
        folder.mkdir()
        with (
            Relay() as relay,
            Source(folder, *GUEST) as src,
            Destination(folder, *LITTLE) as dst,
        ):
            before = src.wait_filled()
            prepare(src, dst, *(PREEMPT if preempt else POSTCOPY))
            src.set_parameters(max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
            ends = Ends(src, dst, relay, before, preempt)
            status = switch_and_kill(ends, chance)
            print(number, status)
            seen[status] += 1
            if status == PAUSED:
                goes_on(ends)
            else:
                assert status in ("none", "failed")
                comes_back(ends, before)
    assert seen[PAUSED]
    assert seen.total() > seen[PAUSED]
