"""The connection is lost at an exact moment, and what follows a recovery then."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from support.inprocess import Pair, pair

from common import address
from common.errors import HostError
from common.guest.base import GuestState
from common.status import MigrationStatus as M
from dstd.report import migration_info

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from dstd.peer import Peer

MIB = 1 << 20
PATIENCE = 30.0

both_ways = pytest.mark.parametrize(
    "capabilities",
    [("postcopy-ram",), ("postcopy-ram", "postcopy-preempt")],
    ids=["plain", "preempt"],
)


class Status:
    """Waits for what the status of one side becomes."""

    def __init__(self, side: object) -> None:
        self.seen: list[M] = []
        self._news = trio.Event()
        side.status.listeners.append(self._take)  # type: ignore[attr-defined]

    def _take(self, old: M, new: M) -> None:
        self.seen.append(new)
        self._news.set()

    async def wait(self, wanted: M, times: int = 1) -> None:
        while self.seen.count(wanted) < times:
            self._news = trio.Event()
            await self._news.wait()


def port_of(both: Pair) -> str:
    return str(both.incoming.addresses()[0]["port"])


@asynccontextmanager
async def postcopy(both: Pair) -> AsyncIterator[tuple[Status, Status]]:
    """Both sides run; what is left of them at the end is cancelled."""
    both.outgoing.start_postcopy()
    await both.incoming.listen(address.Tcp("127.0.0.1", "0"))
    both.outgoing.status.set(M.SETUP)
    statuses = Status(both.outgoing), Status(both.incoming)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(both.incoming.run)
            nursery.start_soon(
                both.outgoing.run, address.Tcp("127.0.0.1", port_of(both))
            )
            yield statuses
            nursery.cancel_scope.cancel()


async def recover(both: Pair) -> None:
    await both.incoming.recover(address.Tcp("127.0.0.1", "0"))
    both.outgoing.resume(address.Tcp("127.0.0.1", port_of(both)))


async def both_wait(statuses: tuple[Status, Status], wanted: M, times: int = 1) -> None:
    for status in statuses:
        await status.wait(wanted, times)


def first_time(part: object, do: Callable[[], Awaitable[None]], name: str) -> None:
    """Do something in front of a step of a part of the source, once."""
    step = getattr(part, name)

    async def instead() -> None:
        setattr(part, name, step)
        await do()
        await step()

    setattr(part, name, instead)


@both_ways
async def test_resume_is_as_good_as_commit(capabilities: tuple[str, ...]) -> None:
    """The source gave its guest up, and its word for that was lost."""
    with pair(4 * MIB, *capabilities) as both:

        async def lose_it() -> None:
            both.outgoing.channels.main.break_connection()

        first_time(both.outgoing.switchover, lose_it, "_commit")
        async with postcopy(both) as statuses:
            await both_wait(statuses, M.POSTCOPY_PAUSED)
            assert both.target.state is not GuestState.RUNNING
            assert both.source.state is not GuestState.RUNNING
            assert not both.outgoing.pausable
            await recover(both)
            await both_wait(statuses, M.COMPLETED)
        assert both.outgoing.pausable
        assert both.target.state is GuestState.RUNNING
        assert both.source.state is not GuestState.RUNNING
        both.assert_equal()


@both_ways
async def test_nothing_is_owed_any_more(capabilities: tuple[str, ...]) -> None:
    """Only END and EOF were lost: the bitmaps say so, and both complete."""
    with pair(4 * MIB, *capabilities) as both:

        async def lose_it() -> None:
            await both.incoming.memory.complete()
            both.outgoing.channels.main.break_connection()

        first_time(both.outgoing.postcopy, lose_it, "_end")
        async with postcopy(both) as statuses:
            await both_wait(statuses, M.POSTCOPY_PAUSED)
            sent = both.outgoing.pump.stats.background_pages
            assert sent == both.size // 4096
            await recover(both)
            await both_wait(statuses, M.COMPLETED)
        assert both.outgoing.pump.stats.background_pages == sent
        assert both.incoming.memory.stats.duplicate_pages == 0
        both.assert_equal()


@both_ways
async def test_the_last_word_was_lost(capabilities: tuple[str, ...]) -> None:
    """The destination has completed and tells a source that comes back."""
    with pair(4 * MIB, *capabilities) as both:
        arrival = both.incoming.arrival
        complete = arrival.complete

        async def lose_it(peer: Peer) -> None:
            both.incoming.pause()
            await complete(peer)

        arrival.complete = lose_it  # type: ignore[method-assign]
        async with postcopy(both) as (source, destination):
            await source.wait(M.POSTCOPY_PAUSED)
            await destination.wait(M.COMPLETED)
            (place,) = migration_info(both.incoming)["socket-address"]
            both.outgoing.resume(address.Tcp("127.0.0.1", place["port"]))
            await source.wait(M.COMPLETED)
            assert destination.seen[-1] is M.COMPLETED
        both.assert_equal()


async def test_order_to_listen_replaces_the_one_before() -> None:
    with pair(4 * MIB, "postcopy-ram") as both:

        async def lose_it() -> None:
            both.outgoing.channels.main.break_connection()

        first_time(both.outgoing.postcopy, lose_it, "_end")
        path = both.source_file.with_name("socket")
        async with postcopy(both) as statuses:
            await both_wait(statuses, M.POSTCOPY_PAUSED)
            first = port_of(both)
            for target in (address.Unix(str(path)), address.Tcp("127.0.0.1", "0")):
                await both.incoming.recover(target)
            last = port_of(both)
            assert not path.exists()
            assert both.incoming.status.now is M.POSTCOPY_PAUSED
            # One that cannot be used leaves the last one as it is.
            with pytest.raises(HostError):
                await both.incoming.recover(address.Unix("/nowhere/x"))
            await both.incoming.recover(address.Tcp("127.0.0.1", last))
            assert port_of(both) == last
            both.outgoing.resume(address.Tcp("127.0.0.1", first))
            await statuses[0].wait(M.POSTCOPY_PAUSED, 2)
            both.outgoing.resume(address.Tcp("127.0.0.1", last))
            await both_wait(statuses, M.COMPLETED)
        both.assert_equal()


async def test_faults_are_answered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel refuses once does not leave the guest without answers."""
    monkeypatch.setattr("dstd.postcopy.FAULTS_AGAIN_SECONDS", 0.01)
    with pair(4 * MIB, "postcopy-ram") as both:
        answered = trio.Event()
        errors: list[str] = []

        async def refused() -> None:
            both.incoming.memory.faults = again  # type: ignore[method-assign]
            raise HostError("UFFDIO_CONTINUE: no memory")

        async def again() -> None:
            errors.append(str(both.incoming.error))
            answered.set()
            await trio.sleep_forever()

        both.incoming.memory.faults = refused  # type: ignore[method-assign]
        first_time(both.outgoing.postcopy, answered.wait, "_end")
        async with postcopy(both) as statuses:
            await both_wait(statuses, M.COMPLETED)
        assert M.POSTCOPY_PAUSED not in statuses[1].seen
        assert errors == [
            "the guest's faults are not answered, trying again:"
            " UFFDIO_CONTINUE: no memory"
        ]
        assert both.incoming.error is None
