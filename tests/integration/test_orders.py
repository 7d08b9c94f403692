"""Orders that come at the worst moment."""

from __future__ import annotations

import pytest
import trio
from support.inprocess import pair

from common import address
from common.status import MigrationStatus as M

MIB = 1 << 20


@pytest.mark.parametrize("moment", ["STOP", "MIGRATION_PASS"])
async def test_postcopy_asked_for_while_precopy_completes(moment: str) -> None:
    """Too late is not too little: the last pass must not be cut short."""
    with pair(16 * MIB, "postcopy-ram") as both:

        def order(name: str) -> None:
            if name == moment and both.outgoing.times.stopped:
                both.write_late(8 * MIB, b"written just before the stop")
                both.outgoing.start_postcopy()

        both.on_event = order
        await both.move()
        assert moment in both.events
        assert both.outgoing.pump.stats.background_pages == 0, "postcopy began"
        both.assert_equal()


async def test_a_limit_set_while_the_guest_is_stopped_waits() -> None:
    """The guest stands still: nothing of that pass may be slowed down."""
    with pair(16 * MIB) as both:

        def order(name: str) -> None:
            if name == "STOP":
                for page in range(64):
                    both.write_late(page * 8192, b"written just before the stop")
                both.outgoing.settings.set_parameters({"max-bandwidth": 4096})
                both.outgoing.settings_changed()

        both.on_event = order
        with trio.fail_after(10):  # at 4096 bytes a second it would be a minute
            await both.move()
        both.assert_equal()


async def test_loops_that_are_stopped_leave_no_page_behind() -> None:
    """END must not follow a pump that did not get to send all that is owed."""
    with pair(16 * MIB, "postcopy-ram") as both:

        def stop_the_loops(name: str) -> None:
            if name == "MIGRATION_PASS" and both.outgoing.times.stopped:
                both.outgoing.channels.main.stop.set()

        both.on_event = stop_the_loops
        both.outgoing.start_postcopy()
        await both.incoming.listen(address.Tcp("127.0.0.1", "0"))
        port = str(both.incoming.addresses()[0]["port"])
        both.outgoing.status.set(M.SETUP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(both.incoming.run)
            with trio.fail_after(10):
                await both.outgoing.run(address.Tcp("127.0.0.1", port))
            nursery.cancel_scope.cancel()
        assert both.outgoing.status.now is M.FAILED
        assert both.events[-1] == "RESUME"


async def test_postcopy_asked_for_before_anything() -> None:
    with pair(16 * MIB, "postcopy-ram") as both:
        both.outgoing.start_postcopy()
        await both.move()
        assert both.outgoing.pump.stats.background_pages == 16 * MIB // 4096
        both.assert_equal()
