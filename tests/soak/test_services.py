"""Daemons end in postcopy, at random moments, and systemd starts them again."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Any

import pytest
from support import installed
from support.daemons import POSTCOPY, PREEMPT, prepare
from support.ordeal import PAUSED, Ordeal, guest_memory
from support.recovery import SLOW, Ends
from support.relay import Relay
from support.units import DestinationUnit, SourceUnit, Unit, a_host, started

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.installed import Host

pytestmark = [
    pytest.mark.soak,
    pytest.mark.systemd,
    pytest.mark.systemd_boots,
    pytest.mark.userfaultfd,
]

SEED = int(os.environ.get("SEED") or random.randrange(1 << 32))
TIMES = 10
GUEST = "--kernel /usr/share/postcopyd/test-guest.elf --append write-rate=2M"
DAEMONS = ("srcd@here.service", "dstd@there.service")
GUESTS = ("postcopyd-guest@here.service", "postcopyd-guest@there.service")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    installed.make("install", folder)
    return folder


def killed(side: Unit) -> None:
    side.host.systemctl("kill", "--signal=KILL", side.unit)


def restarted(side: Unit) -> None:
    side.host.systemctl("restart", side.unit)


HOW: tuple[Callable[[Unit], None], ...] = (killed, restarted)


def strike(ordeal: Ordeal) -> None:
    """One side or both, one way or the other."""
    both: Any = (ordeal.ends.src, ordeal.ends.dst)
    sides: list[Any] = ordeal.random.sample(both, ordeal.random.choice([1, 1, 2]))
    for side in sides:
        ordeal.note(side)
        before = side.host.show(side.unit, "MainPID")
        ordeal.random.choice(HOW)(side)
        side.qmp.close()
        side.qmp = side.connect()
        assert side.query()["status"] == PAUSED
        assert side.host.show(side.unit, "MainPID") != before
        side.statuses[:] = [PAUSED]
        ordeal.restarts[side.program] += 1


def in_postcopy(host: Host, capabilities: tuple[str, ...], relay: Relay) -> Ends:
    src, dst = SourceUnit(host, "here"), DestinationUnit(host, "there")
    before = src.wait_report(lambda r: r.filled and r.checked > 0)
    prepare(src, dst, *capabilities)
    src.set_parameters(max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
    ends = Ends(src, dst, relay, before, capabilities is PREEMPT)
    src.migrate(relay.to(dst.listen()))
    src.wait_status("active")
    src.execute("migrate-start-postcopy")
    ends.wait_both("postcopy-active")
    ends.wait_pages(100)
    return ends


@pytest.mark.parametrize("capabilities", [POSTCOPY, PREEMPT], ids=["plain", "preempt"])
def test_restarted(
    files: Path, private_dir: Path, capabilities: tuple[str, ...]
) -> None:
    print(f"SEED={SEED}")
    with a_host(files, private_dir, GUEST) as host, Relay() as relay:
        started(host, [*DAEMONS, *GUESTS])
        ends = in_postcopy(host, capabilities, relay)
        guests = [host.show(unit, "MainPID") for unit in GUESTS]
        memory = guest_memory(host.path(f"/proc/{guests[1]}"))
        ordeal = Ordeal(ends, random.Random(f"{SEED}-{capabilities}"), memory)
        for _ in range(TIMES):
            ordeal.suffer(strike)
        ordeal.complete()
        assert ordeal.pauses == {"srcd": TIMES, "dstd": TIMES}
        assert ordeal.restarts.total() >= TIMES
        assert guests == [host.show(unit, "MainPID") for unit in GUESTS]
        for side in (ends.src, ends.dst):
            side.qmp.close()
