"""`migrate_cancel` while a failed migration gives the guest back to the source."""

from __future__ import annotations

import pytest
import trio
from support.inprocess import pair

from common import address
from common.guest.base import Device, GuestState
from common.status import MigrationStatus as M


async def test_cancelled_while_failing() -> None:
    with pair(1 << 20) as both:
        outgoing = both.outgoing

        def lose_the_destination(name: str) -> None:
            if name == "STOP":
                both.write_late(0, b"to be sent by the last pass")
                outgoing.channels.main.shutdown()

        async def cont() -> None:
            assert outgoing.cancellable
            outgoing.status.set(M.CANCELLING)
            outgoing.cancel()

        both.on_event = lose_the_destination
        both.source.cont = cont  # type: ignore[method-assign]
        await both.incoming.listen(address.Tcp("127.0.0.1", "0"))
        port = str(both.incoming.addresses()[0]["port"])
        outgoing.status.set(M.SETUP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(both.incoming.run)
            nursery.start_soon(outgoing.run, address.Tcp("127.0.0.1", port))
        assert outgoing.status.now is M.CANCELLED
        assert both.events[-1] == "RESUME"


@pytest.mark.parametrize("capabilities", [(), ("postcopy-ram",)])
async def test_cancelled_while_the_destination_loads(
    capabilities: tuple[str, ...],
) -> None:
    """A destination that gets stuck there must not keep the guest stopped."""
    with pair(1 << 20, *capabilities) as both:
        outgoing, loading = both.outgoing, trio.Event()

        async def save() -> bytes:
            return b"state"

        async def load(device: Device, state: bytes) -> None:
            loading.set()
            await trio.sleep_forever()

        for side in (both.source, both.target):
            side.device = Device(name="stuck", version=1)
        both.source.save = save  # type: ignore[method-assign]
        both.target.load = load  # type: ignore[method-assign]
        if capabilities:
            outgoing.start_postcopy()
        await both.incoming.listen(address.Tcp("127.0.0.1", "0"))
        port = str(both.incoming.addresses()[0]["port"])
        outgoing.status.set(M.SETUP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(both.incoming.run)
            nursery.start_soon(outgoing.run, address.Tcp("127.0.0.1", port))
            await loading.wait()
            assert outgoing.cancellable
            outgoing.status.set(M.CANCELLING)
            outgoing.cancel()
            await outgoing.over.wait()
            nursery.cancel_scope.cancel()
        assert outgoing.status.now is M.CANCELLED
        assert both.events[-1] == "RESUME"
        assert both.source.state is GuestState.RUNNING
        assert both.target.state is GuestState.INCOMING
