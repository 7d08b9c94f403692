"""Whether the guest runs: the last word before the switchover counts."""

from __future__ import annotations

import pytest
from support.inprocess import Pair, pair

from common import status
from common.guest.base import GuestState
from srcd.outgoing import OutgoingMigration

MIB = 1 << 20

BOTH_WAYS = pytest.mark.parametrize(
    "capabilities", [pytest.param((), id="precopy"), ("postcopy-ram",)]
)


def _in_the_first_pass(both: Pair, state: GuestState) -> None:
    """As `stop` and `cont` do while a migration is active."""

    def order(name: str) -> None:
        if name == "MIGRATION_PASS" and not both.outgoing.times.stopped:
            both.source.state = state

    both.on_event = order


def _begin_paused(both: Pair) -> None:
    both.outgoing.pump.close()
    both.source.state = GuestState.PAUSED
    both.outgoing = OutgoingMigration(
        both.source,
        both.outgoing.settings,
        status.outgoing(),
        both._event,
        lambda _: None,
    )


@BOTH_WAYS
async def test_continued_while_migrating(capabilities: tuple[str, ...]) -> None:
    """It is stopped here before it runs there."""
    with pair(4 * MIB, *capabilities) as both:
        _begin_paused(both)
        _in_the_first_pass(both, GuestState.RUNNING)
        if capabilities:
            both.outgoing.start_postcopy()
        await both.move()
        assert "STOP" in both.events
        assert both.source.state is GuestState.PAUSED
        assert both.target.state is GuestState.RUNNING


async def test_stopped_while_migrating() -> None:
    """It stays stopped there."""
    with pair(4 * MIB) as both:
        _in_the_first_pass(both, GuestState.PAUSED)
        await both.move()
        assert "STOP" not in both.events
        assert both.target.state is not GuestState.RUNNING
