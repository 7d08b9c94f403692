"""Two hosts with systemd: what is installed there, and how a guest moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hosts.services import THERE, moving
from support.daemons import POSTCOPY, PREEMPT, move_precopy, prepare

if TYPE_CHECKING:
    from hosts.bed import Bed

UNITS = (
    *("srcd@vm.service", "dstd@vm.service", "postcopyd-guest@vm.service"),
    *("srcd@vm.socket", "dstd@vm.socket"),
)


@pytest.mark.parametrize("capabilities", [POSTCOPY, PREEMPT], ids=["plain", "preempt"])
def test_postcopy(bed: Bed, name: str, capabilities: tuple[str, ...]) -> None:
    with moving(bed, name) as move:
        bed.link.shape(20 << 20)
        move.to_postcopy(*capabilities)
        move.complete()
        assert move.dst.ours["postcopy-pages"] > 0
        assert (move.dst.ours["preempt-pages"] > 0) == move.preempt
