"""What one source has connected: main, perhaps preempt, and what reads from them."""

from __future__ import annotations

import logging
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from common.errors import ChannelLost, HostError
from dstd.fault import Loader
from dstd.peer import Peer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from common.channel import Channel, Listener
    from dstd.arrival import Arrival
    from dstd.record import Record

log = logging.getLogger(__name__)

# A source with preempt connects it before it sends the package.
PREEMPT_SECONDS: Final = 10.0
# Connections besides main and preempt that are held, of a source that is refused.
STRANGERS_MAX: Final = 16


class Connection:
    """The channels of one source of `arrival`.

    `known` is what is known of the source, if this is a recovery.
    """

    def __init__(
        self, arrival: Arrival, main: Channel, known: Record | None = None
    ) -> None:
        self.main = main
        self.loader = Loader(arrival.memory, main, preempt=False)
        self.peer = Peer(main)
        if known:
            self.peer.comes_back(is_srcd=known.is_srcd, migration=known.migration)
            self.loader.begin(known.section_id)
        self.stack = ExitStack()
        """What ends with the connection."""
        self._arrival = arrival
        self._preempt: Channel | None = None
        self._preempt_came = trio.Event()
        self._strangers: list[Channel] = []

    async def accept_more(self, listener: Listener) -> None:
        """The connection after main is preempt; a third has nothing to say here."""
        while listener.many:
            channel = await listener.accept("preempt", self.main.stop)
            if self._preempt_expected and self._preempt is None:
                self._preempt = channel
                self._preempt_came.set()
            elif self._arrival.parking and len(self._strangers) < STRANGERS_MAX:
                # A QEMU with multifd may wait for ever if one ends too soon for
                # it, and would not hear why it is refused.
                self._strangers.append(channel)
            else:
                log.warning("closing a connection that nobody expects")
                channel.close()

    @asynccontextmanager
    async def strangers_are_heard(self) -> AsyncIterator[None]:
        """What they say is read, and means nothing.

        A QEMU with multifd hears why it is refused only if it can write there, too;
        else it waits until we close, and then perhaps for ever.
        """
        async with trio.open_nursery() as nursery:
            for channel in (self._preempt, *self._strangers):
                if channel and self._strangers:
                    nursery.start_soon(channel.drain)
            yield
            nursery.cancel_scope.cancel()

    @property
    def _preempt_expected(self) -> bool:
        """What is parked comes as its source likes it: the channel is there, and
        stays silent until something is asked for.
        """
        return self._preempts or self._arrival.parking is not None

    @property
    def _preempts(self) -> bool:
        return self._arrival.settings.on("postcopy-preempt")

    @property
    def has_preempt(self) -> bool:
        return self._preempt is not None

    async def preempt_needed(self) -> None:
        """The source's urgent pages come there; it connects before the package."""
        if not self._preempts:
            return
        with trio.move_on_after(PREEMPT_SECONDS):
            await self._preempt_came.wait()
            return
        raise HostError(
            "postcopy-preempt is on here and the source has opened no preempt channel;"
            " switch it on on both sides or on neither"
        )

    async def load_urgent(self) -> None:
        """The preempt channel; its end is an error only while pages are missing."""
        await self._preempt_came.wait()
        assert self._preempt
        memory, parking = self._arrival.memory, self._arrival.parking
        if parking:
            await parking.asked.wait()
        loader = Loader(memory, self._preempt, preempt=True)
        try:
            await loader.urgent_pages()
        except ChannelLost:
            if memory.missing:
                raise
        finally:
            loader.close()

    def end_preempt(self) -> None:
        """Nothing is missing: who reads from it sees its end."""
        if self._preempt:
            self._preempt.break_connection()

    def break_connection(self) -> None:
        """Loops on the channels see their end."""
        self.main.break_connection()
        self.end_preempt()

    def close(self) -> None:
        """No loop runs on them any more."""
        self.stack.close()
        self.loader.close()
        for channel in (*self._strangers, self._preempt, self.main):
            if channel:
                channel.close()
