"""Find out whether a destination has postcopy-preempt on: no QEMU says so.

Switched on at one side alone it hangs the destination, or loses pages. So a
second connection is tried. QEMU closes it if it has no use for it. QEMU 7 with
the capability on answers nothing before it has both, and must not see more
after it: then the second one is made while the first answer is awaited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from common.channel import Channel

# How long an answer takes at most, besides the way: a busy host is not silent.
SILENCE_SECONDS: Final = 0.5
# How long it takes at most until it is seen that the other side has closed.
CLOSING_SECONDS: Final = 0.03


async def answered_or(
    silent: Callable[[], Awaitable[None]], answer: Callable[[], Awaitable[None]]
) -> None:
    """Wait for `answer`; if it does not come soon, do `silent` meanwhile."""

    async def when_silent() -> None:
        await trio.sleep(SILENCE_SECONDS)
        await silent()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(when_silent)
        await answer()
        nursery.cancel_scope.cancel()


async def looked_at(answer: Callable[[], Awaitable[None]]) -> float:
    """Wait until the other side has taken the last connection, or closed it.

    `answer` goes to the other side and back. It takes new connections and answers
    in turn, so that it has looked at this one when two answers are here. Returns
    until when the end may still be on its way, on trio's clock.
    """
    begun = trio.current_time()
    await answer()
    await answer()
    way = (trio.current_time() - begun) / 2
    return trio.current_time() + CLOSING_SECONDS + way


async def stays_open(channel: Channel, until: float) -> bool:
    """Whether the other side has not closed it until then."""
    with trio.CancelScope(deadline=until):
        await trio.lowlevel.wait_readable(channel.fd)
    return not channel.hung_up()
