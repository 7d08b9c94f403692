"""Memory for what will come, made while the source goes on with precopy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from common.stream import constants as c
from common.stream import returnpath

if TYPE_CHECKING:
    from dstd.fault import Memory
    from dstd.peer import Peer


class Preparation:
    """Of `memory`, at the word of one source."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        self._over.set()

    async def run(self, peer: Peer) -> None:
        """Until it is done or ended; the source is told."""
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        with self._scope:
            await self._memory.prepare()
        self._over.set()
        await peer.say(returnpath.Pong(c.PING_PREPARED))

    async def end(self) -> None:
        """The guest is about to stop; it must not wait for memory."""
        self._scope.cancel()
        await self._over.wait()
