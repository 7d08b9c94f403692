"""Who is next, when many clients want the daemon's one thread.

Whoever has used the least goes first: start-time fair queueing (Goyal, Vin and
Cheng, 1996). A client that comes after a pause is served next, however many
others keep the daemon busy, and those take equal parts of the rest. What an
ordinary request takes is free: those go round-robin, in front of the others.
"""

from __future__ import annotations

import heapq
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


# Of one turn, in seconds of processor time. More than the most is not the
# client's doing: a command that waits is charged what others do meanwhile.
FREE: Final = 0.0003
MOST: Final = 0.005


@dataclass(slots=True)
class Share:
    """What one client has used, in seconds of the queue's own time."""

    used: float = 0.0


@dataclass(slots=True, order=True)
class _Waiting:
    used: float
    number: int  # of those that have used the same, the first to come
    called: trio.Event = field(default_factory=trio.Event, compare=False)


class Turns:
    """Hands out turns, one at a time."""

    def __init__(self) -> None:
        self._queue: list[_Waiting] = []
        self._number = 0
        self._taken = False
        self._time = 0.0  # what the client in turn had used when it began

    @asynccontextmanager
    async def turn(self, share: Share) -> AsyncIterator[None]:
        """Wait for a turn, and take it for as long as the block lasts."""
        await self._wait(max(share.used, self._time))
        self._time = share.used = max(share.used, self._time)
        begun = time.thread_time()
        try:
            yield
        finally:
            share.used += min(max(time.thread_time() - begun - FREE, 0), MOST)
            self._next()

    async def _wait(self, used: float) -> None:
        self._number += 1
        waiting = _Waiting(used, self._number)
        heapq.heappush(self._queue, waiting)
        if not self._taken:
            self._next()
        try:
            await waiting.called.wait()
        except trio.Cancelled:
            if waiting.called.is_set():
                self._next()
            else:
                self._queue.remove(waiting)
                heapq.heapify(self._queue)
            raise

    def _next(self) -> None:
        self._taken = bool(self._queue)
        if self._queue:
            heapq.heappop(self._queue).called.set()
