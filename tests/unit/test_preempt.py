"""A destination that does not say whether it has a preempt channel: it is found out."""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from common.channel import Channel
from srcd import preempt

if TYPE_CHECKING:
    from collections.abc import Iterator

HOUR = 3600.0
WAY = 0.2


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """The source's end of the second connection, and the destination's."""
    one, other = socket.socketpair()
    channel = Channel(one.detach(), "preempt")
    with other:
        yield channel, other
    channel.close()


# --- a channel that is closed, or not -----------------------------------------------


async def test_a_channel_that_is_kept(
    pair: tuple[Channel, socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    until = trio.current_time() + WAY
    assert await preempt.stays_open(pair[0], until)
    assert trio.current_time() == pytest.approx(until)


async def test_a_channel_that_was_closed(
    pair: tuple[Channel, socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    pair[1].close()
    assert not await preempt.stays_open(pair[0], trio.current_time() + HOUR)
    assert trio.current_time() == pytest.approx(0)


async def test_a_channel_that_is_closed_meanwhile(
    pair: tuple[Channel, socket.socket],
) -> None:
    async with trio.open_nursery() as nursery:
        with trio.fail_after(HOUR):
            nursery.start_soon(trio.to_thread.run_sync, pair[1].close)
            assert not await preempt.stays_open(pair[0], trio.current_time() + HOUR)


async def test_a_channel_that_was_closed_is_seen_although_the_time_is_over(
    pair: tuple[Channel, socket.socket],
) -> None:
    """A busy host comes to look late."""
    pair[1].close()
    assert not await preempt.stays_open(pair[0], trio.current_time() - 1)


# --- the other side has looked ------------------------------------------------------


async def test_two_answers_say_that_it_has_looked(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """One may have been on its way already; the way back is waited for as well."""
    answers = []

    async def answer() -> None:
        await trio.sleep(WAY)
        answers.append(trio.current_time())

    until = await preempt.looked_at(answer)
    assert len(answers) == 2
    assert until - trio.current_time() == pytest.approx(WAY + preempt.CLOSING_SECONDS)


# --- QEMU 7 answers nothing before it has both --------------------------------------


@pytest.mark.parametrize(
    ("takes", "tries"),
    [
        pytest.param(preempt.SILENCE_SECONDS / 2, 0, id="soon"),
        pytest.param(preempt.SILENCE_SECONDS * 2, 1, id="late"),
    ],
)
async def test_the_second_connection_is_made_in_silence_alone(
    autojump_clock: trio.testing.MockClock, takes: float, tries: int
) -> None:
    tried = []

    async def silent() -> None:
        tried.append(trio.current_time())

    await preempt.answered_or(silent, partial(trio.sleep, takes))
    assert tried == [preempt.SILENCE_SECONDS] * tries
    assert trio.current_time() == pytest.approx(takes)


async def test_the_answer_comes_when_there_are_both(
    autojump_clock: trio.testing.MockClock,
) -> None:
    both = trio.Event()

    async def silent() -> None:
        both.set()

    await preempt.answered_or(silent, both.wait)
    assert trio.current_time() == pytest.approx(preempt.SILENCE_SECONDS)
