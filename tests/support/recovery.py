"""A migration in postcopy over a link that a test can cut."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
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
from support.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.report import Report

MIB = 1 << 20
# Bytes per second: pages come by the guest's faults, and those are of a guest
# that looks at few pages in a second.
SLOW = MIB
GUEST = ("--memory", "64M", "--append", "write-rate=8M")
LITTLE = ("--memory", "64M")

both_ways = pytest.mark.parametrize(
    "capabilities", [POSTCOPY, PREEMPT], ids=["plain", "preempt"]
)


@dataclass(frozen=True)
class Ends:
    """A migration in postcopy, through a relay or over a cable."""

    src: Source
    dst: Destination
    relay: Any
    before: Report
    preempt: bool

    @property
    def channels(self) -> int:
        return 2 if self.preempt else 1

    def wait_pages(self, more: int) -> None:
        """Until so many pages more have come in postcopy."""
        wanted = self.dst.ours["postcopy-pages"] + more
        deadline = time.monotonic() + 60
        while self.dst.ours["postcopy-pages"] < wanted:
            assert time.monotonic() < deadline, self.dst.query()

    def wait_both(self, status: str) -> None:
        for side in (self.src, self.dst):
            seen = side.wait_status(status, "completed", "failed")
            assert seen == status, (side.program, side.query(), side.statuses)

    def assert_paused(self) -> None:
        """Both know it, and the guest runs on with the pages that it has."""
        self.wait_both("postcopy-paused")
        assert self.dst.execute("query-status")["running"]
        assert self.src.query()["ram"]["remaining"] > 0

    def recover(self, uri: str | None = None) -> None:
        """Begin a recovery through the relay; at a new address if none is given."""
        self.dst.execute("migrate-recover", uri=uri or self.relay.here)
        (address,) = self.dst.query()["socket-address"]
        target = f"tcp:{address['host']}:{address['port']}"
        self.src.execute("migrate", uri=self.relay.to(target), resume=True)

    def complete(self) -> Report:
        """At full speed to the end."""
        self.src.set_parameters(max_postcopy_bandwidth=0)
        self.wait_both("completed")
        assert self.dst.ours["duplicate-pages"] == 0, "a page was sent twice"
        assert self.src.query()["ram"]["remaining"] == 0
        assert (self.dst.ours["preempt-pages"] > 0) == self.preempt
        return assert_unharmed(self.dst, self.before)


@contextlib.contextmanager
def in_postcopy(
    directory: Path,
    capabilities: tuple[str, ...],
    *options: str,
    network: Any = Relay,
    only_source: tuple[str, ...] = GUEST,
    only_destination: tuple[str, ...] = LITTLE,
) -> Iterator[Ends]:
    """All of the guest's memory is owed, and some of it has come."""
    with (
        network() as relay,
        Source(directory, *only_source, *options, wrapper=relay.wrappers[0]) as src,
        Destination(
            directory, *only_destination, *options, wrapper=relay.wrappers[1]
        ) as dst,
    ):
        before = src.wait_filled()
        prepare(src, dst, *capabilities)
        src.set_parameters(max_bandwidth=SLOW, max_postcopy_bandwidth=SLOW)
        ends = Ends(src, dst, relay, before, capabilities is PREEMPT)
        src.migrate(relay.to(dst.listen(relay.here)))
        src.wait_status("active")
        src.execute("migrate-start-postcopy")
        ends.wait_both("postcopy-active")
        dst.qmp.wait_event("RESUME", 30)
        ends.wait_pages(100)
        yield ends
