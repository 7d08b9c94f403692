"""Automatic recovery at the source: when it tries, how often, and when not."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from support.paused_migration import PausedMigration

from common import address
from common.recovery import PREFIX
from srcd.recovery import AutomaticRecovery, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LONG = 10**6  # seconds; the clock jumps


class Case:
    """A migration in postcopy, and what recovers it."""

    def __init__(self, migration: PausedMigration, **values: Any) -> None:
        self.migration = migration
        self.events: list[dict[str, Any]] = []
        given: Any = migration
        self.recovery = AutomaticRecovery(given, self._emit)
        migration.settings.changed = self.recovery.settings_changed
        self.set(**values)

    def _emit(self, name: str, data: Any) -> None:
        assert name == "X_POSTCOPYD_RECOVERY"
        self.events.append(dict(data))

    def set(self, **values: Any) -> None:
        parameters = {PREFIX + k.replace("_", "-"): v for k, v in values.items()}
        self.migration.settings.set_parameters(parameters)

    @property
    def results(self) -> list[str]:
        return [event["result"] for event in self.events]

    @property
    def tried(self) -> int:
        return len(self.migration.resumed)

    async def fails(self, times: int = 1) -> list[float]:
        """So many attempts come and fail; when they were made."""
        begun, made = trio.current_time(), []
        for _ in range(times):
            with trio.fail_after(LONG):
                await self.migration.asked.wait()
            self.migration.asked = trio.Event()
            made.append(round(trio.current_time() - begun))
            self.migration.pause("refused")
        return made


@asynccontextmanager
async def paused(
    migration: PausedMigration | None = None, **values: Any
) -> AsyncIterator[Case]:
    case = Case(migration or PausedMigration(), **{"auto": True, **values})
    case.migration.begin()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(case.recovery.run)
        await trio.testing.wait_all_tasks_blocked()
        case.migration.pause()
        yield case
        nursery.cancel_scope.cancel()
    assert not case.migration.status.listeners


async def test_the_waits_double(autojump_clock: Any) -> None:
    async with paused() as case:
        assert case.recovery.state is State.WAITING
        assert await case.fails(7) == [1, 3, 7, 15, 31, 61, 91]
        assert case.results == ["planned", "failed"] * 7
        assert [e["attempt"] for e in case.events] == [
            n for n in range(1, 8) for _ in range(2)
        ]
        assert case.events[1]["error-desc"] == "refused"


async def test_what_came_counts_and_a_connection_does_not(autojump_clock: Any) -> None:
    async with paused() as case:
        await case.fails(3)
        await trio.sleep(8.5)
        case.migration.goes_on()  # the first time: something has come
        assert case.recovery.state is State.READY
        case.migration.pause()
        for wait in (1, 2, 4):
            await trio.sleep(wait + 0.5)
            case.migration.goes_on()  # nothing has come since
            case.migration.pause()
        await trio.sleep(8.5)
        case.migration.lacking -= 1
        case.migration.goes_on()
        case.migration.pause()
        await trio.sleep(1.5)
        case.migration.goes_on()
        planned = [e["delay"] for e in case.events if e["result"] == "planned"]
        assert planned == [1, 2, 4, 8, 1, 2, 4, 8, 1]
        assert case.recovery.recovered == 6
        assert case.recovery.attempts == 9


async def test_a_limit(autojump_clock: Any) -> None:
    async with paused(attempts=2) as case:
        await case.fails(2)
        assert case.recovery.state is State.GIVEN_UP
        assert case.results[-1] == "given-up"
        assert case.events[-1]["error-desc"] == (
            "refused; automatic recovery has given up: 2 attempts in a row;"
            " `migrate` with `resume` goes on"
        )
        await trio.sleep(LONG)
        assert case.tried == 2
        case.set(attempts=3)
        await case.fails()
        assert case.tried == 3
        assert case.results.count("given-up") == 1


async def test_a_limit_that_is_lowered_holds_at_once(autojump_clock: Any) -> None:
    async with paused() as case:
        await case.fails(2)
        case.set(attempts=1)
        assert case.recovery.state is State.GIVEN_UP
        await trio.sleep(LONG)
        assert case.tried == 2
        assert case.results[-1] == "given-up"


async def test_an_address_for_once(autojump_clock: Any) -> None:
    async with paused(PausedMigration(address.Fd("fd0"))) as case:
        await trio.sleep(LONG)
        assert case.tried == 0
        assert case.results == ["given-up"]
        assert "'fd0' cannot be connected to a second time" in str(case.migration.error)


async def test_off_and_on(autojump_clock: Any) -> None:
    async with paused(auto=False) as case:
        await trio.sleep(LONG)
        assert (case.recovery.state, case.events) == (State.OFF, [])
        case.set(auto=True)
        await case.fails(2)
        case.set(auto=False)
        await trio.sleep(LONG)
        assert case.tried == 2
        case.set(auto=True)
        assert await case.fails() == [1]


@pytest.mark.parametrize("under_way", [False, True])
async def test_the_operator_resumes(autojump_clock: Any, under_way: bool) -> None:
    async with paused() as case:
        await case.fails(3)
        if under_way:
            await trio.sleep(8.5)
            assert case.recovery.state is State.TRYING
        await case.recovery.give_way()
        assert case.migration.abandoned == under_way
        there = address.Tcp("elsewhere", "4444")
        case.migration.resume(there)
        case.migration.asked = trio.Event()
        assert case.recovery.state is State.READY
        case.migration.pause("refused")
        assert await case.fails() == [1]
        assert case.migration.resumed[-1] == there


async def test_the_operator_pauses(autojump_clock: Any) -> None:
    async with paused(first_delay=0) as case:
        await trio.testing.wait_all_tasks_blocked()
        case.migration.goes_on()
        case.recovery.hold()
        case.migration.pause("by the operator")
        assert case.recovery.state is State.HELD
        await trio.sleep(LONG)
        assert case.tried == 1
        case.set(auto=False)
        case.set(auto=True)
        await case.fails()
        assert case.tried == 2
