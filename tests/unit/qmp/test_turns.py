"""Turns: one at a time, the client that has used least first."""

from __future__ import annotations

import time

import pytest
import trio
import trio.testing

from common.qmp.turns import FREE, MOST, Share, Turns


def work(seconds: float) -> None:
    """Use the processor."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def test_one_at_a_time_in_order() -> None:
    turns, order = Turns(), []

    async def client(name: int) -> None:
        for _ in range(3):
            async with turns.turn(shares[name]):
                order.append(name)
                await trio.testing.wait_all_tasks_blocked()
                assert order[-1] == name

    shares = [Share() for _ in range(4)]
    async with turns.turn(Share()), trio.open_nursery() as nursery:
        for name in range(4):
            nursery.start_soon(client, name)
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert order == []
    async with trio.open_nursery() as nursery:
        for name in range(4):
            nursery.start_soon(client, name)
    assert sorted(order) == sorted([*range(4)] * 3)
    assert {order[i : i + 4][0] for i in range(0, 12, 4)} <= set(range(4))


async def test_who_comes_after_a_pause_is_next() -> None:
    turns, order = Turns(), []
    busy = [Share() for _ in range(10)]

    async def client(name: str, share: Share, rounds: int) -> None:
        for _ in range(rounds):
            async with turns.turn(share):
                order.append(name)
                work(4 * FREE)
                if len(order) == 20:
                    nursery.start_soon(client, "idle", Share(), 1)

    async with trio.open_nursery() as nursery:
        for share in busy:
            nursery.start_soon(client, "busy", share, 5)
    assert 20 <= order.index("idle") <= 22
    used = [share.used for share in busy]
    assert max(used) < 3 * min(used)


async def test_small_turns_are_free_and_long_ones_are_bounded() -> None:
    turns, share = Turns(), Share()
    async with turns.turn(share):
        pass
    assert share.used == 0
    async with turns.turn(share):
        work(2 * MOST)
    assert share.used == pytest.approx(MOST)


async def test_cancelled_while_waiting() -> None:
    turns, entered = Turns(), []

    async def client(name: str) -> None:
        async with turns.turn(Share()):
            entered.append(name)

    async with trio.open_nursery() as nursery, turns.turn(Share()):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(client, "cancelled")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        nursery.start_soon(client, "stays")
        await trio.testing.wait_all_tasks_blocked()
    assert entered == ["stays"]


async def test_an_error_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(KeyError):
        async with turns.turn(Share()):
            raise KeyError
    with trio.fail_after(5):
        async with turns.turn(Share()):
            pass
