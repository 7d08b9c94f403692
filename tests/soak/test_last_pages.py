"""Something fails while the last pages come, or the ends tell each other so."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from soak.test_switchover import PAUSED, UNDER_WAY, runs, settled
from support.daemons import POSTCOPY, PREEMPT, assert_unharmed
from support.recovery import Ends, in_postcopy

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.soak, pytest.mark.kvm, pytest.mark.userfaultfd]

SEED = int(os.environ.get("SEED") or random.randrange(1 << 32))
TIMES = 20
# Seconds in which about all comes.
MOMENT = 0.1
STRIKES = ("cut", "src", "dst", "both")


def strike(ends: Ends, how: str) -> None:
    """Break the connections, or kill these daemons and start them again."""
    if how == "cut":
        for link in ends.relay.links:
            link.close()
        return
    sides = {"src": [ends.src], "dst": [ends.dst], "both": [ends.src, ends.dst]}[how]
    for side in sides:
        side.end(signal.SIGKILL)
    for side in sides:
        side.start()


def finish(ends: Ends, address: str) -> str:
    """Recover unless it is over at both ends; what it was like before that."""
    sides = (ends.src, ends.dst)
    others = [status for status in UNDER_WAY if status != PAUSED]
    src, dst = (settled(side, *others) for side in sides)
    if src == PAUSED:
        if dst == PAUSED:
            ends.recover(address)
        else:
            ends.src.execute("migrate", uri=ends.relay.to(address), resume=True)
    for side in sides:
        end = settled(side, *UNDER_WAY)
        assert end == "completed", (src, dst, side.query(), side.said)
    return f"{src} {dst}"


def test_failures_at_the_end(private_dir: Path) -> None:
    print(f"SEED={SEED}")
    seen: Counter[str] = Counter()
    for number in range(TIMES):
        chance = random.Random(f"{SEED}-{number}")
        folder = private_dir / str(number)
        folder.mkdir()
        with in_postcopy(folder, PREEMPT if number % 2 else POSTCOPY) as ends:
            (listens,) = ends.dst.query()["socket-address"]
            ends.src.set_parameters(max_postcopy_bandwidth=0)
            time.sleep(chance.uniform(0, MOMENT))  # the moment is what it is about
            how = STRIKES[number // 2 % len(STRIKES)]
            strike(ends, how)
            found = finish(ends, f"tcp:{listens['host']}:{listens['port']}")
            print(number, how, found)
            seen[found] += 1
            assert not runs(ends.src)
            assert ends.dst.ours["duplicate-pages"] == 0
            assert_unharmed(ends.dst, ends.before)
    assert seen[f"{PAUSED} {PAUSED}"]
