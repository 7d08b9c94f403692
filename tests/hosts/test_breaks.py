"""The network between the hosts breaks in postcopy, and an operator mends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hosts.services import LISTEN, moving

if TYPE_CHECKING:
    from collections.abc import Callable

    from hosts.bed import Bed
    from hosts.link import Link

BREAKS: dict[str, Callable[[Link], None]] = {
    "cable-of-source": lambda link: link.down("source"),
    "cable-of-destination": lambda link: link.down("destination"),
    "silence": lambda link: link.drop(),
    "silence-to-source": lambda link: link.drop("source"),
    "silence-to-destination": lambda link: link.drop("destination"),
    "half-open-at-source": lambda link: link.half_open("source"),
    "half-open-at-destination": lambda link: link.half_open("destination"),
    "reset": lambda link: link.reset(),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_recovers(bed: Bed, name: str, broken: str) -> None:
    """Both sides find out, the guest runs on, and nothing is sent twice."""
    with moving(bed, name) as move:
        move.to_postcopy()
        BREAKS[broken](bed.link)
        move.wait_paused()
        bed.link.repair()
        move.recover()
        move.wait_pages(50)
        move.complete()
        assert move.dst.ours["duplicate-pages"] == 0


def test_breaks_again_while_recovering(bed: Bed, name: str) -> None:
    with moving(bed, name) as move:
        move.to_postcopy()
        bed.link.drop()
        move.wait_paused()
        # Nobody has repaired it yet: the attempt is in vain.
        move.dst.execute("migrate-recover", uri=LISTEN)
        assert not move.try_resume()
        bed.link.repair()
        move.resume()
        move.complete()


def test_a_slow_link_is_no_broken_one(bed: Bed, name: str) -> None:
    """Less than the stream wants; urgent pages wait behind what is on its way."""
    with moving(bed, name) as move:
        bed.link.shape(1 << 20)
        move.to_postcopy()
        move.src.set_parameters(max_postcopy_bandwidth=0)
        move.wait_pages(500)
        bed.link.mend()
        move.complete()
        assert "postcopy-paused" not in move.src.statuses + move.dst.statuses
