"""A daemon is killed at any moment, and started again: nothing is lost.

The guest's process outlives it, and the daemon after it comes up paused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.recovery import both_ways, in_postcopy

if TYPE_CHECKING:
    from pathlib import Path

    from support.recovery import Ends

pytestmark = [pytest.mark.userfaultfd]


def kill(ends: Ends, *sides: str) -> None:
    """Kill these daemons, start them again, and both are paused."""
    chosen = [getattr(ends, side) for side in sides]
    for daemon in chosen:
        daemon.end()
    for daemon in chosen:
        daemon.start()
    for daemon in (ends.src, ends.dst):
        if daemon in chosen:
            assert daemon.query()["status"] == "postcopy-paused", daemon.said
        else:
            daemon.wait_status("postcopy-paused")


@pytest.mark.parametrize("sides", [("dst",), ("src",), ("src", "dst")], ids="-".join)
@both_ways
def test_killed(
    tmp_path: Path, capabilities: tuple[str, ...], sides: tuple[str, ...]
) -> None:
    with in_postcopy(tmp_path, capabilities) as ends:
        here = ends.dst.ours["postcopy-pages"]
        kill(ends, *sides)
        assert ends.dst.execute("query-status")["running"]
        ends.recover()
        ends.wait_both("postcopy-active")
        ends.wait_pages(100)
        ends.complete()
        assert here >= 100
